"""Sampling parameters in vLLM's words."""

from __future__ import annotations

import pytest

from fastrl.rollout.engine import Sampling
from fastrl.rollout.vllm_sampling import check_vllm_sampling, sampling_fields


def test_every_parameter_has_its_field_and_the_models_own_defaults_do_not_count() -> None:
    sampling = Sampling(64, 0.7, 0.9, 20, 0.0, 1.1, ("end",))
    found = sampling_fields(sampling, limit=10, seed=5, begun=0, eos_token_ids={9, 2})
    assert found == {
        "max_tokens": 10,
        "seed": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["end"],
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,
        "n": 1,
    }


def test_no_seed_is_the_one_that_vllm_takes_for_none() -> None:
    assert sampling_fields(Sampling(), limit=1, seed=-1, begun=0, eos_token_ids=())["seed"] == 2**63 - 1


def test_what_is_left_of_a_completion_has_a_stream_of_its_own() -> None:
    seeds = [sampling_fields(Sampling(), limit=1, seed=5, begun=n, eos_token_ids=())["seed"] for n in (0, 1, 2, 1)]
    assert len(set(seeds)) == 3
    assert seeds[1] == seeds[3]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(top_p=0.9, min_p=0.1), "min_p and sampling.top_p do not go together"),
        (Sampling(temperature=0.001), "at least 0.01"),
        (Sampling(temperature=-1.0), "sampling.temperature must be 0"),
    ],
)
def test_what_vllm_would_draw_from_another_distribution_is_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_vllm_sampling(sampling)
