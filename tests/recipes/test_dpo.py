"""The DPO recipe, whole: its loss from the model's own logits, its reference, its cost and its restarts."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import dpo
from fastrl.recipes.sorting import make_tokenizer
from fastrl.testing import gemm_flops
from fastrl.train import fit, from_config
from fastrl.train.config import DPOConfig, KernelsBlock, PackingBlock
from fastrl.train.export import save_pretrained
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import hidden_states, load_model, load_tokenizer
from fastrl.train.pairs import n_chosen_tokens, pack_pairs
from fastrl.train.preference_rows import load_pairs
from fastrl.train.tiny import make_tiny_qwen3
from tests import oracle_preference as oracle
from tests.recipes.preference_runs import configured, first_rows, pair_rows, total_logprob, write_rows
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    column,
    cut_power,
    metrics_of,
    send_sigterm,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference with weights of its own."""
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("other") / "model"
    model = make_tiny_qwen3(len(tokenizer), hidden_size=16, layers=1, context=64, eos_token_id=1, seed=5)
    save_pretrained(model, tokenizer, folder, card="another")
    return folder


def config_of(base: Base, data: Path, folder: Path, **changes: Any) -> DPOConfig:
    return configured(DPOConfig, base, data, folder, **changes)


def run(base: Base, data: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    assert dpo.run(config_of(base, data, folder, **changes)) == 0
    return metrics_of(folder)


LOSSES: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "sigmoid": ({}, oracle.sigmoid, False),
    "cdpo": ({"label_smoothing": 0.1}, lambda c, r, beta: oracle.sigmoid(c, r, beta, 0.1), False),
    "sigmoid_norm": ({"loss_type": ("sigmoid_norm",)}, oracle.sigmoid, True),
    "ipo": ({"loss_type": ("ipo",)}, oracle.ipo, True),
    "ipo, summed": ({"loss_type": ("ipo",), "length_averaged": False}, oracle.ipo, False),
    "robust": (
        {"loss_type": ("robust",), "label_smoothing": 0.1},
        lambda c, r, beta: oracle.robust(c, r, beta, 0.1),
        False,
    ),
    "exo_pair": (
        {"loss_type": ("exo_pair",), "label_smoothing": 1e-3},
        lambda c, r, beta: oracle.exo_pair(c, r, beta, 1e-3),
        False,
    ),
    "discopop": (
        {"loss_type": ("discopop",), "discopop_tau": 0.2},
        lambda c, r, b: oracle.discopop(c, r, b, 0.2),
        False,
    ),
    **{
        name: ({"loss_type": (name,)}, getattr(oracle, name), False)
        for name in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
    },
}


def test_every_loss_is_the_papers_of_the_models_own_log_probabilities(base: Base, data: Path, other: Path) -> None:
    config = config_of(base, data, Path("unused"), beta=0.3, ref_model_name_or_path=str(other))
    tokenizer = load_tokenizer(base.model, chat_template=None)
    pairs = load_pairs(str(data), tokenizer, config, output_dir=None).rows
    policy, reference = dpo.models_of(config, pairs)
    ref_model = load_model(other, dtype=torch.float32, device="cpu")
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    total = [total_logprob(policy, each) - total_logprob(ref_model, each) for each in examples]
    mean = [value / sum(each.is_trained) for value, each in zip(total, examples, strict=True)]
    batches = pack_pairs(pairs, token_budget=100, device=torch.device("cpu"))
    assert len(batches) > 1
    for name, (changes, formula, is_averaged) in LOSSES.items():
        changed = replace(config, **changes)
        loss = dpo.dpo_batch_loss(policy, changed, reference.logprob(examples), n_chosen_tokens=n_chosen_tokens(pairs))
        with torch.no_grad():
            got = sum(float(loss(batch).loss) for batch in batches)
        scores = mean if is_averaged else total
        each = [formula(scores[i], scores[i + 1], 0.3)[0] for i in range(0, len(scores), 2)]
        assert got == pytest.approx(sum(each) / len(each), rel=1e-5), name


def test_a_sum_of_losses_and_its_metrics_are_those_of_the_first_rows(
    base: Base, data: Path, other: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "loss_type": ("hinge", "sft"),
        "loss_weights": (0.5, 2.0),
        "ref_model_name_or_path": str(other),
        "max_steps": 1,
    }
    (line,) = run(base, data, tmp_path / "run", **changes)
    config = config_of(base, data, tmp_path, **changes)
    pairs = first_rows(config, load_pairs(str(data), make_tokenizer(), config, output_dir=None).rows)
    policy, ref = (load_model(path, dtype=torch.float32, device="cpu") for path in (base.model, other))
    chosen = [total_logprob(policy, pair.chosen) for pair in pairs]
    rejected = [total_logprob(policy, pair.rejected) for pair in pairs]
    won = [0.1 * (c - total_logprob(ref, pair.chosen)) for c, pair in zip(chosen, pairs, strict=True)]
    lost = [0.1 * (r - total_logprob(ref, pair.rejected)) for r, pair in zip(rejected, pairs, strict=True)]
    hinge = sum(max(0.0, 1 - (c - r)) for c, r in zip(won, lost, strict=True)) / 8
    expected = {
        "loss": 0.5 * hinge - 2.0 * sum(chosen) / n_chosen_tokens(pairs),
        "rewards/chosen": sum(won) / 8,
        "rewards/rejected": sum(lost) / 8,
        "rewards/margins": (sum(won) - sum(lost)) / 8,
        "rewards/accuracies": sum(c > r for c, r in zip(won, lost, strict=True)) / 8,
        "logps/chosen": sum(chosen) / 8,
        "logps/rejected": sum(rejected) / 8,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_first_step_starts_at_log_two_and_training_raises_the_margin(
    base: Base, data: Path, tmp_path: Path
) -> None:
    lines = run(base, data, tmp_path / "run", max_steps=8, eval_dataset=str(data))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["eval/rewards/margins"] > 0.1
    assert lines[-1]["eval/rewards/accuracies"] > 0.8


def test_packing_accumulation_and_the_kind_of_reference_change_no_curve(base: Base, data: Path, tmp_path: Path) -> None:
    whole = run(base, data, tmp_path / "whole")
    split = run(
        base,
        data,
        tmp_path / "split",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        packing=PackingBlock(token_budget=40),
        kernels=KernelsBlock(backend="torch", chunk_rows=3),
        max_length=20,
        precompute_ref_log_probs=False,
    )
    for name in ("loss", "grad_norm", "rewards/margins", "entropy"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=2e-3, abs=1e-5), name


def test_without_a_reference_the_log_probabilities_themselves_are_compared(
    base: Base, data: Path, tmp_path: Path
) -> None:
    line = run(base, data, tmp_path / "run", reference_free=True, max_steps=1)[0]
    assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-5)
    assert line["rewards/rejected"] == pytest.approx(0.1 * line["logps/rejected"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({}, 1),
        ({"ref_model_name_or_path": "other"}, 1),
        ({"precompute_ref_log_probs": False, "use_peft": True}, 1),
        ({"precompute_ref_log_probs": False}, 2),
    ],
    ids=["start", "another", "adapter", "live"],
)
def test_a_precomputed_reference_leaves_one_model_in_memory(
    base: Base,
    data: Path,
    other: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    models: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {key: str(other) if value == "other" else value for key, value in changes.items()}
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def loading(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert models > 1 or not any(each() is not None for each in loaded), "the first model must be gone by now"
        model = load_model(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    def count() -> None:
        gc.collect()
        alive.append(sum(each() is not None for each in loaded))

    monkeypatch.setattr(from_config, "load_model", loading)
    after_call(monkeypatch, fit, "update", number=1, do=count)
    run(base, data, tmp_path / "run", max_steps=1, **changes)
    assert alive == [models]


def test_the_head_costs_six_n_d_v_and_prompts_never_reach_it(base: Base, data: Path) -> None:
    config = config_of(base, data, Path("unused"))
    policy = make_tiny_qwen3(512, hidden_size=16, layers=1, context=64)
    pairs = load_pairs(str(data), make_tokenizer(), config, output_dir=None).rows[:6]
    (batch,) = pack_pairs(pairs, token_budget=8192, device=torch.device("cpu"))
    loss = dpo.dpo_batch_loss(policy, config, torch.zeros(12), n_chosen_tokens=n_chosen_tokens(pairs))
    whole = gemm_flops(lambda: loss(batch).loss.backward())
    backbone = gemm_flops(lambda: hidden_states(policy, batch).sum().backward())
    trained = sum(sum(example.is_trained) for pair in pairs for example in (pair.chosen, pair.rejected))
    assert whole - backbone == 6 * trained * 16 * 512


def test_a_moving_reference_follows_the_policy_when_it_is_due(base: Base, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"precompute_ref_log_probs": False, "ref_model_sync_steps": 2}
    moving = run(base, data, tmp_path / "tr", sync_ref_model=True, ref_model_mixup_alpha=1.0, **changes)
    still = run(base, data, tmp_path / "still", precompute_ref_log_probs=False)
    assert moving[1]["loss"] == still[1]["loss"]
    assert moving[2]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # after step 2 the reference is the policy
    assert still[2]["loss"] < 0.99 * math.log(2)


VARIANTS: dict[str, dict[str, Any]] = {
    "precomputed": {"eval_steps": 2},
    "tr_dpo": {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "lora": {"use_peft": True, "lora_r": 2, "precompute_ref_log_probs": False},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 7, "loss_type": ("ipo",)},
}


@pytest.mark.parametrize(("variant", "stop"), [*((name, send_sigterm) for name in VARIANTS), ("tr_dpo", cut_power)])
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(
    base: Base, data: Path, tmp_path: Path, variant: str, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 6, "save_steps": 3, "eval_dataset": str(data)} | VARIANTS[variant]
    assert dpo.run(config_of(base, data, tmp_path / "whole", **changes)) == 0
    config = config_of(base, data, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=5, do=stop)
        if stop is cut_power:
            with pytest.raises(PowerCutError):
                dpo.run(config)
        else:
            assert dpo.run(config) == EXIT_INTERRUPTED
    assert dpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


def test_a_reference_with_other_tokens_is_refused_before_weights_are_read(
    base: Base, data: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "ref")
    (tmp_path / "ref" / "config.json").write_text((other / "config.json").read_text())
    monkeypatch.setattr(from_config, "load_model", None)
    with pytest.raises(ValueError, match=r"another vocabulary .* '<new>' is 14 there and absent here"):
        run(base, data, tmp_path / "run", ref_model_name_or_path=str(tmp_path / "ref"))
    for file in (tmp_path / "ref").glob("*token*"):
        file.unlink()
    text = (other / "config.json").read_text().replace('"vocab_size": 14', '"vocab_size": 15')
    (tmp_path / "ref" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"has 15 tokens and that of .* has 14"):
        run(base, data, tmp_path / "again", ref_model_name_or_path=str(tmp_path / "ref"))


def test_a_dry_run_shows_what_is_learned(base: Base, data: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert dpo.dry_run(config_of(base, data, Path("unused"))) == 0
    printed = capsys.readouterr().out
    assert "24 pairs; two of them" in printed
    assert "'<|user|>10<|assistant|>'" in printed
    assert "'1234567<|end|>'" in printed
    assert not Path("unused").exists()


@pytest.mark.slow
def test_dpo_raises_the_margin_on_held_out_pairs(tmp_path: Path) -> None:
    """Median of 5 seeds, on the sorting task: sorted digits against digits of which two changed places."""
    from fastrl.recipes.tiny import made

    gains, accuracies = [], []
    for seed in range(5):
        config = DPOConfig(
            model_name_or_path=str(made("warm")),
            output_dir=str(tmp_path / str(seed)),
            train_dataset=str(made("preference")),
            eval_dataset=str(made("preference_held_out")),
            seed=seed,
            max_steps=60,
            per_device_train_batch_size=64,
            learning_rate=3e-4,
            eval_steps=1,
        )
        assert dpo.run(replace(config, report=replace(config.report, panel=False))) == 0
        lines = [line for line in metrics_of(tmp_path / str(seed)) if "eval/loss" in line]
        gains.append(lines[-1]["eval/rewards/margins"] - lines[0]["eval/rewards/margins"])
        accuracies.append(lines[-1]["eval/rewards/accuracies"])
    print(f"margin gained {sorted(gains)}, accuracy {sorted(accuracies)}")
    assert sorted(gains)[2] > 0.2
    assert sorted(accuracies)[2] > 0.85
