"""The agents' tasks: a template that keeps history, true rows, answers that only tools can find."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.observation import check_keeps_history, observer
from fastrl.data.tokenize import encode_prompt_completion, render_prompt
from fastrl.data.tool_calls import turn_parser
from fastrl.recipes import agent_tasks, tiny
from fastrl.recipes.tiny import made, with_tiny
from fastrl.rollout.tools import Search, calculator
from fastrl.train.config import EnvironmentBlock, GRPOConfig
from fastrl.train.environment_spec import schemas_of
from fastrl.train.validate import problems

SCHEMAS = schemas_of([calculator])
SUM = [{"role": "user", "content": "37 times 52 plus 418"}]
CALL = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "37*52+418"}}}
        ],
    },
    {"role": "tool", "name": "calculator", "content": "2342"},
]
ANSWER = [{"role": "assistant", "content": "2342"}]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in made(name).read_text().splitlines()]


def calls_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The argument of each call of a row, and its result."""
    turns = row["completion"]
    arguments = [turn["tool_calls"][0]["function"]["arguments"] for turn in turns if turn.get("tool_calls")]
    results = [turn["content"] for turn in turns if turn["role"] == "tool"]
    return [(next(iter(each.values())), result) for each, result in zip(arguments, results, strict=True)]


def test_any_printable_text_comes_back() -> None:
    tokenizer = agent_tasks.make_tokenizer()
    for text in ("".join(agent_tasks.CHARACTERS), "{'error': \"division by zero\"}", "Kalo was born in Rezu.\n12*34"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_episode_is_a_hermes_call_its_result_and_the_answer() -> None:
    tokenizer = agent_tasks.make_tokenizer()
    text = tokenizer.apply_chat_template([*SUM, *CALL, *ANSWER], tools=SCHEMAS, tokenize=False)
    assert text == (
        "<|tools|>calculator(expression)<|user|>37 times 52 plus 418<|assistant|>"
        '<tool_call>{"name": "calculator", "arguments": {"expression": "37*52+418"}}</tool_call><|end|>'
        "<|tool|>2342<|assistant|>2342<|end|>"
    )
    assert len(tokenizer(text)["input_ids"]) == 45


def test_the_parser_of_the_template_reads_the_call() -> None:
    tokenizer = agent_tasks.make_tokenizer()
    ids, _ = encode_prompt_completion(tokenizer, SUM, CALL[:1], tools=SCHEMAS)
    prompt = render_prompt(tokenizer, SUM, tools=SCHEMAS)
    turn = turn_parser(tokenizer, SCHEMAS)(ids[len(prompt) :], prompt)
    assert turn.message == CALL[0]
    assert turn.errors == ()


def test_each_rendering_is_a_prefix_of_the_next_and_an_observation_is_what_lies_between() -> None:
    tokenizer = agent_tasks.make_tokenizer()
    check_keeps_history(tokenizer)
    prompt = render_prompt(tokenizer, SUM, tools=SCHEMAS)
    called, _ = encode_prompt_completion(tokenizer, SUM, CALL[:1], tools=SCHEMAS)
    whole, is_trained = encode_prompt_completion(tokenizer, SUM, [*CALL, *ANSWER], tools=SCHEMAS)
    observation = observer(tokenizer)(CALL[1:], True)
    assert called[: len(prompt)] == prompt
    assert whole[: len(called) + len(observation)] == called + observation
    trained = tokenizer.decode([i for i, is_on in zip(whole, is_trained, strict=True) if is_on])
    assert trained == (
        '<tool_call>{"name": "calculator", "arguments": {"expression": "37*52+418"}}</tool_call><|end|>2342<|end|>'
    )


def test_the_warm_start_calls_in_two_rows_of_five_and_few_calls_are_right() -> None:
    rows = rows_of("calculator_sft")
    calling = [row for row in rows if len(row["completion"]) == 3]
    right = 0
    for row in calling:
        ((expression, result),) = calls_of(row)
        assert calculator(expression) == result == row["completion"][-1]["content"]
        wanted = agent_tasks._in_words(expression)
        right += row["prompt"][0]["content"] == wanted
    assert len(calling) / len(rows) == pytest.approx(0.4, abs=0.02)
    assert right / len(calling) == pytest.approx(0.15, abs=0.02)
    assert sum("tools" not in row for row in rows) / len(rows) == pytest.approx(0.2, abs=0.02)


def test_a_slip_is_one_other_digit() -> None:
    generator = random.Random(0)
    for _ in range(100):
        slipped = agent_tasks._with_slip("37*52+418", generator)
        assert sum(a != b for a, b in zip(slipped, "37*52+418", strict=True)) == 1
        calculator(slipped)


@pytest.mark.parametrize("part", ["", "_held_out"])
def test_two_searches_find_the_answer_of_every_question(part: str) -> None:
    search = Search(str(made(f"lookup_corpus{part}")), top_k=1).search
    rows = rows_of(f"lookup{part}")
    for row in rows[:: max(1, len(rows) // 250)]:
        person = row["prompt"][0]["content"].split(" where ")[1].split(" was ")[0]
        country = search(person).removesuffix(".").split(" in ")[1]
        assert search(f"capital of {country}") == f"The capital of {country} is {row['answer']}."
        assert row["answer"] not in search(person)


def test_what_the_training_corpus_says_is_of_no_use_on_held_out_questions() -> None:
    train, held_out = agent_tasks.world(tiny.N_TRAIN, tiny.N_HELD_OUT)

    def names(facts: agent_tasks.World) -> set[str]:
        return {*facts.birthplace, *facts.capital, *facts.capital.values()}

    assert not names(train) & names(held_out)
    assert [len({*facts.capital.values()}) for facts in (train, held_out)] == [200, 40]
    answers = [row["answer"] for row in rows_of("lookup_held_out")]
    assert max(map(answers.count, answers)) / len(answers) < 0.1  # a guess stays a guess


def test_the_warm_start_of_lookups_says_what_it_read_last() -> None:
    rows = [row for row in rows_of("lookup_sft") if len(row["completion"]) > 1]
    right = 0
    for row in rows:
        (person, born), (query, capital) = calls_of(row)
        assert person in born
        assert capital.endswith(f" is {row['completion'][-1]['content']}.")
        asked = row["prompt"][0]["content"].split(" where ")[1].split(" was ")[0]
        right += person == asked and born.endswith(f" {query.removeprefix('capital of ')}.")
    assert right / len(rows) == pytest.approx(0.2, abs=0.03)


def test_a_configuration_names_a_corpus_made_on_the_spot_and_a_wrong_name_is_said() -> None:
    def config(corpus: str) -> GRPOConfig:
        return GRPOConfig(
            model_name_or_path="tiny:agent",
            train_dataset="tiny:lookup",
            output_dir="run",
            reward_funcs=("exact_match",),
            environment=EnvironmentBlock(tools=(f"search(corpus='tiny:{corpus}', top_k=1)",)),
        )

    assert problems(config("lookup_corpus")) == []
    (tool,) = with_tiny(config("lookup_corpus")).environment.tools
    assert tool == f"search(corpus='{made('lookup_corpus')}', top_k=1)"
    (wrong,) = problems(config("lookup_corpse"))
    assert wrong.startswith("environment.tools: tiny:lookup_corpse is not known")
    assert "did you mean tiny:lookup_corpus?" in wrong
