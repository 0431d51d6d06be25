"""Tool calls as the families write them, and what is made of calls that are broken."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from fastrl.data.tool_calls import ParsedTurn, turn_parser
from tests.data.chat_tokenizers import HERMES, LLAMA, MISTRAL, XML, chat_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}


def parsed(template: str, text: str, *, eos: str = "<|im_end|>") -> ParsedTurn:
    tokenizer = chat_tokenizer(template, eos=eos)
    return turn_parser(tokenizer, [SCHEMA])(tokenizer(text, add_special_tokens=False)["input_ids"], [])


@pytest.mark.parametrize(
    ("template", "text", "eos"),
    [
        (
            HERMES,
            'so\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "2"}}\n</tool_call><|im_end|>',
            "<|im_end|>",
        ),
        (
            XML,
            "so\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
            "</function>\n</tool_call><|im_end|>",
            "<|im_end|>",
        ),
        (MISTRAL, 'so[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "2"}}]<|im_end|>', "<|im_end|>"),
        (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": "2"}}<|eot_id|>', "<|eot_id|>"),
    ],
    ids=["hermes", "xml", "mistral", "llama"],
)
def test_a_call_in_the_templates_own_format_is_read(template: str, text: str, eos: str) -> None:
    turn = parsed(template, text, eos=eos)
    content = "" if template == LLAMA else "so"
    assert turn == ParsedTurn({"role": "assistant", "content": content, "tool_calls": [CALL]})


@pytest.mark.parametrize(("template", "eos"), [(HERMES, "<|im_end|>"), (XML, "<|im_end|>"), (LLAMA, "<|eot_id|>")])
def test_what_the_template_renders_is_what_is_parsed(template: str, eos: str) -> None:
    tokenizer = chat_tokenizer(template, eos=eos)
    history = [{"role": "user", "content": "x"}]
    opened = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    whole = tokenizer.apply_chat_template([*history, message], tokenize=False)
    text = whole.removeprefix(opened).rstrip("\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert turn_parser(tokenizer, [SCHEMA])(ids, []).message["tool_calls"] == [CALL]


def test_an_answer_without_a_call_is_its_text_without_control_tokens() -> None:
    assert parsed(HERMES, "it is 3<|im_end|>") == ParsedTurn({"role": "assistant", "content": "it is 3"})
    assert parsed(LLAMA, "{3}<|eot_id|>", eos="<|eot_id|>") == ParsedTurn({"role": "assistant", "content": "{3}"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{bad", "must be JSON"),
        ("[]", 'needs a "name"'),
        ('{"name": 3}', 'needs a "name"'),
        ('{"name": "add", "arguments": [1]}', "must be an object"),
        ('{"name": "add", "arguments": "{"}', "must be JSON"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_a_broken_call_is_an_error_that_says_why_and_the_others_stay(body: str, says: str) -> None:
    good = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "2"}}</tool_call>'
    turn = parsed(HERMES, f"<tool_call>{body}</tool_call>{good}<|im_end|>")
    assert turn.message["tool_calls"] == [CALL]
    assert len(turn.errors) == 1
    assert says in turn.errors[0]
    assert len(turn.errors[0]) < 500


def test_arguments_may_be_left_out_or_be_json_text() -> None:
    turn = parsed(HERMES, '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b", "arguments": "{}"}</tool_call>')
    assert [call["function"] for call in turn.message["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]


def test_a_call_that_does_not_close_is_read_to_its_end() -> None:
    assert parsed(HERMES, '<tool_call>{"name": "add", "arg<|im_end|>').errors
    assert parsed(HERMES, '<tool_call>{"name": "add"}<|im_end|>').message["tool_calls"]


def test_a_tokenizers_own_response_template_comes_first() -> None:
    tokenizer = chat_tokenizer(HERMES)
    tokenizer.response_template = {"placeholder": True}
    seen: dict[str, Any] = {}

    def parse_response(ids: list[int], *, prefix: list[int], tools: list[Any]) -> dict[str, Any]:
        seen.update(ids=ids, prefix=prefix, tools=tools)
        return {
            "role": "assistant",
            "content": "so<|im_end|>",
            "thinking": "hm",
            "tool_calls": [CALL, {"function": {}}],
        }

    tokenizer.parse_response = parse_response
    turn = turn_parser(tokenizer, [SCHEMA])([5, 6], [7])
    assert seen == {"ids": [5, 6], "prefix": [7], "tools": [SCHEMA]}
    assert turn.message == {"role": "assistant", "content": "so", "tool_calls": [CALL], "thinking": "hm"}
    assert 'needs a "name"' in turn.errors[0]


def test_a_template_without_a_known_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no known form"):
        turn_parser(chat_tokenizer("{{ messages[0].content }}"), [SCHEMA])
    with pytest.raises(ValueError, match="need a chat template"):
        turn_parser(chat_tokenizer(None), [SCHEMA])


@pytest.mark.parametrize("n", [150, 900, 100_000])
@pytest.mark.parametrize(
    ("template", "frame"),
    [
        (HERMES, '<tool_call>{{"name": "add", "arguments": {{"a": {}}}}}</tool_call>'),
        (HERMES, '<tool_call>{{"name": {}}}</tool_call>'),
        (XML, "<tool_call><function=add><parameter=a>{}</parameter></function></tool_call>"),
        (MISTRAL, '[TOOL_CALLS][{{"name": "add", "arguments": {{"a": {}}}}}]'),
        (LLAMA, '{{"name": "add", "parameters": {{"a": {}}}}}'),
    ],
)
def test_a_call_nested_without_end_breaks_nothing(template: str, frame: str, n: int) -> None:
    turn = parsed(template, frame.format("[" * n + "]" * n))
    for call in turn.message.get("tool_calls", ()):  # too deep for JSON is text, where text is an argument
        assert isinstance(call["function"]["arguments"]["a"], str)
    assert turn.errors or template == XML
    json.dumps(turn.message)


def test_a_turn_of_blanks_is_read_in_time_proportional_to_its_length() -> None:
    started = time.perf_counter()
    assert parsed(LLAMA, " " * 100_000 + "x").errors == ()
    assert time.perf_counter() - started < 5
