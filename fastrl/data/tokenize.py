"""Token ids of prompts, completions and conversations, with the mask of what is trained.

Every mask is aligned with the ids, unshifted: entry i says whether predicting ids[i] is trained. Entry 0 is
always False, as nothing precedes the first token. Sampled text never comes here: a `Rollout` keeps its ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from fastrl.data.problems import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | str
Encoded = tuple[tuple[int, ...], tuple[bool, ...]]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_chat_template(path: str | Path) -> str:
    """The Jinja text of a file, for `tokenizer.chat_template`.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template must be a UTF-8 file with a Jinja template: {error}") from error


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    tools: Tools | None = None,
    place: str = "",
    cut: str = "",
) -> tuple[int, ...]:
    """What the model is fed before it answers.

    A string is tokenised as it is; messages go through the chat template, with the header that opens the
    assistant's turn. A tokenizer that begins its texts with BOS gets exactly one, whether or not the template
    writes it.

    Args:
        tools: JSON schemas, or the JSON text of a list of them; for messages only.
        place: source and row, for the error message (`rows.place(i)`).
        cut: a character that is left out, and over which no token reaches; "" is none.

    Raises:
        DataError: the template refuses the messages, no token comes out, or a second BOS is in the text.
        ValueError: messages for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        ids = _encoded(tokenizer, prompt, place, cut)
    else:
        ids = _encoded(tokenizer, _rendered(tokenizer, prompt, tools, True, place), place, cut)
    if not ids:
        raise _refused("empty prompt", place, "a prompt of at least one token", "none")
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, place: str = "") -> Encoded:
    """(ids, mask) of plain text: BOS as the tokenizer has it, EOS appended when absent, everything trained."""
    ids = _ended(tokenizer, _encoded(tokenizer, text, place))
    if len(ids) < 2:
        raise _refused("empty text", place, "a text of at least two tokens", str(len(ids)))
    return ids, (False, *[True] * (len(ids) - 1))


def encode_prompt_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    completion: str | Sequence[Message],
    *,
    tools: Tools | None = None,
    place: str = "",
) -> Encoded:
    """(ids, is_completion) of a prompt and its completion, both plain or both messages.

    The ids are those of the whole text, so that no token border depends on where the prompt ends in the file;
    they must begin with `render_prompt(prompt)`, what the model will be fed when it answers. Plain completions
    get an EOS when they do not end with one. Of a completion with tool messages, only assistant turns are True.

    Raises:
        DataError: the prompt's ids are not a prefix of the whole, or no completion token is left.
        ValueError: one is plain and the other messages, no EOS token, or no chat template.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{place or 'row'}: prompt and completion must both be strings or both be messages")
    prompt_ids = render_prompt(tokenizer, prompt, tools=tools, place=place)
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = _encoded(tokenizer, prompt + completion, place)
        cause = "the tokenizer merges the end of the prompt with the start of the completion; move white space there"
        _require_prefix(prompt_ids, ids, cause, place)
        if len(ids) == len(prompt_ids):
            raise _refused("empty completion", place, "a completion of at least one token", "none")
        ids = _ended(tokenizer, ids)
        return ids, _spans_mask(len(ids), [(len(prompt_ids), len(ids))])
    whole = [*prompt, *completion]
    ids = _encoded(tokenizer, _rendered(tokenizer, whole, tools, False, place), place)
    _require_prefix(prompt_ids, ids, _REWRITES, place)
    if all(_role(message) == "assistant" for message in completion):
        mask = _spans_mask(len(ids), [(len(prompt_ids), _end_of_turn(tokenizer, ids, len(prompt_ids), len(ids)))])
    else:
        _, assistant = encode_messages(tokenizer, whole, assistant_only=True, tools=tools, place=place)
        mask = tuple(i >= len(prompt_ids) and is_trained for i, is_trained in enumerate(assistant))
    if not any(mask):
        raise _refused("empty completion", place, "a completion of at least one token", "none")
    return ids, mask


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    assistant_only: bool = False,
    tools: Tools | None = None,
    place: str = "",
) -> Encoded:
    """(ids, mask) of a conversation; every token but the first is trained, or the assistant's turns alone.

    The assistant's tokens are those in the template's `{% generation %}` blocks. Without blocks, a turn is what
    rendering it adds to the conversation before it (its header excluded, its EOS included), provided that each
    rendering is a prefix of the whole.

    Raises:
        DataError: the template rewrites history, or marks no token as the assistant's.
        ValueError: no chat template; or `{% generation %}` blocks with a tokenizer that has no Rust backend.
    """
    ids = _encoded(tokenizer, _rendered(tokenizer, messages, tools, False, place), place)
    if not assistant_only:
        return ids, _spans_mask(len(ids), [(1, len(ids))])
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template(None, _tool_list(tools))):
        mask = _marked_by_template(tokenizer, messages, tools, ids, place)
    else:
        mask = _spans_mask(len(ids), _assistant_spans(tokenizer, messages, tools, ids, place))
    if not any(mask):
        raise _refused("no assistant turn", place, "assistant tokens to train on", "none")
    return ids, mask


_REWRITES = (
    "the chat template rewrites history: it renders earlier messages differently once later ones are there; "
    "give a template that does not, with {% generation %} blocks, as chat_template"
)


def _marked_by_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    ids: tuple[int, ...],
    place: str,
) -> tuple[bool, ...]:
    if not tokenizer.is_fast:
        raise ValueError("{% generation %} blocks need a fast tokenizer (one with tokenizer.json), got a slow one")
    marked = tokenizer.apply_chat_template(
        _without_nulls(messages),
        tools=_tool_list(tools),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]
    # A BOS that the template does not write was put before the ids.
    mask = (*[False] * (len(ids) - len(marked)), *map(bool, marked))
    assert len(mask) == len(ids), f"{place}: the template rendered twice gave two lengths"
    return (False, *mask[1:])


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    ids: tuple[int, ...],
    place: str,
) -> list[tuple[int, int]]:
    spans = []
    for i, message in enumerate(messages):
        if _role(message) != "assistant":
            continue
        if i == 0:
            expected = "a message before the first assistant turn, or a template with {% generation %} blocks"
            raise _refused("wrong role", place, expected, "an assistant turn first")
        before = _encoded(tokenizer, _rendered(tokenizer, messages[:i], tools, True, place), place)
        after = _encoded(tokenizer, _rendered(tokenizer, messages[: i + 1], tools, False, place), place)
        _require_prefix(before, after, _REWRITES, place)
        _require_prefix(after, ids, _REWRITES, place)
        spans.append((len(before), _end_of_turn(tokenizer, ids, len(before), len(after))))
    return spans


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], start: int, stop: int) -> int:
    """One past the last EOS in [start, stop), as the model samples nothing after it; `stop` when there is none."""
    for i in range(stop - 1, start - 1, -1):
        if ids[i] == tokenizer.eos_token_id:
            return i + 1
    return stop


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    add_generation_prompt: bool,
    place: str,
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template, which this tokenizer lacks: give a Jinja file as chat_template"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            _without_nulls(messages),
            tools=_tool_list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        expected = "messages that the chat template accepts"
        raise _refused("template error", place, expected, f"{type(error).__name__}: {error}") from error
    return text


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str, cut: str) -> list[int]:
    """The ids of `text` as it stands, cut before encoding at every `cut`, which is left out."""
    pieces = text.split(cut) if cut else [text]
    return [i for piece in pieces if piece for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, place: str, cut: str = "") -> tuple[int, ...]:
    """The ids of `text`, after one BOS where the tokenizer by itself begins texts with it."""
    ids = encode_pieces(tokenizer, text, cut)
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        return tuple(ids)
    if ids[:1] != [bos]:
        ids = [bos, *ids]
    # Where one token is both BOS and EOS, later ones are ends of turns.
    if bos != tokenizer.eos_token_id and ids.count(bos) > 1:
        raise _refused("second BOS", place, f"one {tokenizer.bos_token}, at the start", f"{ids.count(bos)}")
    return tuple(ids)


def _ended(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ValueError("plain completions end with EOS, which this tokenizer lacks: set its eos_token")
    return ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)


def _spans_mask(length: int, spans: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
    mask = [False] * length
    for start, stop in spans:
        mask[start:stop] = [True] * (stop - start)
    return tuple(mask)


def _require_prefix(prefix: tuple[int, ...], whole: tuple[int, ...], cause: str, place: str) -> None:
    if whole[: len(prefix)] != prefix:
        same = next(i for i, (a, b) in enumerate(zip(prefix, (*whole, None), strict=False)) if a != b)
        got = f"a difference at token {same}: {cause}"
        raise _refused("not a prefix", place, "the prompt's tokens at the start of the whole row's", got)


def _tool_list(tools: Tools | None) -> list[Any] | None:
    return _without_nulls(json.loads(tools) if isinstance(tools, str) else tools) or None


def _without_nulls(value: Any) -> Any:
    """Objects without their null members: a parquet struct has every key of its column in every row."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(member) for member in value]
    return value


def _role(message: str | Message) -> str:
    assert isinstance(message, Mapping)
    role: str = message["role"]
    return role


def _refused(kind: str, place: str, expected: str, got: str) -> DataError:
    return DataError([Problem(kind, "", expected, got, place)])
