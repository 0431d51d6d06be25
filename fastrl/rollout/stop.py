"""Stop strings, matched on decoded text: across token borders, inside characters of several bytes, in a window.

A match is complete at the first token after which the text holds a stop string. That token is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not yet a character
MARGIN_TOKENS = 4  # a character has at most 4 bytes: the window's first one may be cut, the next is whole


class StopStrings:
    """Finds the first token that completes a stop string.

    Decoding is slow beside a decoding step of a small model, so two bounds keep it rare. Only a *candidate* token can
    complete a match: one whose own text holds the last character of a stop string, or an incomplete character.
    And only the last `window` tokens are decoded: a stop string of b bytes spans at most b tokens.

    Args:
        tokenizer: whose `decode` defines the text.
        stop: strings, none empty.
        vocab_size: V, the number of token ids the model can sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.window = max(len(string.encode()) for string in stop) + MARGIN_TOKENS
        self.is_candidate = self._candidates(vocab_size)

    def first_match(self, ids: Sequence[int], start: int) -> int | None:
        """Index of the first token from `start` on that completes a stop string, or None.

        Args:
            ids: completion tokens; those before `start` are known to hold no match.
        """
        for i in range(start, len(ids)):
            if not self.is_candidate[ids[i]]:
                continue
            text = self._text(ids[max(0, i + 1 - self.window) : i + 1])
            if any(string in text for string in self.stop):
                return i
        return None

    def _candidates(self, vocab_size: int) -> list[bool]:
        last = {string[-1] for string in self.stop}
        # Decoders add and remove spaces by the neighbours, so a token alone tells nothing of them.
        if any(character.isspace() for character in last):
            return [True] * vocab_size
        pieces = (self._text([token]) for token in range(vocab_size))
        return [REPLACEMENT in piece or not last.isdisjoint(piece) for piece in pieces]

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
