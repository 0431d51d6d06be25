"""What a chat template puts between two turns of the model, in tokens: history is never rendered or encoded again.

    observation = render(dummy + tool messages, generation prompt) without render(dummy) up to its end of turn

Text of a tool that looks like a control token (`<|im_end|>`) stays text: it is cut inside the look-alike before it is
encoded, so that no tool can end a turn or speak as somebody else.
Source: the difference of two renderings with a dummy history is TRL's (`GRPOTrainer._get_tool_suffix_ids`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastrl.data.tokenize import Message, Tools, encode_pieces, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Observe = Callable[[Sequence[Message], bool], tuple[int, ...]]

RECENT = 64  # observations kept: neighbours are of one group, and often hear the same
LONGEST_KEPT = 2**16  # characters of one that is kept
_MARK = "\ue000"  # private use: it has no meaning that a tool's text could need


def observer(tokenizer: PreTrainedTokenizerBase, *, has_tools: bool = True) -> Observe:
    """Return `observe(messages, is_ended) -> ids`, what follows a turn of the model before its next turn.

    The messages are tools' results, or somebody else's answer to a turn without calls. `is_ended` says whether the turn
    closed with a control token; one that a stop string ended gets the template's end of turn first.

    Args:
        has_tools: whether tools' results are among what may follow; the template is then checked for them.

    Raises:
        ValueError: a template that cannot render a tool's result, or rewrites history once one is there.
    """
    if has_tools:
        check_keeps_history(tokenizer)
    defused = _defuser(tokenizer)

    @lru_cache(maxsize=RECENT)
    def encoded(written: str, is_ended: bool) -> tuple[int, ...]:
        messages = json.loads(written)
        # The name of a tool that does not exist is the model's own text.
        cut = [{**each, **{key: defused(each[key]) for key in ("name", "content") if key in each}} for each in messages]
        if cut[0]["role"] != "tool":
            text, end = _after_answer(tokenizer, cut)
            return tuple(encode_pieces(tokenizer, text.removeprefix(end) if is_ended else text, _MARK))
        history = _dummy(cut)
        before, end = _before(tokenizer, history)
        text = _rendered(tokenizer, [*history, *cut], True)
        assert text.startswith(before), "the template was checked"
        start = len(before) if is_ended else len(before) - len(end)
        return tuple(encode_pieces(tokenizer, text[start:], _MARK))

    def observe(messages: Sequence[Message], is_ended: bool) -> tuple[int, ...]:
        written = json.dumps(messages)
        encode = encoded if len(written) <= LONGEST_KEPT else encoded.__wrapped__
        return encode(written, is_ended)

    return observe


def opened_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], observation: str, tools: Tools | None
) -> tuple[int, ...]:
    """Ids of a prompt whose last message goes on with what an environment's `reset` said, its look-alikes cut.

    Raises:
        DataError: as `render_prompt`.
    """
    cut = _defuser(tokenizer)(observation)
    return render_prompt(tokenizer, with_observation(messages, cut), tools=tools, cut=_MARK)


def with_observation(messages: Sequence[Message], observation: str) -> list[dict[str, Any]]:
    """The messages, the last of which goes on with `observation`."""
    last = dict(messages[-1])
    return [*map(dict, messages[:-1]), {**last, "content": f"{last.get('content') or ''}{observation}"}]


def check_keeps_history(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template with which a conversation's tokens could not be appended to.

    Raises:
        ValueError: it has no place for a tool's result, or rewrites the turn before it.
    """
    result = {"role": "tool", "name": "tool", "content": "result"}
    history = _dummy([result])
    before, _ = _before(tokenizer, history)
    whole = _rendered(tokenizer, [*history, result], True)
    if "result" not in whole[len(before) :]:
        raise ValueError(
            "the chat template leaves out the results of tools; give one that writes messages of the role tool as "
            "data.chat_template"
        )
    if not whole.startswith(before):
        raise ValueError(
            "the chat template rewrites an assistant's turn once a tool's result follows it, so that what was "
            "sampled would not be what is trained; give one that keeps history as data.chat_template"
        )


def _dummy(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation that ends in a call, with a thought before it.

    Some templates repeat the called tool's name in the result's header. Qwen 3's writes an empty thought into the last
    turn alone, which no sampled turn relies on; a thought that is there stays.
    """
    name = str(messages[0]["name"])
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    turn = {"role": "assistant", "content": "", "reasoning_content": "thought", "tool_calls": [call]}
    return [{"role": "user", "content": "dummy"}, turn]


def _after_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, str]:
    """What follows an answer without calls, its end of turn included, and that end of turn.

    Templates drop an earlier turn's thoughts here: what is compared begins behind the answer's own text.
    """
    said = "dummy answer"
    history = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": said}]
    text = _rendered(tokenizer, [*history, *messages], True)
    _, found, after = text.partition(said)
    if not found:
        raise ValueError("the chat template leaves out what the assistant said; give one as data.chat_template")
    end = str(tokenizer.eos_token or "")
    return after, end


def _before(tokenizer: PreTrainedTokenizerBase, history: Sequence[Message]) -> tuple[str, str]:
    """The rendered history up to the end of its last turn, and the token that ends it ("" where none does)."""
    text = _rendered(tokenizer, history, False)
    end = str(tokenizer.eos_token or "")
    if end and end in text:
        return text[: text.rindex(end) + len(end)], end
    return text, ""


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], is_open: bool, tools: Tools | None = None
) -> str:
    schemas: Any = tools
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(each) for each in messages], tools=schemas, tokenize=False, add_generation_prompt=is_open
            )
        )
    except Exception as error:  # a template is foreign code, and raises what it likes
        raise ValueError(
            f"the chat template cannot write a tool's result ({type(error).__name__}: {error}); give one for tools as "
            "data.chat_template"
        ) from error


def _look_alikes(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the first character of every text that the tokenizer would take for one of its added tokens."""
    texts = [str(text) for text in tokenizer.get_added_vocab() if len(str(text)) > 1]
    # Some normalise case before they look.
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts) or "(?!)", re.I)


def _defuser(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Return what cuts every look-alike in a text, those that only the tokenizer's normaliser makes included."""
    look_alikes = _look_alikes(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
    # Added tokens are looked for in the text as it is, but for those that ask for the normalised one.
    is_normalised = any(token.normalized for token in tokenizer.added_tokens_decoder.values())
    normaliser = backend.normalizer if backend is not None and is_normalised else None

    def defused(text: str) -> str:
        plain = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no UTF-8
        plain = plain.replace(_MARK, "\ufffd")
        if normaliser is not None:
            normalised = normaliser.normalize_str(plain)
            plain = normalised if look_alikes.search(normalised) else plain
        return look_alikes.sub(lambda match: match[0] + _MARK, plain)

    return defused
