"""Generation: one JSON line per completion, in order, from texts or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.check import check_rows
from fastrl.data.formats import PREFERENCE, PROMPT_COMPLETION, UNPAIRED
from fastrl.data.readers import read_rows
from fastrl.recipes import generate
from fastrl.train.config import DataBlock, GenerateConfig, RolloutBlock
from tests.recipes.runs import Base, PowerCutError, after_call, cut_power


def config(base: Base, **changes: Any) -> GenerateConfig:
    options: dict[str, Any] = {"model_name_or_path": str(base.model), "max_completion_length": 6, **changes}
    return GenerateConfig(**options)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_prompt_gets_its_completions_in_order(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.run(config(base, prompts=("12+34", "5"), num_generations=2)) == 0
    lines = lines_of(capsys.readouterr().out)
    assert [line["prompt"] for line in lines] == ["12+34", "12+34", "5", "5"]
    for line in lines:
        assert line.keys() == {"prompt", "completion", "finish_reason", "tokens", "mean_logprob"}
        assert line["mean_logprob"] < 0
        assert (line["finish_reason"] == "length") == (line["tokens"] == 6) or line["finish_reason"] == "stop"
    assert lines[0] != lines[1]


def test_a_file_of_conversations_to_a_file_is_the_same_for_the_same_seed(base: Base, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        chosen = config(base, prompt_file=str(base.files.held_out), output_file=str(output), seed=seed)
        assert generate.run(chosen) == 0
    first, second, third = (output.read_text() for output in outputs)
    assert first == second != third
    assert lines_of(first)[0]["prompt"] == json.loads(base.files.held_out.read_text().splitlines()[0])["prompt"]


def verified(base: Base, output: Path, **changes: Any) -> GenerateConfig:
    options = {"num_generations": 8, "prompt_file": str(base.files.held_out), "temperature": 3.0, **changes}
    return config(base, output_file=str(output), verify=(f"{__file__}:ends_even",), **options)


def ends_even(completions: list[Any], **_: Any) -> list[float | None]:
    """1 for an even last digit, 0 for an odd one, a failure for no digit."""
    digits = ["".join(filter(str.isdigit, each[-1]["content"])) for each in completions]
    return [float(int(text) % 2 == 0) if text else None for text in digits]


def test_what_passes_becomes_distinct_supervised_rows_with_their_origin(base: Base, tmp_path: Path) -> None:
    output = tmp_path / "sft.jsonl"
    assert generate.run(verified(base, output, max_completion_length=8)) == 0
    rows = lines_of(output.read_text())
    assert rows
    for row in rows:
        assert row.keys() == {"prompt", "completion", "reward"}
        assert row["reward"] == ends_even([row["completion"]])[0] == 1.0
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert check_rows(read_rows(str(output)), (PROMPT_COMPLETION,)).is_conversational
    origin = json.loads(Path(f"{output}.provenance.json").read_text())
    counts = origin["counts"]
    assert counts["rows"] == len(rows) <= counts["passed"] <= counts["judged"] <= counts["completions"]
    assert origin["contents"].keys() >= {str(base.files.held_out), str(base.model / "model.safetensors")}
    assert origin["config"]["seed"] == 42
    assert origin["environment"]["packages"]["torch"]


def test_pairs_and_labels_are_formats_the_next_stage_reads(base: Base, tmp_path: Path) -> None:
    pairs, labels = tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl"
    assert generate.run(verified(base, pairs, output_format="preference", max_per_prompt=1)) == 0
    assert generate.run(verified(base, labels, output_format="unpaired")) == 0
    check_rows(read_rows(str(pairs)), (PREFERENCE,))
    check_rows(read_rows(str(labels)), (UNPAIRED,))
    for row in lines_of(pairs.read_text()):
        assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0)
    prompts = [json.dumps(row["prompt"]) for row in lines_of(pairs.read_text())]
    assert len(set(prompts)) == len(prompts)
    assert {row["label"] for row in lines_of(labels.read_text())} == {True, False}


def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = RolloutBlock(batch_size=16)  # two prompts at a time
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed" / "out.jsonl"
    assert generate.run(verified(base, whole, rollout=rollout)) == 0
    with monkeypatch.context() as killing:
        after_call(killing, generate, "collect", number=3, do=cut_power)
        with pytest.raises(PowerCutError):
            generate.run(verified(base, killed, rollout=rollout))
    assert not killed.exists()
    partial = killed.with_name(".out.jsonl.partial")
    partial.write_text(partial.read_text() + '{"prompt": "half a li')
    with pytest.raises(ValueError, match="unfinished output of a run with other options"):
        generate.run(verified(base, killed, rollout=rollout, seed=7))
    calls: list[int] = []
    honest = generate.collect
    monkeypatch.setattr(generate, "collect", lambda s, p, o: (calls.append(o.start), honest(s, p, o))[1])
    assert generate.run(verified(base, killed, rollout=rollout)) == 0
    assert calls[0] == 4
    assert killed.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    with pytest.raises(ValueError, match="exists; remove it"):
        generate.run(verified(base, killed, rollout=rollout))


def test_chat_template_stop_strings_and_filters_reach_the_engine(
    base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    def completions(**changes: Any) -> list[str]:
        assert generate.run(config(base, prompts=("12+34",), num_generations=8, **changes)) == 0
        return [line["completion"] for line in lines_of(capsys.readouterr().out)]

    plain = completions()
    assert completions() == plain
    assert completions(data=DataBlock(apply_chat_template=True)) != plain
    assert len(set(completions(top_k=1))) == 1
    assert completions(min_p=1.0) == completions(top_k=1)
    assert completions(repetition_penalty=50.0) != plain
    stopped = completions(stop=("1", "2", "3", "4", "5", "6", "7", "8", "9", "0"))
    assert all(sum(character.isdigit() for character in text) <= 1 for text in stopped)
