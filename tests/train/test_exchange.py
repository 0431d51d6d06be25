"""What ranks tell each other of a round: nothing is lost on the way, to the last bit of a log-probability."""

from __future__ import annotations

from typing import Any

from fastrl.rollout.seeds import request_seed
from fastrl.train.exchange import generated_on_ranks, in_order, read, written
from fastrl.types import Rollout
from tests.train.ranks import on_ranks, results, together

ROLLOUTS = [
    Rollout((1, 2, 151935), (7, 8), (-0.1, -2.0 / 3.0), "stop", 3),
    Rollout((5,), (), (), "error", 3),
    Rollout((2, 2), (9, 1, 4), (-1e-30, 0.0, -80.5), "length", 4, (True, False, True), (4, 4, 5)),
]


def test_a_message_is_read_as_it_was_written() -> None:
    record = {"completions": ["a", [{"role": "assistant", "content": "é"}]], "total": [None, float("inf")]}
    found, told = read(written(ROLLOUTS, record))
    assert found == ROLLOUTS
    assert told == record
    assert isinstance(found[2].completion_ids[0], int)
    assert isinstance(found[2].is_sampled, tuple)
    assert found[2].is_sampled[1] is False
    assert read(written([], {})) == ([], {})


def test_items_go_back_to_their_places() -> None:
    assert in_order([["a", "c"], [], ["b"]], [[0, 2], [], [1]]) == ["a", "b", "c"]


class Counter:
    """An engine that says its prompt's seed, and knows how many prompts it had."""

    def __init__(self) -> None:
        self.n = 0

    def generate(self, prompts: Any, sampling: Any, *, seeds: Any, prefixes: Any = None) -> list[Rollout]:
        self.n += len(prompts)
        return [
            Rollout(tuple(prompt), (seed % 997,), (0.0,), "stop", 0)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def load_weights(self, model: Any, version: int) -> None: ...

    def rest(self) -> None: ...


def sampled(n: int) -> tuple[list[Rollout], int]:
    with together():
        engine, seeds = Counter(), [request_seed(1, i, 0) for i in range(n)]
        return generated_on_ranks(engine, [(i,) for i in range(n)], None, seeds=seeds), engine.n  # type: ignore[arg-type]


def test_each_prompt_is_sampled_once_and_every_rank_has_all_in_order() -> None:
    for n in (5, 1):
        found = results(on_ranks(3, sampled, n))
        assert [count for _, count in found] == ([2, 2, 1] if n == 5 else [1, 0, 0])
        expected = [((i,), (request_seed(1, i, 0) % 997,)) for i in range(n)]
        for rollouts, _ in found:
            assert [(each.prompt_ids, each.completion_ids) for each in rollouts] == expected
