"""The lines that docs/integrations/others.md gives for hosts, run on stand-ins with the hosts' signatures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "others.md"
LINES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def host_after(block: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = re.search(r"^import ([\w.]+) as host$", block, flags=re.MULTILINE)
    assert name is not None
    parts = name[1].split(".")
    modules = [ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for above, below, part in zip(modules, modules[1:], parts[1:], strict=False):
        setattr(above, part, below)
    exec(block, {})
    return modules[-1]


def test_each_host_has_three_lines() -> None:
    assert [len(block.splitlines()) for block in LINES] == [3, 3, 3]


def test_they_give_the_log_probabilities_and_entropies_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    openrlhf, slime, areal = (host_after(block, monkeypatch) for block in LINES)
    at_07, at_1 = (logits / 0.7).log_softmax(-1), logits.log_softmax(-1)
    taken = at_07.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(openrlhf.log_probs_from_logits(logits, labels, temperature=0.7), taken)
    logprobs, entropy = areal.gather_logprobs_entropy(logits, labels, 0.7, None, 1024)
    torch.testing.assert_close(logprobs, taken)
    torch.testing.assert_close(entropy, -(at_07.exp() * at_07).sum(-1))
    torch.testing.assert_close(
        slime.compute_log_probs(logits[0], labels[0], None), at_1[0].gather(-1, labels[0][:, None])
    )


def test_a_group_of_several_ranks_is_refused_for_its_logits_are_a_part_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, slime, areal = (host_after(block, monkeypatch) for block in LINES)
    logits, labels, group = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda given: 2 if given is group else 1)
    with pytest.raises(ValueError, match="process_group has 2 ranks"):
        slime.compute_log_probs(logits, labels, group)
    with pytest.raises(ValueError, match="tp_group has 2 ranks"):
        areal.gather_logprobs_entropy(logits, labels, tp_group=group)
    alone = object()
    assert slime.compute_log_probs(logits, labels, alone).shape == (4, 1)
    assert areal.gather_logprobs_entropy(logits[None], labels[None], tp_group=alone)[1].shape == (1, 4)
