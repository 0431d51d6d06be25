"""The SFT recipe, whole: epochs, evaluation, options, rows it refuses and what its dry run shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.recipes import sft
from fastrl.train.config import DataBlock, KernelsBlock, PackingBlock
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.order import epoch_order
from fastrl.train.supervised import load_examples
from tests.recipes.runs import Base, column, learning_curve, metrics_of, sft_config, weights_of


def run(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    assert sft.run(sft_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def loss_by_hand(model: Any, base: Base, rows: list[int], **changes: Any) -> float:
    """Mean of -log p over the trained tokens of some rows, one row at a time."""
    config = sft_config(base, Path("unused"), **changes)
    tokenizer = load_tokenizer(base.model, chat_template=None)
    examples = load_examples(config.train_dataset, tokenizer, config, output_dir=None).rows
    losses = []
    with torch.no_grad():
        for row in rows:
            ids, is_trained = examples[row].ids, examples[row].is_trained
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if is_trained[t]]
    return sum(losses) / len(losses)


def ragged(base: Base, path: Path) -> Path:
    """Answers of one to seven digits instead of three."""
    rows = [json.loads(line) for line in base.files.sft.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["completion"][0]["content"] = "1234567"[: 1 + i % 7]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("changes", [{}, {"completion_only_loss": False}], ids=["completions", "everything"])
def test_the_first_loss_is_the_mean_over_trained_tokens_of_the_first_rows(
    base: Base, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"train_dataset": str(ragged(base, tmp_path / "ragged.jsonl")), **changes}
    (line,) = run(base, tmp_path / "run", max_steps=1, **changes)
    model = load_model(base.model, dtype=torch.float32, device="cpu")
    rows = list(epoch_order(40, 42, 0)[:8])
    assert line["loss"] == pytest.approx(loss_by_hand(model, base, rows, **changes), rel=1e-5)
    assert line["logps"] == pytest.approx(-line["loss"], rel=1e-5)


def test_accumulation_and_packing_change_no_curve(base: Base, tmp_path: Path) -> None:
    data = str(ragged(base, tmp_path / "ragged.jsonl"))
    whole = run(base, tmp_path / "whole", train_dataset=data)
    split = run(
        base,
        tmp_path / "split",
        train_dataset=data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        packing=PackingBlock(token_budget=20),
        kernels=KernelsBlock(backend="torch", chunk_rows=3),
    )
    for name in ("loss", "entropy", "grad_norm"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-3), name
    assert column(split, "num_tokens") == column(whole, "num_tokens")


def test_an_epoch_ends_with_a_short_batch_and_the_next_begins_with_another_order(base: Base, tmp_path: Path) -> None:
    lines = run(base, tmp_path / "one", max_steps=-1, per_device_train_batch_size=12)
    assert column(lines, "epoch") == [0.3, 0.6, 0.9, 1.0]
    per_row = lines[0]["num_tokens"] / 12
    assert column(lines, "num_tokens") == [12 * per_row, 24 * per_row, 36 * per_row, 40 * per_row]
    lines = run(base, tmp_path / "half", max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=24)
    assert column(lines, "epoch") == [0.6, 1.2, 1.5]
    assert epoch_order(40, 42, 0) != epoch_order(40, 42, 1)


def test_the_evaluation_is_the_loss_on_the_held_out_rows_and_comes_when_asked(base: Base, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(base.files.sft.read_text().splitlines(keepends=True)[:5]))
    options: dict[str, Any] = {"eval_dataset": str(held_out), "eval_steps": 2, "logging_steps": 3, "max_steps": 5}
    lines = run(base, tmp_path / "run", packing=PackingBlock(token_budget=16), **options)
    assert [(line["step"], "eval/loss" in line) for line in lines] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
        (5, False),
        (5, True),
    ]
    trained = load_model(tmp_path / "run" / "model", dtype=torch.float32, device="cpu")
    assert lines[-1]["eval/loss"] == pytest.approx(loss_by_hand(trained, base, list(range(5))), rel=1e-5)
    assert lines[-1]["eval/loss"] < lines[2]["eval/loss"]


def test_label_smoothing_raises_the_loss_of_the_same_model(base: Base, tmp_path: Path) -> None:
    plain = run(base, tmp_path / "plain", max_steps=1)[0]["loss"]
    smoothed = run(base, tmp_path / "smoothed", max_steps=1, label_smoothing=0.2)[0]["loss"]
    assert smoothed != plain
    assert abs(smoothed - plain) < 0.2 * plain


def test_dft_weighs_each_token_by_its_own_probability(base: Base, tmp_path: Path) -> None:
    data = str(ragged(base, tmp_path / "ragged.jsonl"))
    line = run(base, tmp_path / "dft", train_dataset=data, max_steps=1, loss_type="dft")[0]
    model = load_model(base.model, dtype=torch.float32, device="cpu")
    config = sft_config(base, tmp_path / "dft", train_dataset=data)
    examples = load_examples(data, load_tokenizer(base.model, chat_template=None), config, output_dir=None).rows
    losses = []
    for example in (examples[row] for row in epoch_order(40, 42, 0)[:8]):
        logp = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        taken = logp[:-1].gather(1, torch.tensor(example.ids[1:])[:, None])[:, 0]
        losses.append((-taken.detach().exp() * taken)[torch.tensor(example.is_trained[1:])])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    plain = run(base, tmp_path / "nll", train_dataset=data, max_steps=1)[0]
    assert plain["logps"] == line["logps"]
    assert line["loss"] < plain["loss"]


def test_training_learns_and_the_seed_decides_the_order(base: Base, tmp_path: Path) -> None:
    lines = run(base, tmp_path / "a", max_steps=12)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert weights_of(tmp_path / "a").keys() == load_file(base.model / "model.safetensors").keys()
    run(base, tmp_path / "b", max_steps=12, seed=1)
    assert learning_curve(tmp_path / "a") != learning_curve(tmp_path / "b")


def test_bad_rows_are_set_aside_and_the_run_goes_on(base: Base, tmp_path: Path) -> None:
    good = base.files.sft.read_text().splitlines()
    long = json.loads(good[0])
    long["completion"][0]["content"] = "1" * 40
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join([*good[:10], '{"prompt": 1}', json.dumps(long), *good[10:20]]) + "\n")
    changes: dict[str, Any] = {"train_dataset": str(data), "max_steps": 2, "max_length": 20}
    config = sft_config(base, tmp_path / "run", data=DataBlock(skip_bad_rows=True), **changes)
    assert sft.run(config) == 0
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [Path(each["place"]).name for each in rejected] == ["train.jsonl:11", "train.jsonl:12"]
    assert metrics_of(tmp_path / "run")[-1]["epoch"] == 16 / 20
    strict = replace(config, data=DataBlock(), output_dir=str(tmp_path / "strict"))
    with pytest.raises(ValueError, match=r"train\.jsonl:11"):
        sft.run(strict)
    only_long = replace(strict, data=DataBlock(max_rows=10), max_length=5)
    with pytest.raises(ValueError, match="10 problems"):
        sft.run(only_long)
    assert sft.run(replace(strict, data=DataBlock(max_rows=10))) == 0  # a refused start does not use the directory up


def test_long_rows_are_cut_when_asked_and_counted(base: Base, tmp_path: Path) -> None:
    data = str(ragged(base, tmp_path / "ragged.jsonl"))  # 8 prompt tokens, 1 to 7 digits and the end
    lines = run(base, tmp_path / "run", max_steps=1, train_dataset=data, max_length=11, truncate=True)
    cut = sum(8 + (1 + i % 7) + 1 > 11 for i in range(40))
    assert lines[0]["truncated_rows"] == cut


def test_only_the_assistants_turns_train_when_asked(base: Base, tmp_path: Path) -> None:
    rows = tmp_path / "chat.jsonl"
    turns = [("user", "12"), ("assistant", "3"), ("user", "4567"), ("assistant", "89")]
    rows.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    tokenizer = load_tokenizer(base.model, chat_template=None)
    for only, trained in ((True, 2 + 3), (False, 3 + 3 + 5 + 4 - 1)):  # digits and <|end|>; all but the first
        config = sft_config(base, tmp_path / "run", train_dataset=str(rows), assistant_only_loss=only)
        (example,) = load_examples(config.train_dataset, tokenizer, config, output_dir=None).rows
        assert sum(example.is_trained) == trained
    run(base, tmp_path / "run", train_dataset=str(rows), assistant_only_loss=True, max_steps=1)
    rows.write_text('{"text": "123400"}\n')
    with pytest.raises(ValueError, match="assistant_only_loss needs rows with messages"):
        run(base, tmp_path / "plain", train_dataset=str(rows), assistant_only_loss=True)


def test_metrics_are_finite_and_sum_up(base: Base, tmp_path: Path) -> None:
    lines = run(base, tmp_path / "run", warmup_steps=2)
    assert column(lines, "learning_rate") == pytest.approx([0.0, 0.005, 0.01, 0.005])
    names = """step time loss entropy logps grad_norm learning_rate skipped_step num_tokens epoch step_time
        tokens_per_second memory/peak_gib truncated_rows"""
    assert lines[0].keys() == set(names.split())
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_a_dry_run_shows_what_trains_and_takes_templates_for_text(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    config = sft_config(base, tmp_path / "run", data=DataBlock(max_rows=2))
    assert sft.dry_run(config) == 0
    printed = capsys.readouterr().out
    row = json.loads(base.files.sft.read_text().splitlines()[0])
    assert "2 rows; two of them" in printed
    assert f"'<|user|>{row['prompt'][0]['content']}<|assistant|>'" in printed
    assert f"'{row['completion'][0]['content']}<|end|>'" in printed
    assert list(tmp_path.iterdir()) == []
