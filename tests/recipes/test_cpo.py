"""CPO and SimPO, whole: the loss from the model's own logits, and restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import cpo
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train import fit
from fastrl.train.config import CPOConfig, PackingBlock
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model
from fastrl.train.preference_rows import load_pairs
from tests import oracle_preference as oracle
from tests.recipes.preference_runs import configured, first_rows, mean_logprob, pair_rows, total_logprob, write_rows
from tests.recipes.runs import Base, after_call, assert_same_run, metrics_of, send_sigterm

CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "cpo": ({"label_smoothing": 0.1}, total_logprob, lambda c, r: oracle.sigmoid(c, r, 0.5, 0.1)),
    "hinge": ({"loss_type": "hinge", "cpo_alpha": 0.25}, total_logprob, lambda c, r: oracle.hinge(c, r, 0.5)),
    "ipo": ({"loss_type": "ipo"}, mean_logprob, lambda c, r: oracle.ipo(c, r, 0.5)),
    "simpo": (
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.2},
        mean_logprob,
        lambda c, r: oracle.simpo(c, r, 0.5, 1.2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_the_papers_plus_the_nll_of_the_chosen(base: Base, tmp_path: Path, name: str) -> None:
    changes, score, formula = CASES[name]
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    config = configured(CPOConfig, base, data, tmp_path / "run", beta=0.5, max_steps=1, **changes)
    assert cpo.run(replace(config, packing=PackingBlock(token_budget=40), max_length=20)) == 0
    (line,) = metrics_of(tmp_path / "run")
    model = load_model(base.model, dtype=torch.float32, device="cpu")
    pairs = first_rows(config, load_pairs(str(data), make_tokenizer(), config, output_dir=None).rows)
    chosen, rejected = ([score(model, each) for each in side] for side in zip(*((p.chosen, p.rejected) for p in pairs), strict=True))  # fmt: skip  # noqa: E501
    each = [formula(c, r)[0] for c, r in zip(chosen, rejected, strict=True)]
    n_tokens = sum(sum(pair.chosen.is_trained) for pair in pairs)
    nll = -sum(total_logprob(model, pair.chosen) for pair in pairs) / n_tokens
    assert line["loss"] == pytest.approx(sum(each) / 8 + config.cpo_alpha * nll, rel=1e-5)
    assert line["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert line["logps/chosen"] == pytest.approx(sum(chosen) / 8, rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(0.5 * (sum(chosen) - sum(rejected)) / 8, rel=1e-4)


def test_a_stopped_run_resumes_bit_for_bit(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    changes: dict[str, Any] = {"max_steps": 6, "eval_dataset": str(data), "loss_type": "simpo"}
    assert cpo.run(configured(CPOConfig, base, data, tmp_path / "whole", **changes)) == 0
    config = configured(CPOConfig, base, data, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=4, do=send_sigterm)
        assert cpo.run(config) == EXIT_INTERRUPTED
    assert cpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)
    lines = metrics_of(tmp_path / "whole")
    assert lines[-1]["eval/rewards/margins"] > lines[0]["rewards/margins"]
