"""Generation: one JSON line per completion, in order, from texts or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import generate
from fastrl.train.config import DataBlock, GenerateConfig
from tests.recipes.runs import Base


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
