"""From a configuration to an algorithm record: the preset, with every field the user set in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastrl.algorithms import parity, presets
from fastrl.algorithms.describe import unwrapped
from fastrl.algorithms.policy_gradient import Correction, PolicyGradient, Surrogate
from fastrl.losses.advantage import batch_normalized, group_centered, group_normalized
from fastrl.losses.correction import mask, sequence_mask, truncate
from fastrl.losses.kl import KL, k1, k2, k3
from fastrl.losses.ratio import sequence_ratio, token_ratio
from fastrl.losses.surrogate import cispo, clipped
from fastrl.losses.weighting import fixed_length, sequence_mean, token_mean
from fastrl.train.config import GRPOConfig, SamplerCorrectionBlock

PRESETS: dict[str, Callable[..., PolicyGradient]] = {
    "grpo": presets.grpo,
    "dapo": presets.dapo,
    "rloo": presets.rloo,
    "reinforce_pp": presets.reinforce_pp,
    "gspo": presets.gspo,
    "cispo": presets.cispo,
    "sapo": presets.sapo,
}
PARITY: dict[str, Callable[[], PolicyGradient]] = {
    "trl": parity.trl,
    "verl": parity.verl,
    "openrlhf": parity.openrlhf,
    "open_instruct": parity.open_instruct,
}
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
ADVANTAGES = {"group": group_normalized, "batch": batch_normalized, "none": group_centered}


def algorithm_from(config: GRPOConfig) -> PolicyGradient:
    """Return the record a GRPO configuration describes; `repr` prints every choice with its numbers.

    Raises:
        ValueError: a field that the chosen algorithm has no place for (a clip range without a clipped surrogate).
    """
    algorithm = _start(config)
    changes: dict[str, Any] = {"surrogate": _surrogate(config, algorithm.surrogate), "kl": _kl(config, algorithm.kl)}
    if config.loss_type is not None:
        weightings = {"grpo": sequence_mean, "dapo": token_mean, "bnpo": token_mean}
        constant = partial(fixed_length, length=config.max_completion_length)
        changes["weighting"] = weightings.get(config.loss_type, constant)
    if config.scale_rewards is not None:
        changes["advantage"] = ADVANTAGES[config.scale_rewards]
    if config.importance_sampling_level is not None:
        changes["ratio"] = sequence_ratio if config.importance_sampling_level == "sequence" else token_ratio
    if (mode := config.sampler_correction.mode) is not None:
        changes["correction"] = None if mode == "none" else _correction(config.sampler_correction)
    elif config.rollout.max_staleness > 0 and algorithm.correction is None:
        changes["correction"] = partial(truncate, high=config.sampler_correction.high)
    return replace(algorithm, entropy_coef=config.entropy_coef, entropy_quantile=config.top_entropy_quantile, **changes)


def _start(config: GRPOConfig) -> PolicyGradient:
    if config.parity is not None:
        return PARITY[config.parity]()
    if config.algorithm == "dr_grpo":
        return presets.dr_grpo(length=config.max_completion_length)
    return PRESETS[config.algorithm]()


def _surrogate(config: GRPOConfig, surrogate: Surrogate) -> Surrogate:
    high = config.epsilon_high if config.epsilon_high is not None else config.epsilon
    asked = {"low": config.epsilon, "high": high, "delta": config.delta}
    numbers = {name: value for name, value in asked.items() if value is not None}
    if not numbers:
        return surrogate
    function = unwrapped(surrogate)
    if function is cispo and set(numbers) == {"high"} and config.epsilon_high is not None:
        return partial(cispo, high=config.epsilon_high)
    if function is not clipped:
        raise ValueError(
            f"epsilon, epsilon_high and delta shape a clipped ratio, and algorithm {config.algorithm!r} has none "
            "(cispo takes epsilon_high alone, the cap of the ratio itself); leave them out or choose grpo or dapo"
        )
    present = surrogate.keywords if isinstance(surrogate, partial) else {}
    return partial(clipped, **{**present, **numbers})


def _kl(config: GRPOConfig, kl: KL | None) -> KL | None:
    coef = config.beta if config.beta is not None else (0.0 if kl is None else kl.coef)
    if coef == 0:
        if config.kl_estimator is not None or config.kl_placement is not None:
            raise ValueError("kl_estimator and kl_placement describe a KL penalty, and beta is 0; set beta")
        return None
    start = kl if kl is not None else KL(k3, coef)
    return replace(
        start,
        coef=coef,
        estimator=start.estimator if config.kl_estimator is None else ESTIMATORS[config.kl_estimator],
        placement=start.placement if config.kl_placement is None else config.kl_placement,
    )


def _correction(block: SamplerCorrectionBlock) -> Correction:
    if block.mode == "truncate":
        return partial(truncate, high=block.high)
    if block.mode == "mask":
        return partial(mask, low=block.low, high=block.high)
    return partial(sequence_mask, high=block.high)
