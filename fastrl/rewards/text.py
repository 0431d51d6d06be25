"""What a verifier reads: the text of a completion, and the part of it that is the answer."""

from __future__ import annotations

from collections.abc import Mapping


def completion_text(completion: object) -> str:
    """The text of one completion, plain or conversational.

    Args:
        completion: a string, or a list of messages `{"role", "content"}`. The last message is read: with one
            message that is TRL's `completion[0]["content"]`, after tool calls it is the closing answer.
            A content made of parts is the concatenation of its text parts; no content is "".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple) or not all(isinstance(message, Mapping) for message in completion):
        raise ValueError(f"a completion must be a string or a list of messages, got {type(completion).__name__}")
    content = completion[-1].get("content") if completion else None
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def final_answer(text: str) -> str | None:
    """The part of a text that claims to be the answer, stripped.

    Reasoning is cut off: what follows the last `</think>`, and inside it the last `<answer>...</answer>` if any.

    Returns:
        None when `<think>` was opened and not closed: the text stopped before it answered.
    """
    after = text.rpartition("</think>")[2]
    if "<think>" in after:
        return None
    before_end, closing, _ = after.rpartition("</answer>")
    _, opening, tagged = before_end.rpartition("<answer>")
    return (tagged if opening and closing else after).strip()
