"""The prm recipe, whole: losses by hand, the steps that train, aggregation, rewards, and the rows it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastrl.losses.reward_model import product, step_cross_entropy, weakest
from fastrl.recipes import prm
from fastrl.train import fit
from fastrl.train.config import DataBlock, PackingBlock, PRMConfig, ReportBlock
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_tokenizer
from fastrl.train.order import epoch_order
from fastrl.train.score_model import load_score_model
from fastrl.train.stepwise import Solution, StepReward, load_solutions, step_probabilities
from tests.recipes.runs import Base, after_call, assert_same_run, column, metrics_of, send_sigterm
from tests.recipes.test_reward import Row, rows_of, write

END = "<|end|>"


def config_of(base: Base, folder: Path, data: str, **changes: Any) -> PRMConfig:
    config = PRMConfig(
        model_name_or_path=str(base.model),
        output_dir=str(folder),
        train_dataset=data,
        step_separator=END,
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report=ReportBlock(panel=False),
    )
    return replace(config, **changes)


def run(config: PRMConfig) -> list[Row]:
    assert prm.run(config) == 0
    return metrics_of(Path(config.output_dir))


def ragged(n: int, *, seed: int = 0) -> list[Row]:
    """One to six steps."""
    rows = rows_of("steps", n, seed=seed)
    return [row | {name: row[name][: 1 + i % 6] for name in ("completions", "labels")} for i, row in enumerate(rows)]


def solutions_of(base: Base, config: PRMConfig, path: str) -> list[Solution]:
    tokenizer = load_tokenizer(base.model, chat_template=None)
    return load_solutions(path, tokenizer, config, context=None, output_dir=None)


def scores_of(model: Any, solution: Solution) -> Tensor:
    """[K] by transformers' own forward pass over every prefix that ends with a step."""
    with torch.no_grad():
        prefixes = [torch.tensor([solution.ids[: end + 1]]) for end in solution.ends]
        return torch.cat([model(input_ids=prefix).logits[:, 0] for prefix in prefixes])


@pytest.mark.parametrize("last_only", [False, True])
def test_the_first_loss_is_the_mean_over_the_steps_that_train(base: Base, tmp_path: Path, last_only: bool) -> None:
    data = write(tmp_path / "rows.jsonl", ragged(10))
    config = config_of(base, tmp_path / "run", data, max_steps=1, train_on_last_step_only=last_only)
    (line,) = run(config)
    solutions = solutions_of(base, config, data)
    model = load_score_model(base.model, dtype=torch.float32, device="cpu", new_head=1.0, seed=42)
    losses, right = [], []
    for i in list(epoch_order(10, 42, 0)[:6]):
        score, label = scores_of(model, solutions[i]), torch.tensor(solutions[i].is_right)
        trained = slice(-1, None) if last_only else slice(None)
        losses.append(step_cross_entropy(score, label)[trained])
        right.append(((score > 0) == label)[trained])
    assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert line["accuracy"] == pytest.approx(torch.cat(right).float().mean().item())


@pytest.mark.parametrize("aggregation", ["min", "product", "last"])
def test_held_out_solutions_are_judged_at_every_step(base: Base, tmp_path: Path, aggregation: str) -> None:
    data, held_out = write(tmp_path / "a.jsonl", ragged(8)), write(tmp_path / "b.jsonl", ragged(9, seed=1))
    config = config_of(
        base, tmp_path / "run", data, eval_dataset=held_out, aggregation=aggregation, train_on_last_step_only=True
    )
    line = run(config)[-1]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    solutions = solutions_of(base, config, held_out)
    scores, labels = [scores_of(theirs, each) for each in solutions], [each.is_right for each in solutions]
    right = [(score > 0) == torch.tensor(label) for score, label in zip(scores, labels, strict=True)]
    assert line["eval/accuracy"] == pytest.approx(torch.cat(right).float().mean().item())
    by_hand = {"min": min, "product": lambda p: torch.tensor(p).prod().item(), "last": lambda p: p[-1]}[aggregation]
    whole = [
        (by_hand(score.sigmoid().tolist()) > 0.5) == all(label) for score, label in zip(scores, labels, strict=True)
    ]
    assert line["eval/solution_accuracy"] == pytest.approx(sum(whole) / len(whole))


def test_packing_and_accumulation_change_no_curve(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ragged(12))
    whole = run(config_of(base, tmp_path / "whole", data, max_steps=4))
    small = {"packing": PackingBlock(token_budget=25), "max_length": 25}
    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    split = run(config_of(base, tmp_path / "split", data, max_steps=4, **small, **parts))
    for name in ("loss", "accuracy", "brier", "grad_norm"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-3, abs=1e-5), name


def test_a_run_stopped_after_a_step_resumes_bit_for_bit(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", ragged(14))
    changes: Row = {"max_steps": 5, "eval_dataset": data, "eval_steps": 2}
    run(config_of(base, tmp_path / "whole", data, **changes))
    config = config_of(base, tmp_path / "stopped", data, **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=3, do=send_sigterm)
        assert prm.run(config) == EXIT_INTERRUPTED
    run(replace(config, resume_from_checkpoint="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=5)


def test_a_reward_is_the_aggregate_of_the_steps_of_a_completion(base: Base, tmp_path: Path) -> None:
    rows = ragged(5)
    config = config_of(base, tmp_path / "run", write(tmp_path / "rows.jsonl", rows))
    model = load_score_model(base.model, dtype=torch.float32, device="cpu", new_head=1.0, seed=1)
    tokenizer = load_tokenizer(base.model, chat_template=None)
    solutions = solutions_of(base, config, config.train_dataset)
    probabilities = step_probabilities(model, solutions, token_budget=30, device=torch.device("cpu"))
    for probability, solution in zip(probabilities, solutions, strict=True):
        torch.testing.assert_close(probability, scores_of(model, solution).sigmoid(), rtol=1e-4, atol=1e-5)
    texts: Sequence[Any] = [END.join(step[0]["content"] for step in row["completions"]) for row in rows]
    for aggregate in (weakest, product):
        judge = StepReward(model, tokenizer, separator=END, aggregate=aggregate, token_budget=30)
        rewards = judge([*(row["prompt"] for row in rows), "12"], [*texts, f"{END} {END}"])
        assert rewards[:-1] == pytest.approx([aggregate(each).item() for each in probabilities], rel=1e-4)
        assert rewards[-1] == 0.0  # no step at all


GOOD: Row = {"prompt": "1", "completions": ["1", "2"], "labels": [True, False]}
TURN = [{"role": "assistant", "content": "1"}]
CHAT: Row = {"prompt": [{"role": "user", "content": "1"}], "completions": [TURN], "labels": [True]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"labels": [True, 1]}, "/labels/1: expected true or false, got int 1"),
        (GOOD | {"labels": [True]}, "/labels: expected one label per completion, 2, got 1 labels"),
        (GOOD | {"completions": ["1", ""]}, "/completions/1: expected text, got the string ''"),
        (GOOD | {"completions": [], "labels": []}, "/completions: expected a list that is not empty"),
        ({"prompt": "1", "labels": [True]}, "/completions: expected a column 'completions', got none"),
        (GOOD | {"completions": ["1", "2" * 30]}, "/completions: expected at most max_length = 20 tokens"),
        (CHAT | {"completions": [[*TURN, *TURN]]}, "/completions/0: expected a text, or one message of the assistant"),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_and_field(base: Base, tmp_path: Path, row: Row, message: str) -> None:
    good = CHAT if isinstance(row["prompt"], list) else GOOD
    data = write(tmp_path / "rows.jsonl", [good, row])
    config = config_of(base, tmp_path / "run", data, max_length=20)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{message}") as caught:
        prm.run(config)
    assert "\n" not in str(caught.value)
    assert run(replace(config, data=DataBlock(skip_bad_rows=True), max_steps=1))[0]["loss"] > 0


def test_a_dry_run_shows_every_step_with_its_label(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert prm.dry_run(config_of(base, tmp_path / "run", write(tmp_path / "rows.jsonl", [GOOD]))) == 0
    printed = capsys.readouterr().out
    assert "'11<|end|>'" in printed
    assert "'2<|end|>'" in printed
    assert "false" in printed
