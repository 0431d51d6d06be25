"""A penalty for saying the same words again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text


@promises(in_process=True, pure=True)
@dataclass(frozen=True)
class Repetition:
    """A reward function in [max_penalty, 0], from the share of n-grams that occurred before.

        reward[s] = max_penalty (1 - distinct n-grams / n-grams),    n consecutive words, in lower case

    Texts of fewer than n words get 0.

    Attributes:
        ngram_size: n.
        max_penalty: at most 0; the limit for one n-gram repeated for ever.

    Source: Yeo et al. 2025, arXiv:2502.03373, sec. 3.3, which penalises each repeated token; this value per completion
        is open-r1's `get_repetition_penalty_reward`.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0

    __name__ = "repetition"

    def __post_init__(self) -> None:
        if self.ngram_size < 1 or not self.max_penalty <= 0:
            raise ValueError(
                f"repetition needs ngram_size of at least 1 and max_penalty of at most 0, got {self.ngram_size} and "
                f"{self.max_penalty}"
            )

    def __call__(self, completions: Sequence[object], **_: object) -> list[float]:
        """[S] completions -> [S] in [max_penalty, 0]."""
        return [self.max_penalty * self._repeated(completion_text(each).lower().split()) for each in completions]

    def _repeated(self, words: list[str]) -> float:
        count = len(words) - self.ngram_size + 1
        if count < 1:
            return 0.0
        distinct = {tuple(words[i : i + self.ngram_size]) for i in range(count)}
        return 1 - len(distinct) / count
