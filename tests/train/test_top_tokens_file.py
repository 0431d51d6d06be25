"""A stored teacher finds its rows by what they are, in any order, and gives back the numbers that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrl.ops import TopTokens
from fastrl.train.supervised import Example
from fastrl.train.top_tokens_file import read_top_tokens, row_digest, write_top_tokens

EXAMPLES = [
    Example((1, 2, 3, 4), (False, False, True, True)),
    Example((1, 2, 3, 4), (False, True, True, True)),  # the same tokens under another mask
    Example((5, 6), (False, True)),
]


def entries(first: int, n: int) -> TopTokens:
    number = torch.arange(first, first + n)
    logprob = torch.stack([-number.float() - 0.25, -number.float() - 0.5], -1)
    return TopTokens(torch.stack([number, number + 100], -1), logprob, -number.float() - 2)


def written(path: Path) -> Path:
    parts = [entries(0, 2), entries(2, 3), entries(5, 1)]
    write_top_tokens(path, EXAMPLES, parts, temperature=1.5, vocabulary="abc", provenance={"teacher": "big"})
    return path


def test_rows_come_back_in_the_order_they_are_asked_for(tmp_path: Path) -> None:
    stored = read_top_tokens(str(written(tmp_path / "a" / "top.safetensors")), temperature=1.5, vocabulary="abc")
    got = stored.of([EXAMPLES[2], EXAMPLES[0], EXAMPLES[2]])
    expected = [torch.cat(x) for x in zip(entries(5, 1), entries(0, 2), entries(5, 1), strict=True)]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["top.safetensors"]


def test_a_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    stored = read_top_tokens(str(written(tmp_path / "top.safetensors")), temperature=1.5, vocabulary="abc")
    stored.check(EXAMPLES, source="train.jsonl")
    with pytest.raises(ValueError, match=r"has nothing for row 2 of train\.jsonl; write it again"):
        stored.check([EXAMPLES[0], Example((5, 7), (False, True))], source="train.jsonl")


def test_a_digest_tells_masks_and_borders_apart() -> None:
    assert len({row_digest(example) for example in EXAMPLES}) == 3
    assert row_digest(Example((1, 256), (False, True))) != row_digest(Example((256, 1), (False, True)))
