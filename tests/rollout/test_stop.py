from __future__ import annotations

import pytest

from fastrl.rollout.stop import StopStrings
from tests.rollout.tiny import V, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("text", "stop", "end"),
    [
        ("abcdef", ("cd",), 4),
        ("abcdef", ("x", "ef", "de"), 5),
        ("abcdef", ("fa",), None),
        ("a b c", (" c",), 5),
        ("a b c", ("b ",), 4),
        ("abéc", ("bé",), 4),  # é is two tokens; the match is whole with the second
        ("ééa", ("éa",), 5),
        ("aaaaab", ("aab",), 6),
        ("abc", ("abc",), 3),
    ],
)
def test_the_match_ends_at_the_token_that_completes_it(text: str, stop: tuple[str, ...], end: int | None):
    match = StopStrings(TOKENIZER, stop, V).first_match(ids(text), 0)
    assert match == (None if end is None else end - 1)


def test_a_match_that_began_before_the_new_tokens_is_found():
    stop = StopStrings(TOKENIZER, ("cd",), V)
    assert stop.first_match(ids("abcd"), 3) == 3
    assert stop.first_match(ids("abcd"), 0) == 3


def test_the_window_is_long_enough_for_the_longest_string_of_two_byte_characters():
    text = "z" * 50 + "é" * 10
    assert StopStrings(TOKENIZER, ("é" * 10,), V).first_match(ids(text), 0) == 69
    assert StopStrings(TOKENIZER, ("zé" + "é" * 9,), V).first_match(ids(text), 60) == 69


def test_special_tokens_are_text_and_unused_ids_are_not():
    assert StopStrings(TOKENIZER, ("<turn>",), V).first_match([5, V - 1, 2], 0) == 2
    assert StopStrings(TOKENIZER, ("a",), V).first_match([V - 1, V - 2], 0) is None


def test_only_tokens_that_can_end_a_match_are_candidates():
    stop = StopStrings(TOKENIZER, ("ab",), V)
    cut = {token for token in range(V) if "\ufffd" in TOKENIZER.decode([token])}
    assert {token for token in range(V) if stop.is_candidate[token]} == {*ids("b"), *cut}
    assert len(cut) == 2
