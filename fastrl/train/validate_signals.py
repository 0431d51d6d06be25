"""Rules for what composes rewards and for the actions of signals; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import GRPOConfig, OnPolicyConfig, PPOConfig
from fastrl.train.config.signals import SignalsBlock

ACTIONS = ("warn", "lower_lr", "raise_kl", "rollback", "stop")
# Advantages that GDPO's could stand for; the other presets have one of their own.
NORMALISES_GROUPS = ("grpo", "dapo", "gspo", "cispo", "sapo")


def composition_problems(config: OnPolicyConfig) -> Iterator[str]:
    """Gates and schedules that cannot be read, or name a reward that is not there."""
    from fastrl.rewards.gates import gates_from
    from fastrl.train.curriculum import points_from

    try:
        gates = gates_from(config.reward_gates)
    except ValueError as error:
        yield f"reward_gates: {error}"
        gates = ()
    for name, text in config.reward_schedule.items():
        try:
            points_from(text)
        except ValueError as error:
            yield f"reward_schedule: {name}: {error}"
    if any(":" in spec for spec in config.reward_funcs):
        return  # names of imported functions are known when they are imported
    known = {spec.partition("(")[0] for spec in config.reward_funcs} | {"reward_model"}
    named = [("reward_gates", name) for gate in gates for name in (gate.reward, gate.condition)]
    for key, name in [*named, *(("reward_schedule", name) for name in config.reward_schedule)]:
        if name not in known:
            yield f"{key}: there is no reward {name}; reward_funcs has {', '.join(config.reward_funcs) or 'none'}"


def signal_problems(config: OnPolicyConfig) -> Iterator[str]:
    """Actions that do not exist, belong to no detector, or that the run cannot take."""
    from difflib import get_close_matches

    block = config.signals
    detectors = [name for name in vars(SignalsBlock()) if name not in SETTINGS]
    for name, action in block.actions.items():
        if name not in detectors:
            near = get_close_matches(name, detectors, n=1)
            hint = f"did you mean {near[0]}?" if near else f"detectors are {', '.join(detectors)}"
            yield f"signals.actions: there is no detector {name}; {hint}"
        elif vars(block)[name] is None:
            yield f"signals.actions: {name} is turned off; set signals.{name}, or remove its action"
        if action not in ACTIONS:
            yield f"signals.actions: {name} must be one of {', '.join(ACTIONS)}, got {action}"
        if action == "raise_kl" and not _has_kl(config):
            yield f"signals.actions: {name} cannot raise the KL, its coefficient is 0; set beta (kl_coef in ppo)"
    if block.verifier.startswith("eval/") and "reward_hacking" in block.actions and not config.eval_steps:
        yield "signals.actions: reward_hacking reads evaluations; set eval_dataset and eval_steps, or signals.verifier"


SETTINGS = ("actions", "window", "verifier", "format_metric", "lr_factor", "kl_factor", "max_rollbacks")


def _has_kl(config: OnPolicyConfig) -> bool:
    from fastrl.train.validate import HAS_KL

    if isinstance(config, PPOConfig):
        return config.kl_coef > 0
    if isinstance(config, GRPOConfig):
        return config.beta > 0 if config.beta is not None else (config.parity or config.algorithm) in HAS_KL
    return True  # DPO's beta


def aggregation_problems(config: GRPOConfig) -> Iterator[str]:
    """What GDPO's advantage leaves no place for."""
    if config.multi_objective_aggregation == "sum_then_normalize":
        return
    key = "multi_objective_aggregation: normalize_then_sum"
    if config.algorithm not in NORMALISES_GROUPS or config.parity not in (None, "trl"):
        yield f"{key} replaces the advantage of {config.parity or config.algorithm}; use {', '.join(NORMALISES_GROUPS)}"
    if config.scale_rewards is not None:
        yield f"{key} scales each reward by its group; remove scale_rewards"
    if config.overlong.buffer:
        limit = config.max_completion_length
        yield (
            f"{key} normalises rewards one by one; write overlong as one of them: "
            f"length(start={limit - config.overlong.buffer}, limit={limit})"
        )
    if config.dynamic_sampling.max_rounds:
        yield f"{key} has signal where any reward differs, and dynamic_sampling looks at the sum; remove one of them"
