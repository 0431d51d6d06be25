from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from fastrl.train.random_state import Generator, generator_state, restore_generators


def own() -> dict[str, Generator]:
    return {"data": torch.Generator().manual_seed(1), "shuffle": np.random.default_rng(2), "judge": random.Random(3)}


def draws(generators: dict[str, Generator]) -> list[float]:
    data, shuffle, judge = generators.values()
    assert isinstance(data, torch.Generator)
    assert isinstance(shuffle, np.random.Generator)
    assert isinstance(judge, random.Random)
    return [
        torch.randn(1).item(),
        random.gauss(0, 1),
        np.random.standard_normal(),  # noqa: NPY002
        torch.rand(1, generator=data).item(),
        shuffle.random(),
        judge.gauss(0, 1),
    ]


def test_every_stream_continues_where_it_was_after_a_trip_through_json() -> None:
    generators = own()
    draws(generators)  # an odd number of normal draws leaves the second half of a pair waiting in some generators
    text = json.dumps(generator_state(generators))
    expected = [draws(generators) for _ in range(3)]
    fresh = own()
    torch.manual_seed(0)
    restore_generators(json.loads(text), fresh)
    assert [draws(fresh) for _ in range(3)] == expected


def test_a_generator_without_saved_state_is_refused() -> None:
    state = generator_state({"data": torch.Generator()})
    with pytest.raises(ValueError, match=r"has the generators \['data'\], and this one \['data', 'judge'\]"):
        restore_generators(state, {"data": torch.Generator(), "judge": random.Random(0)})
