"""KTO, whole: the loss and its baseline from the models' own logits, pairs taken apart, and restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import kto
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train import fit
from fastrl.train.config import KTOConfig, PackingBlock
from fastrl.train.export import save_pretrained
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model
from fastrl.train.preference_rows import load_judged
from fastrl.train.supervised import Example
from fastrl.train.tiny import make_tiny_qwen3
from tests import oracle_preference as oracle
from tests.recipes.preference_runs import configured, first_rows, pair_rows, total_logprob, unpaired_rows, write_rows
from tests.recipes.runs import Base, after_call, assert_same_run, metrics_of, send_sigterm


def example(prompt: str, completion: str) -> Example:
    ids = tuple(map(int, prompt + completion))
    return Example(ids, (False,) * len(prompt) + (True,) * len(completion))


def test_every_prompt_gets_the_completion_of_the_row_before_it() -> None:
    rows = [example("11", "2"), example("3", "456"), example("3", "4"), example("77", "89")]
    mismatched = kto.mismatched_examples(rows, longest=4)
    # The third row passes over the second, which has the same prompt; the last completion of three is cut to two.
    assert mismatched == [example("11", "89"), example("3", "2"), example("3", "2"), example("77", "4")]
    assert kto.mismatched_examples(rows[:2], longest=4) == [example("11", "45"), example("3", "2")]
    assert kto.mismatched_examples(rows[1:3], longest=4) == []


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_first_loss_is_the_papers_with_the_baseline_of_the_step(base: Base, tmp_path: Path, loss_type: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", unpaired_rows())
    tokenizer = make_tokenizer()
    # An almost uniform reference: the policy is likelier on mismatched pairs too, so the baseline is not 0.
    other = make_tiny_qwen3(len(tokenizer), hidden_size=16, layers=1, context=64, eos_token_id=1, seed=9)
    other.model.embed_tokens.weight.data *= 2.0
    save_pretrained(other, tokenizer, tmp_path / "other", card="another")
    config = configured(
        KTOConfig,
        base,
        data,
        tmp_path / "run",
        max_steps=1,
        beta=0.3,
        loss_type=loss_type,
        desirable_weight=1.25,
        undesirable_weight=0.5,
        ref_model_name_or_path=str(tmp_path / "other"),
        packing=PackingBlock(token_budget=40),
    )
    assert kto.run(config) == 0
    (line,) = metrics_of(tmp_path / "run")
    policy, ref = (load_model(path, dtype=torch.float32, device="cpu") for path in (base.model, tmp_path / "other"))
    rows = first_rows(config, load_judged(str(data), tokenizer, config, output_dir=None).rows)
    baseline = 0.0
    if loss_type == "kto":
        mismatched = kto.mismatched_examples([row.example for row in rows], longest=64)
        baseline = sum(total_logprob(policy, each) - total_logprob(ref, each) for each in mismatched) / 8
        assert baseline > 0.1
    ratios = [total_logprob(policy, row.example) - total_logprob(ref, row.example) for row in rows]
    each = [oracle.kto(x, row.is_desirable, baseline, 0.3, 1.25, 0.5)[0] for x, row in zip(ratios, rows, strict=True)]
    assert line["loss"] == pytest.approx(sum(each) / 8, rel=1e-5)
    assert line["kl"] == pytest.approx(baseline, rel=1e-4)
    won = [0.3 * x for x, row in zip(ratios, rows, strict=True) if row.is_desirable]
    assert line["rewards/chosen"] == pytest.approx(sum(won) / len(won), rel=1e-4)


def test_the_margin_is_the_mean_of_the_chosen_less_the_mean_of_the_rejected(base: Base, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", unpaired_rows())
    many = PackingBlock(token_budget=40)
    config = configured(KTOConfig, base, data, tmp_path / "run", max_steps=3, learning_rate=1e-2, packing=many)
    assert kto.run(config) == 0
    for line in metrics_of(tmp_path / "run"):
        both = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(both, rel=1e-4, abs=1e-6)
    assert abs(both) > 1e-3


def test_a_pair_is_one_desirable_and_one_undesirable_completion(base: Base, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(3))
    config = configured(KTOConfig, base, data, tmp_path / "run")
    rows = load_judged(str(data), make_tokenizer(), config, output_dir=None).rows
    assert [row.is_desirable for row in rows] == [True, False] * 3
    assert make_tokenizer().decode(rows[0].example.ids) == "<|user|>10<|assistant|>1234567<|end|>"


@pytest.mark.parametrize("live", [False, True])
def test_a_stopped_run_resumes_bit_for_bit(
    base: Base, tmp_path: Path, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", unpaired_rows())
    changes: dict[str, Any] = {"max_steps": 6, "eval_dataset": str(data)}
    if live:
        changes |= {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 3}
    assert kto.run(configured(KTOConfig, base, data, tmp_path / "whole", **changes)) == 0
    config = configured(KTOConfig, base, data, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=4, do=send_sigterm)
        assert kto.run(config) == EXIT_INTERRUPTED
    assert kto.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)
    lines = metrics_of(tmp_path / "whole")
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert lines[-1]["eval/loss"] < 0.5
