"""The reward recipe, whole: losses by hand, lists, margins, calibration, adapters, and the rows it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastrl.data.pack import pack
from fastrl.losses.reward_model import bradley_terry, centering, expected_calibration_error
from fastrl.recipes import reward
from fastrl.recipes.tiny import MAKE_ROW
from fastrl.train import fit
from fastrl.train.config import DataBlock, PackingBlock, ReportBlock, RewardConfig
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_tokenizer
from fastrl.train.order import epoch_order
from fastrl.train.rankings import Ranking, encoded_at, load_rankings
from fastrl.train.score_model import load_score_model, scored_sequence
from tests.recipes.runs import Base, after_call, assert_same_run, column, metrics_of, send_sigterm

Row = dict[str, Any]


def rows_of(kind: str, n: int, *, seed: int = 0) -> list[Row]:
    generator = random.Random(seed)
    return [MAKE_ROW[kind](f"{generator.randrange(10**6):06d}", generator) for _ in range(n)]


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(base: Base, folder: Path, data: str, **changes: Any) -> RewardConfig:
    config = RewardConfig(
        model_name_or_path=str(base.model),
        output_dir=str(folder),
        train_dataset=data,
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report=ReportBlock(panel=False),
    )
    return replace(config, **changes)


def run(config: RewardConfig) -> list[Row]:
    assert reward.run(config) == 0
    return metrics_of(Path(config.output_dir))


def fresh(base: Base, *, seed: int = 42) -> Any:
    return load_score_model(base.model, dtype=torch.float32, device="cpu", new_head=1.0, seed=seed)


def rankings_of(base: Base, config: RewardConfig, path: str) -> list[Ranking]:
    tokenizer = load_tokenizer(base.model, chat_template=None)
    return load_rankings(path, tokenizer, config, context=None, output_dir=None)


def scores_of(model: Any, ranking: Ranking) -> Tensor:
    """[K] by transformers' own forward pass, one text at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids in ranking.ids])


def loss_by_hand(model: Any, rankings: Sequence[Ranking], *, coefficient: float = 0.0) -> float:
    total = 0.0
    for ranking in rankings:
        score = scores_of(model, ranking)
        chosen, rejected = (score[list(places)] for places in zip(*ranking.pairs, strict=True))
        per_pair = bradley_terry(chosen, rejected, margin=torch.tensor(ranking.margin))
        total += (per_pair + coefficient * centering(chosen, rejected)).mean().item() / len(rankings)
    return total


@pytest.mark.parametrize("kind", ["preference", "ranked"])
def test_the_first_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs(
    base: Base, tmp_path: Path, kind: str
) -> None:
    rows = rows_of(kind, 10)
    if kind == "preference":
        rows = [row | {"margin": 0.25 * i if i % 3 else None} for i, row in enumerate(rows)]
    else:
        rows[0]["completions"], rows[0]["scores"] = rows[0]["completions"][:2], [0, 1]  # lists of any length
    config = config_of(
        base, tmp_path / "run", write(tmp_path / "rows.jsonl", rows), max_steps=1, center_rewards_coefficient=0.1
    )
    (line,) = run(config)
    rankings = rankings_of(base, config, config.train_dataset)
    first = [rankings[i] for i in list(epoch_order(10, 42, 0)[:6])]
    assert line["loss"] == pytest.approx(loss_by_hand(fresh(base), first, coefficient=0.1), rel=1e-5)
    scores = [scores_of(fresh(base), ranking) for ranking in first]
    assert line["mean_reward"] == pytest.approx(torch.cat(scores).mean().item(), rel=1e-4)
    assert line["min_reward"] == pytest.approx(torch.stack([each.min() for each in scores]).mean().item(), rel=1e-4)
    assert line["max_reward"] == pytest.approx(torch.stack([each.max() for each in scores]).mean().item(), rel=1e-4)


def test_packing_and_accumulation_change_no_curve(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of("ranked", 12))
    whole = run(config_of(base, tmp_path / "whole", data, max_steps=4))
    split = run(
        config_of(
            base,
            tmp_path / "split",
            data,
            max_steps=4,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            packing=PackingBlock(token_budget=100),  # six answers of 15 tokens, of which four are one prompt's
            max_length=60,
        )
    )
    for name in ("loss", "accuracy", "margin", "brier", "mean_reward", "min_reward", "max_reward", "grad_norm"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-3, abs=1e-5), name


def test_the_lowest_and_highest_reward_are_those_of_each_prompt() -> None:
    rows = [Ranking(((1, 1), (1, 1, 1)), ((0, 1),)), Ranking(((1,),) * 3, ((2, 0), (2, 1)))]
    pairs = reward.pairs_of(rows, device=torch.device("cpu"))
    assert pairs.weight.tolist() == [0.5, 0.25, 0.25]
    sequences = [scored_sequence(ids, [1.0] * len(ids)) for row in rows for ids in row.ids]
    (batch,) = pack(sequences, token_budget=64)
    for sign in (1.0, -1.0):
        scores = sign * torch.tensor([2.0, 4.0, 3.0, 7.0, 8.0])
        here, chosen, rejected = reward.chosen_rejected(scores, batch, pairs)
        metrics = reward.reward_metrics(scores, chosen, rejected, batch, pairs)
        assert here.tolist() == [0, 1, 2]
        assert metrics["margin"].tolist() == [sign * -2, sign * 5, sign * 1]
        assert metrics["min_reward" if sign > 0 else "max_reward"].tolist() == [sign * 2, sign * 3]
        assert metrics["max_reward" if sign > 0 else "min_reward"].tolist() == [sign * 4, sign * 8]


def test_ranks_scores_and_shared_prompts_say_the_same_as_explicit_pairs(base: Base, tmp_path: Path) -> None:
    pairs = rows_of("preference", 8)
    explicit = write(tmp_path / "pairs.jsonl", pairs)
    shared = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in pairs]
    scored = [{"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]]} for row in pairs]
    others = {
        "implicit": shared,
        "scores": [row | {"scores": [-1, 0.5]} for row in scored],
        "ranks": [row | {"ranks": [2, 1]} for row in scored],
    }
    expected = column(run(config_of(base, tmp_path / "pairs", explicit)), "loss")
    for name, rows in others.items():
        data = write(tmp_path / f"{name}.jsonl", rows)
        assert column(run(config_of(base, tmp_path / name, data)), "loss") == pytest.approx(expected, rel=1e-5), name


def test_plain_text_is_scored_at_the_end_of_sequence(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "12", "chosen": "12", "rejected": "21"}])
    config = config_of(base, tmp_path / "run", data, max_steps=1)
    (ranking,) = rankings_of(base, config, data)
    end = load_tokenizer(base.model, chat_template=None).eos_token_id
    assert [ids[-1] for ids in ranking.ids] == [end, end]
    assert [len(ids) for ids in ranking.ids] == [5, 5]
    run(config)


def test_what_a_template_writes_after_the_answer_is_not_scored(base: Base) -> None:
    tokenizer = load_tokenizer(base.model, chat_template=None)
    prompt, answer = ([{"role": role, "content": "12"}] for role in ("user", "assistant"))
    expected = encoded_at(tokenizer, prompt, answer, path="/chosen")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>77")
    assert encoded_at(tokenizer, prompt, answer, path="/chosen") == expected
    assert expected[-1] == tokenizer.eos_token_id


def test_held_out_metrics_and_calibration_are_those_of_the_saved_model(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of("preference", 20))
    held_out = write(tmp_path / "held_out.jsonl", rows_of("preference", 9, seed=1))
    config = config_of(base, tmp_path / "run", data, eval_dataset=held_out)
    *_, evaluated, calibrated = run(config)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    rankings = rankings_of(base, config, held_out)
    margin = torch.stack([scores_of(theirs, ranking) @ torch.tensor([1.0, -1.0]) for ranking in rankings])
    assert evaluated["eval/loss"] == pytest.approx(loss_by_hand(theirs, rankings), rel=1e-4)
    assert evaluated["eval/accuracy"] == pytest.approx((margin > 0).float().mean().item())
    assert evaluated["eval/margin"] == pytest.approx(margin.mean().item(), rel=1e-3, abs=1e-5)
    assert evaluated["eval/brier"] == pytest.approx((1 - margin.sigmoid()).square().mean().item(), rel=1e-4)
    expected = expected_calibration_error(margin.abs().sigmoid(), margin > 0).item()
    assert calibrated["eval/expected_calibration_error"] == pytest.approx(expected, abs=1e-4)


def test_a_reward_model_goes_on_with_its_own_head(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of("preference", 12))
    run(config_of(base, tmp_path / "first", data, max_steps=1))
    path = tmp_path / "first" / "model"
    config = config_of(base, tmp_path / "second", data, max_steps=1, model_name_or_path=str(path))
    (line,) = run(config)
    rankings = rankings_of(base, config, data)
    first = [rankings[i] for i in list(epoch_order(12, 42, 0)[:6])]
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    assert line["loss"] == pytest.approx(loss_by_hand(theirs, first), rel=1e-4)


def test_an_adapter_and_the_head_train_while_the_base_stays(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of("preference", 12))
    config = config_of(base, tmp_path / "run", data, use_peft=True, lora_r=4, lora_alpha=8, max_steps=6)
    lines = run(config)
    assert lines[0]["loss"] == pytest.approx(run(config_of(base, tmp_path / "full", data))[0]["loss"], rel=1e-5)
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors")
    trained = {name.removeprefix("master.") for name in saved if name.startswith("master.")}
    assert "score.weight" in trained
    assert all(name == "score.weight" or ".lora_" in name for name in trained)
    merged, before = (
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
        load_file(base.model / "model.safetensors"),
    )
    assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], before[name])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(theirs.score.weight, saved["master.score.weight"])


@pytest.mark.parametrize("kind", ["preference", "ranked"])
def test_a_run_stopped_after_a_step_resumes_bit_for_bit(
    base: Base, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of(kind, 14))
    changes: Row = {"max_steps": 5, "eval_dataset": data, "eval_steps": 2, "center_rewards_coefficient": 0.01}
    run(config_of(base, tmp_path / "whole", data, **changes))
    config = config_of(base, tmp_path / "stopped", data, **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=3, do=send_sigterm)
        assert reward.run(config) == EXIT_INTERRUPTED
    assert not (tmp_path / "stopped" / "model").exists()
    run(replace(config, resume_from_checkpoint="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=5)
    log = (tmp_path / "stopped" / "metrics.jsonl").read_text()
    run(replace(config, resume_from_checkpoint="auto"))
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == len(log.splitlines())


PAIR: Row = {"prompt": "1", "chosen": "12", "rejected": "21"}
LIST: Row = {"prompt": "1", "completions": ["12", "21"], "scores": [1, 0]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"rejected": "12"}, "/rejected: expected something else than chosen, got the same"),
        (PAIR | {"chosen": "1a", "rejected": "1b"}, "/rejected: expected another text than /chosen, got the same"),
        (PAIR | {"chosen": ""}, "/chosen: expected text, got the string ''"),
        ({"prompt": "1", "chosen": "12"}, "/rejected: expected a column 'rejected', got none"),
        (PAIR | {"margin": "big"}, "/margin: expected a finite number, got the string 'big'"),
        (PAIR | {"rejected": "2" * 30}, r"/rejected: expected at most max_length = 20 tokens \(raise it\), got 32"),
        (LIST | {"scores": [1, 0, 2]}, "/scores: expected one score per completion, 2, got 3 scores"),
        (LIST | {"scores": [1, 1]}, "/scores: expected completions of which one is better, got 2 alike"),
        (LIST | {"scores": ["a", 1]}, "/scores/0: expected a finite number, got the string 'a'"),
        (
            LIST | {"completions": ["12", "12"]},
            "/completions/1: expected another text than /completions/0, got the same",
        ),
        (LIST | {"margin": 1.0}, "/margin: expected no margin beside a list"),
        (
            LIST | {"completions": ["1" * 15] * 3 + ["2"], "scores": [0, 0, 0, 1]},
            "/completions: expected at most packing",
        ),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_and_field(base: Base, tmp_path: Path, row: Row, message: str) -> None:
    good = LIST if "completions" in row else PAIR
    data = write(tmp_path / "rows.jsonl", [good, row])
    config = config_of(base, tmp_path / "run", data, max_length=20, packing=PackingBlock(token_budget=50))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{message}") as caught:
        reward.run(config)
    assert "\n" not in str(caught.value)
    lenient = replace(config, data=DataBlock(skip_bad_rows=True), max_steps=1)
    assert run(lenient)[0]["loss"] > 0
    assert len((tmp_path / "run" / "rejected.jsonl").read_text().splitlines()) == 1


def test_rows_longer_than_the_models_context_are_refused(base: Base, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [PAIR | {"rejected": "2" * 63}])
    with pytest.raises(ValueError, match=r"/rejected: expected at most the 64 tokens of the model's context, got 65"):
        reward.run(config_of(base, tmp_path / "run", data))


def test_a_dry_run_shows_the_first_pair_of_two_prompts(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [PAIR, PAIR | {"prompt": "3"}]
    assert reward.dry_run(config_of(base, tmp_path / "run", write(tmp_path / "rows.jsonl", rows))) == 0
    printed = capsys.readouterr().out
    assert "2 prompts; two of them" in printed
    assert "'112<|end|>'" in printed
    assert "'121<|end|>'" in printed
    assert "4 / 4" in printed
