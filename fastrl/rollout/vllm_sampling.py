"""Our sampling parameters in vLLM's words, for the engine in this process and for the server, and what it cannot do.

vLLM divides by the temperature, then drops by min-p, then keeps by top-k and top-p. Ours drops by min-p last. The two
differ only where top-p and min-p are both on: min-p leaves ratios of probabilities alone, top-p measures sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastrl.rollout.engine import Sampling, check_sampling
from fastrl.rollout.seeds import request_seed

LEAST_TEMPERATURE = 0.01  # below it vLLM takes this in place of what was asked for
SEED_MASK = (1 << 63) - 1  # vLLM reads -1 as "no seed"


def check_vllm_sampling(sampling: Sampling) -> None:
    """Refuse what describes no distribution, and what vLLM would draw from another one.

    Raises:
        ValueError: one sentence that names the field.
    """
    check_sampling(sampling)
    if sampling.top_p < 1.0 and sampling.min_p > 0.0:
        raise ValueError(
            "sampling.min_p and sampling.top_p do not go together in vLLM, which applies min_p first; set one of them"
        )
    if 0.0 < sampling.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE} in vLLM, which would raise it "
            f"to that, got {sampling.temperature}"
        )


def sampling_fields(
    sampling: Sampling, *, limit: int, seed: int, begun: int, eos_token_ids: Iterable[int]
) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams`, and of its HTTP requests, for one completion.

    Every field that has a default is named, so that neither vLLM's nor the model's generation config counts.

    Args:
        limit: tokens it may still have.
        seed: of the completion.
        begun: tokens of it that were sampled earlier. vLLM's generators cannot be wound forward, so what is left has
            a stream of its own: deterministic, but not the tokens that one call would have drawn.
        eos_token_ids: what ends it; vLLM's own idea of EOS is switched off.
    """
    return {
        "max_tokens": limit,
        "seed": (request_seed(seed, begun, 0) if begun else seed) & SEED_MASK,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(eos_token_ids),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "n": 1,
    }
