"""Partial credit for structure: the share of expected tags that are there exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text


@promises(in_process=True, pure=True)
@dataclass(frozen=True)
class TagCounts:
    """A reward function in [0, 1]: a tag that is missing, or there twice, earns nothing.

        reward[s] = (tags that occur exactly once in s) / (number of tags),    <name> and </name> for each name

    It asks for no order and no place; `format` asks for all of it.

    Attributes:
        names: of the tags, without brackets.

    Source: open-r1's `tag_count_reward`, which also counts the line breaks around its tags.
    """

    names: tuple[str, ...] = ("think", "answer")

    __name__ = "tag_count"

    def __post_init__(self) -> None:
        if not self.names or isinstance(self.names, str):
            raise ValueError(f"tag_count needs names as a list, such as names=('think', 'answer'), got {self.names!r}")

    def __call__(self, completions: Sequence[object], **_: object) -> list[float]:
        """[S] completions -> [S] in [0, 1]."""
        tags = [tag for name in self.names for tag in (f"<{name}>", f"</{name}>")]
        texts = [completion_text(completion) for completion in completions]
        return [sum(text.count(tag) == 1 for tag in tags) / len(tags) for text in texts]
