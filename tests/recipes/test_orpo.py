"""ORPO, whole: NLL with and without the prompt, the odds, and restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import orpo
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train import fit
from fastrl.train.config import ORPOConfig, PackingBlock
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model
from fastrl.train.preference_rows import load_pairs
from tests import oracle_preference as oracle
from tests.recipes.preference_runs import configured, first_rows, mean_logprob, pair_rows, token_logprob, write_rows
from tests.recipes.runs import Base, after_call, assert_same_run, metrics_of, send_sigterm


@pytest.mark.parametrize("nll_on_prompt", [True, False])
def test_the_first_loss_is_nll_plus_odds_of_the_models_own_log_probabilities(
    base: Base, tmp_path: Path, nll_on_prompt: bool
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    config = configured(
        ORPOConfig, base, data, tmp_path / "run", beta=0.4, max_steps=1, nll_on_prompt=nll_on_prompt, max_length=20
    )
    assert orpo.run(replace(config, packing=PackingBlock(token_budget=40))) == 0
    (line,) = metrics_of(tmp_path / "run")
    model = load_model(base.model, dtype=torch.float32, device="cpu")
    pairs = first_rows(config, load_pairs(str(data), make_tokenizer(), config, output_dir=None).rows)
    tokens = [
        value
        for pair in pairs
        for value, is_trained in zip(token_logprob(model, pair.chosen), pair.chosen.is_trained[1:], strict=True)
        if is_trained or nll_on_prompt
    ]
    scores = [(mean_logprob(model, pair.chosen), mean_logprob(model, pair.rejected)) for pair in pairs]
    nll = -sum(tokens) / len(tokens)
    assert line["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert line["loss"] == pytest.approx(nll + sum(oracle.orpo(c, r, 0.4)[0] for c, r in scores) / 8, rel=1e-5)
    assert line["logps/chosen"] == pytest.approx(sum(c for c, _ in scores) / 8, rel=1e-5)
    assert line["rewards/rejected"] == pytest.approx(0.4 * sum(r for _, r in scores) / 8, rel=1e-5)
    assert line["log_odds_ratio"] == pytest.approx(-sum(oracle.orpo(c, r, 1.0)[0] for c, r in scores) / 8, rel=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    changes: dict[str, Any] = {"max_steps": 6, "eval_dataset": str(data)}
    assert orpo.run(configured(ORPOConfig, base, data, tmp_path / "whole", **changes)) == 0
    config = configured(ORPOConfig, base, data, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=4, do=send_sigterm)
        assert orpo.run(config) == EXIT_INTERRUPTED
    assert orpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)
    lines = metrics_of(tmp_path / "whole")
    assert lines[-1]["eval/nll_loss"] < 0.9 * lines[0]["nll_loss"]
