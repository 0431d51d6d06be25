"""Tool calls in what a model wrote, read in the format that its chat template writes.

A tokenizer with a `response_template` parses its own answers. Otherwise the format is found in the template's text:

    hermes     <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Hermes, Qwen 2.5, Qwen 3
    xml        <tool_call><function=f><parameter=x>1</parameter></function></tool_call>     Qwen 3 Coder, Qwen 3.5
    llama      {"name": ..., "parameters": {...}}, alone in its turn              Llama 3.1, 3.2, 3.3
    mistral    [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]               Mistral
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_LLAMA_START = re.compile(r"(?:<\|python_tag\|>\s*)?(\{\s*\"(?:name|type)\".*)", re.DOTALL)
DEEPEST = 100  # lists and objects inside each other: what reads and writes messages later recurses
_SHOWN = 200  # characters of a broken call that its error repeats


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What a model said in one turn.

    Attributes:
        message: of the assistant, with `tool_calls` in OpenAI's form when there are any that can be made.
        errors: a sentence for each call that cannot be read; the model is shown it as the call's result.
    """

    message: dict[str, Any]
    errors: tuple[str, ...] = ()


class ToolCallError(ValueError):
    """A call that cannot be read."""


Schemas = Sequence[Mapping[str, Any]]
Parser = Callable[[Sequence[int], Sequence[int]], ParsedTurn]
_Format = Callable[[str, Schemas], tuple[str, list[tuple[str, Any]], list[str]]]


def turn_parser(tokenizer: PreTrainedTokenizerBase, schemas: Schemas | None) -> Parser:
    """Return `parse(ids of a turn, ids before it) -> ParsedTurn` for the tokenizer's chat template.

    Args:
        schemas: of the tools, as `transformers.utils.get_json_schema` makes them; XML arguments take their types.
            None has a turn be text.

    Raises:
        ValueError: no chat template, or one whose format is not known.
    """
    if schemas is None:
        return lambda ids, before: _turn(str(tokenizer.decode(list(ids), skip_special_tokens=True)), (), ())
    if getattr(tokenizer, "response_template", None) is not None:
        return lambda ids, before: _by_tokenizer(tokenizer, ids, before, schemas)
    read = _format_of(tokenizer)

    def parse(ids: Sequence[int], before: Sequence[int]) -> ParsedTurn:
        text = str(tokenizer.decode(_without_end(tokenizer, ids), skip_special_tokens=False))
        content, calls, errors = read(text, schemas)
        if not calls and not errors:
            content = str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return _turn(content, calls, errors)

    return parse


def _format_of(tokenizer: PreTrainedTokenizerBase) -> _Format:
    template = _template_text(tokenizer)
    if "<tool_call>" in template and "<arg_key>" not in template:  # GLM's are neither JSON nor these tags
        return _xml if "<function=" in template else _hermes
    if "[TOOL_CALLS]" in template:
        return _mistral
    if '"parameters": ' in template and '{"name": "' in template:
        return _llama
    raise ValueError(
        "the chat template writes tool calls in no known form (Hermes and Qwen <tool_call>, Llama 3 JSON, Mistral "
        "[TOOL_CALLS]); give the tokenizer a response_template, or another template as data.chat_template"
    )


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError("tools need a chat template, which this tokenizer lacks: give a Jinja file as chat_template")
    try:
        text: str = tokenizer.get_chat_template(None, [{"type": "function"}])
    except ValueError as error:
        raise ValueError(f"tools need a chat template: {error}") from error
    return text


def _by_tokenizer(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int], schemas: Schemas
) -> ParsedTurn:
    plain = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    try:
        message = tokenizer.parse_response(list(ids), prefix=list(before), tools=list(schemas))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return ParsedTurn({"role": "assistant", "content": plain}, (f"the tool call cannot be read: {error}",))
    content = str(message.get("content") or "").removesuffix(str(tokenizer.eos_token))
    calls, errors = [], []
    for each in message.get("tool_calls") or ():
        try:
            calls.append(_call(_bounded(each.get("function", each)), "arguments"))
        except (ToolCallError, AttributeError) as error:
            errors.append(str(error))
    turn = _turn(content, calls, errors)
    extra = {name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")}
    return ParsedTurn({**turn.message, **extra}, turn.errors)


def _turn(content: str, calls: Sequence[tuple[str, Any]], errors: Sequence[str]) -> ParsedTurn:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return ParsedTurn(message, tuple(errors))


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The ids without the special token that ended the turn: EOS, or another end of turn."""
    return list(ids[:-1] if ids and ids[-1] in tokenizer.all_special_ids else ids)


def _hermes(text: str, schemas: Schemas) -> tuple[str, list[tuple[str, Any]], list[str]]:
    return _tagged(text, lambda body: _call(_json(body), "arguments"))


def _xml(text: str, schemas: Schemas) -> tuple[str, list[tuple[str, Any]], list[str]]:
    return _tagged(text, lambda body: _xml_call(body, schemas))


def _tagged(text: str, read: Callable[[str], tuple[str, Any]]) -> tuple[str, list[tuple[str, Any]], list[str]]:
    calls, errors, left, end = [], [], "", 0
    for match in _TAGGED.finditer(text):
        left += text[end : match.start()]
        end = match.end()
        try:
            calls.append(read(match[1]))
        except ToolCallError as error:
            errors.append(str(error))
            left += match[0]  # what cannot be read stays what was said
    return (left + text[end:]).rstrip("\n") if calls else text, calls, errors


def _xml_call(body: str, schemas: Schemas) -> tuple[str, Any]:
    function = _FUNCTION.search(body)
    if function is None:
        raise ToolCallError(f"a tool call needs <function=name>...</function>, got {_shown(body)}")
    name = function[1].strip()
    types = {
        parameter: description.get("type")
        for schema in schemas
        if schema["function"]["name"] == name
        for parameter, description in schema["function"]["parameters"]["properties"].items()
    }
    return name, {
        parameter.strip(): _bounded(_typed(value, types.get(parameter.strip())))
        for parameter, value in _PARAMETER.findall(function[2])
    }


def _typed(value: str, kind: object) -> Any:
    """An XML argument: text where the schema says string, else the JSON it is, else text."""
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _llama(text: str, schemas: Schemas) -> tuple[str, list[tuple[str, Any]], list[str]]:
    match = _LLAMA_START.fullmatch(text.lstrip())
    if match is None:
        return text, [], []
    try:
        return "", [_call(_json(match[1]), "parameters")], []
    except ToolCallError as error:
        return text, [], [str(error)]


def _mistral(text: str, schemas: Schemas) -> tuple[str, list[tuple[str, Any]], list[str]]:
    content, mark, body = text.partition("[TOOL_CALLS]")
    if not mark:
        return text, [], []
    calls, errors = [], []
    try:
        found = _json(body)
    except ToolCallError as error:
        return text, [], [str(error)]
    for each in found if isinstance(found, list) else [found]:
        try:
            calls.append(_call(each, "arguments"))
        except ToolCallError as error:
            errors.append(str(error))
    return content, calls, errors


def _json(text: str) -> Any:
    try:
        return _bounded(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"a tool call must be JSON ({error}), got {_shown(text)}") from error


def _bounded(found: Any) -> Any:
    """What is at most DEEPEST deep, as it is."""
    level = [found]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return found
    raise ToolCallError(f"a tool call is at most {DEEPEST} deep")


def _call(found: Any, key: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments; a call without arguments may leave them out."""
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        raise ToolCallError(f'a tool call needs a "name" that is text, got {_shown(found)}')
    arguments = found.get(key)
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ToolCallError(f'the "{key}" of a tool call must be an object, got {_shown(arguments)}')
    return found["name"], dict(arguments or {})


def _shown(value: object) -> str:
    text = value.strip() if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
