"""The constitutional loop with a model and with an endpoint as critic: pairs, their origin, and what failures cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.check import check_rows
from fastrl.data.formats import PREFERENCE
from fastrl.data.readers import read_rows
from fastrl.recipes import rlaif
from fastrl.train.config import DataBlock, RLAIFConfig, RolloutBlock
from fastrl.train.guards import NoVerdictError
from fastrl.train.partial_file import PartialFile
from fastrl.train.validate import problems
from tests.recipes.runs import Base
from tests.rewards.judge_server import Reply, answers_of, says, serving, verdict


def config(base: Base, output: Path, **changes: Any) -> RLAIFConfig:
    options: dict[str, Any] = {
        "model_name_or_path": str(base.model),
        "prompt_file": str(base.files.prompts),
        "output_file": str(output),
        "principles": ("The digits must be in order.", "The answer must be short."),
        "critique_template": "{prompt}{response}",
        "revision_template": "{prompt}{response}{critique}",
        "verdict_template": "{prompt}{response}",
        "verdicts": ("1", "0"),
        "num_generations": 2,
        "max_completion_length": 8,
        "max_critique_length": 8,
        "temperature": 3.0,
        "data": DataBlock(max_rows=64),
        "rollout": RolloutBlock(batch_size=16),
    }
    return RLAIFConfig(**(options | changes))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_labels_and_revises_and_the_rows_are_preferences(base: Base, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert problems(config(base, first)) == []
    assert rlaif.run(config(base, first)) == 0
    assert rlaif.run(config(base, second)) == 0
    assert first.read_text() == second.read_text()
    check_rows(read_rows(str(first)), (PREFERENCE,))
    rows = rows_of(first)
    for row in rows:
        assert 0 <= row["rejected_score"] < row["chosen_score"] <= 1
        assert row["chosen"] != row["rejected"]
        assert row["principle"] in config(base, first).principles
        assert row["chosen_is_revision"] == (row["critique"] is not None)
    origin = json.loads(Path(f"{first}.provenance.json").read_text())
    counts = origin["counts"]
    assert counts["rows"] == len(rows)
    assert (counts["prompts"], counts["completions"]) == (64, 128 + counts["revisions"])
    assert {each["text"] for each in origin["principles"]} == set(config(base, first).principles)
    assert str(base.files.prompts) in origin["contents"]


def test_a_killed_run_goes_on_to_the_same_rows(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert rlaif.run(config(base, whole)) == 0
    marks = []
    mark = PartialFile.mark

    def dies_at_the_second(self: PartialFile, *args: Any) -> None:
        marks.append(args)
        if len(marks) == 2:
            raise KeyboardInterrupt
        mark(self, *args)

    monkeypatch.setattr(PartialFile, "mark", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rlaif.run(config(base, killed))
    monkeypatch.setattr(PartialFile, "mark", mark)
    assert rlaif.run(config(base, killed)) == 0
    assert killed.read_text() == whole.read_text()


def judge_file(folder: Path, base_url: str, **options: Any) -> str:
    content = {"base_url": base_url, "model": "m", "ledger": str(folder / "judge.sqlite"), "scale": [0, 10], **options}
    path = folder / "judge.yaml"
    path.write_text(json.dumps({"backoff": 0.01, "max_retries": 1} | content))
    return str(path)


def endpoint_config(base: Base, output: Path, judge: str, **changes: Any) -> RLAIFConfig:
    options = {
        "critique_template": "CRITIQUE {prompt} {response} {principle}",
        "revision_template": "REVISE {prompt} {response} {critique}",
        "critic_judge": judge,
    }
    return config(base, output, **(options | changes))


def constitutional(request: dict[str, Any]) -> Reply:
    """An endpoint that criticises, sorts, and scores sorted answers 9 and others 2."""
    last = request["messages"][-1]["content"]
    if last.startswith("CRITIQUE"):
        return says("not in order")
    if last.startswith("REVISE"):
        return says("".join(sorted(last.split()[1])))
    question, answer = answers_of(request)
    digits = "".join(filter(str.isdigit, question))
    return verdict(request, scores={"score": 9 if answer == "".join(sorted(digits)) else 2})


@pytest.mark.parametrize("labels", ["critic", "revision"])
def test_an_endpoint_criticises_revises_and_labels(base: Base, tmp_path: Path, labels: str) -> None:
    pytest.importorskip("openai")
    output = tmp_path / "pairs.jsonl"
    with serving(constitutional) as served:
        chosen = endpoint_config(base, output, judge_file(tmp_path, served.base_url), labels=labels)
        assert problems(chosen) == []
        assert rlaif.run(chosen) == 0
    rows = rows_of(output)
    assert rows
    for row in rows:
        question = row["prompt"][-1]["content"]
        assert row["chosen"][0]["content"] == "".join(sorted(question)) != row["rejected"][0]["content"]
        if labels == "critic":
            assert (row["chosen_score"], row["rejected_score"]) == (0.9, 0.2)
        else:
            assert (row["chosen_score"], row["critique"]) == (None, "not in order")


def test_an_endpoint_that_is_down_ends_the_run_with_its_reason(base: Base, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with serving(lambda _: Reply(b"{}", 404)) as served:
        chosen = endpoint_config(base, tmp_path / "pairs.jsonl", judge_file(tmp_path, served.base_url))
        with pytest.raises(NoVerdictError, match=r"scored no answer of 3 batches in a row: .*status 404"):
            rlaif.run(chosen)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"principles": ()}, "principles: give either"),
        ({"principles_file": "x.yaml"}, "principles: give either"),
        ({"verdicts": ("1",)}, "verdicts: must be two"),
        ({"revisions": 0, "labels": "revision"}, "labels: revision needs"),
        ({"revisions": 0, "num_generations": 1}, "num_generations: with revisions 0"),
        ({"labels": "revision", "min_margin": 0.5}, "min_margin: has no effect"),
        ({"critique_template": "{answer}"}, "critique_template: may hold"),
        ({"verdict_template": "good?"}, "verdict_template: does not show the answer"),
        ({"critic_judge": "no.yaml"}, "critic_judge: the judge file no.yaml does not exist"),
        ({"critic_model_name_or_path": "no/such"}, "critic_model_name_or_path: no/such is not a directory"),
    ],
)
def test_wrong_options_are_one_sentence(base: Base, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert any(problem.startswith(sentence) for problem in problems(config(base, tmp_path / "a.jsonl", **changes)))
