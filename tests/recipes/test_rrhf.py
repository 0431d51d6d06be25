"""RRHF, whole: the loss from the model's own logits, kinds of ranked rows, and restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import rrhf
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train import fit
from fastrl.train.config import PackingBlock, RRHFConfig
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model
from fastrl.train.preference_rows import load_ranked
from tests import oracle_preference as oracle
from tests.recipes.preference_runs import configured, first_rows, mean_logprob, pair_rows, ranked_rows, write_rows
from tests.recipes.runs import Base, after_call, assert_same_run, metrics_of, send_sigterm


def test_the_first_loss_is_the_papers_of_the_first_rows(base: Base, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ranked_rows())
    config = configured(RRHFConfig, base, data, tmp_path / "run", max_steps=1, nll_coef=0.5)
    assert rrhf.run(replace(config, packing=PackingBlock(token_budget=80))) == 0
    (line,) = metrics_of(tmp_path / "run")
    model = load_model(base.model, dtype=torch.float32, device="cpu")
    rows = first_rows(config, load_ranked(str(data), make_tokenizer(), config, output_dir=None).rows)
    rank, nll, right = 0.0, 0.0, []
    for row in rows:
        mean = [mean_logprob(model, example) for example in row.examples]
        rank += oracle.rrhf(mean, row.scores, [0] * len(mean))[0].sum()
        nll -= mean[row.scores.index(max(row.scores))]
        order = [(i, j) for i in range(len(mean)) for j in range(len(mean)) if row.scores[i] > row.scores[j]]
        right += [mean[i] > mean[j] for i, j in order]
    assert line["loss"] == pytest.approx((rank + 0.5 * nll) / 8, rel=1e-5)
    assert line["rank_loss"] == pytest.approx(rank / 8, rel=1e-5)
    assert line["nll_loss"] == pytest.approx(nll / 8, rel=1e-5)
    assert line["rewards/accuracies"] == pytest.approx(sum(right) / len(right))


def test_ranks_and_pairs_are_scores_too(base: Base, tmp_path: Path) -> None:
    config = configured(RRHFConfig, base, tmp_path, tmp_path / "run")
    ranked = [{"prompt": row["prompt"], "completions": row["completions"], "ranks": [2, 1]} for row in ranked_rows(1)]
    for name, rows, scores in (("ranked", ranked, (-2.0, -1.0)), ("pairs", pair_rows(1), (1.0, 0.0))):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        (row,) = load_ranked(str(path), make_tokenizer(), config, output_dir=None).rows
        assert row.scores == scores


def test_a_stopped_run_resumes_bit_for_bit(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ranked_rows())
    changes: dict[str, Any] = {"max_steps": 6, "eval_dataset": str(data)}
    assert rrhf.run(configured(RRHFConfig, base, data, tmp_path / "whole", **changes)) == 0
    config = configured(RRHFConfig, base, data, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=4, do=send_sigterm)
        assert rrhf.run(config) == EXIT_INTERRUPTED
    assert rrhf.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)
    lines = metrics_of(tmp_path / "whole")
    assert lines[-1]["eval/loss"] < lines[0]["loss"]
