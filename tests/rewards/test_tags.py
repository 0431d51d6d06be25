from __future__ import annotations

import pytest

from fastrl.rewards import TagCounts


def test_each_tag_that_is_there_exactly_once_earns_its_share() -> None:
    texts = ["<think>a</think><answer>b</answer>", "<think>a</think>b", "<think><think></think>", "", "</answer>"]
    assert TagCounts()(texts) == [1.0, 0.5, 0.25, 0.0, 0.25]
    assert TagCounts(names=("plan",))(["<plan>x</plan>", "<plan>"]) == [1.0, 0.5]


def test_no_name_is_refused() -> None:
    for names in ((), "think"):
        with pytest.raises(ValueError, match="names as a list"):
            TagCounts(names=names)  # type: ignore[arg-type]
