"""A penalty that grows with the completion's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.rewards.protocol import promises


@promises(in_process=True, pure=True)
@dataclass(frozen=True)
class Length:
    """A reward function in [-1, 0]: nothing up to `start` tokens, then linear, -1 from `limit` tokens on.

        reward[s] = -min(1, max(0, (n_s - start) / (limit - start)))

    With `start = limit - cache` it is DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).
    A record rather than a closure, so that it can travel to another process.

    Attributes:
        start: tokens that cost nothing.
        limit: tokens from which the full penalty holds; more than `start`.
    """

    start: int = 0
    limit: int = 256

    __name__ = "length"

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.limit:
            raise ValueError(f"length needs 0 <= start < limit, got start={self.start}, limit={self.limit}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
        """Reward per completion, from its number of tokens. [S] token ids -> [S]."""
        span = self.limit - self.start
        return [-min(1.0, max(0.0, (len(ids) - self.start) / span)) for ids in completion_ids]
