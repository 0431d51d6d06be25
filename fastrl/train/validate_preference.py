"""Rules of the recipes over preferred, judged and ranked completions."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    PreferenceConfig,
    ReferenceConfig,
)
from fastrl.train.validate_files import model_problem
from fastrl.train.validate_ranks import launched_step_size, times_ranks
from fastrl.train.validate_rewards import reward_problem

Problems = Iterator[str]

SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")  # the losses of pairs that read label_smoothing


def preference_problems(config: PreferenceConfig) -> Problems:
    """Rules for all of them."""
    if config.truncate and config.max_length is None:
        yield "truncate: has no effect without max_length; set that too"


def reference_problems(config: ReferenceConfig) -> Problems:
    """Rules about the model that the policy is compared with."""
    default = ReferenceConfig(model_name_or_path="", output_dir="", train_dataset="")
    if config.ref_model_name_or_path is not None:
        yield from (f"ref_{problem}" for problem in model_problem(config.ref_model_name_or_path))
    if config.beta == 0:
        yield "beta: 0 leaves nothing to learn; set it above 0, such as 0.1"
    if config.sync_ref_model:
        if config.precompute_ref_log_probs:
            yield "sync_ref_model: the reference moves, so it cannot be precomputed; set precompute_ref_log_probs false"
        if config.use_peft:
            yield "sync_ref_model: with use_peft the reference is the policy without its adapter; remove one of them"
        return
    for key, value, usual in (
        ("ref_model_mixup_alpha", config.ref_model_mixup_alpha, default.ref_model_mixup_alpha),
        ("ref_model_sync_steps", config.ref_model_sync_steps, default.ref_model_sync_steps),
    ):
        if value != usual:
            yield f"{key}: has no effect while sync_ref_model is false; set that too"


def dpo_problems(config: DPOConfig) -> Problems:
    """Rules of `fastrl dpo`."""
    losses = config.loss_type
    if not losses:
        yield "loss_type: is empty; name at least one, such as sigmoid"
    if losses == ("sft",):
        yield "loss_type: sft alone learns nothing from the rejected; add sigmoid, or use fastrl sft"
    if config.loss_weights is not None and len(config.loss_weights) != len(losses):
        yield f"loss_weights: needs one number for each of the {len(losses)} losses, got {len(config.loss_weights)}"
    if config.loss_weights and not any(config.loss_weights):
        yield "loss_weights: all 0 leaves nothing to learn; set one above 0"
    if config.label_smoothing and not any(loss in SMOOTHED for loss in losses):
        yield f"label_smoothing: has no place in {', '.join(losses)}; remove it, or use one of {', '.join(SMOOTHED)}"
    if "robust" in losses and config.label_smoothing >= 0.5:
        yield f"label_smoothing: robust needs less than 0.5 (half of the labels flipped), got {config.label_smoothing}"
    if "exo_pair" in losses and config.label_smoothing == 0:
        yield "label_smoothing: exo_pair needs one above 0; the paper uses 0.001"
    if not config.length_averaged and "ipo" not in losses:
        yield "length_averaged: only ipo reads it; remove it, or add ipo to loss_type"
    if config.discopop_tau != 0.05 and "discopop" not in losses:
        yield "discopop_tau: only discopop reads it; remove it, or add discopop to loss_type"
    if config.reference_free and (config.ref_model_name_or_path is not None or config.sync_ref_model):
        key = "sync_ref_model" if config.sync_ref_model else "ref_model_name_or_path"
        yield f"reference_free: leaves no reference for {key}; remove one of them"
    elif config.reference_free and not config.precompute_ref_log_probs:
        yield "precompute_ref_log_probs: has no effect with reference_free, which asks no reference; remove it"
    yield from _pair_budget(config)


def kto_problems(config: KTOConfig) -> Problems:
    """Rules of `fastrl kto`."""
    if config.loss_type == "kto" and launched_step_size(config) < 2:
        yield (
            "per_device_train_batch_size: kto's baseline pairs prompts with completions of other rows of the step; "
            "set at least 2"
        )
    if config.desirable_weight == 0 and config.undesirable_weight == 0:
        yield "desirable_weight: 0 beside undesirable_weight 0 leaves nothing to learn; set one above 0"
    if config.max_length is not None and config.packing.token_budget < config.max_length:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of max_length "
            f"{config.max_length}; raise it, or lower max_length"
        )


def cpo_problems(config: CPOConfig) -> Problems:
    """Rules of `fastrl cpo`."""
    if config.beta == 0:
        yield "beta: 0 leaves nothing to learn from the rejected; set it above 0, such as 0.1"
    if config.label_smoothing and config.loss_type not in ("sigmoid", "simpo"):
        yield f"label_smoothing: has no place in {config.loss_type}; remove it, or use sigmoid or simpo"
    if config.simpo_gamma != 0.5 and config.loss_type != "simpo":
        yield "simpo_gamma: only simpo reads it; remove it, or set loss_type: simpo"
    yield from _pair_budget(config)


def orpo_problems(config: PreferenceConfig) -> Problems:
    """Rules of `fastrl orpo`."""
    yield from _pair_budget(config)


def online_dpo_problems(config: OnlineDPOConfig) -> Problems:
    """Rules of `fastrl online_dpo`."""
    if not config.reward_funcs and config.reward_model_path is None:
        yield "reward_funcs: is empty, nothing judges the completions; set it, or reward_model_path"
    if config.reward_model_path is None and config.reward_model_weight != 1:
        yield "reward_model_weight: has no effect without reward_model_path; set that too"
    if config.reward_model_path is not None:
        found = model_problem(config.reward_model_path)
        yield from (problem.replace("model_name_or_path", "reward_model_path", 1) for problem in found)
    for spec in config.reward_funcs:
        yield from reward_problem(spec)
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        yield (
            f"reward_weights: needs one number for each of the {len(config.reward_funcs)} reward_funcs, "
            f"got {len(config.reward_weights)}"
        )
    if config.ref_model_name_or_path is not None:
        yield from (f"ref_{problem}" for problem in model_problem(config.ref_model_name_or_path))
    if config.num_generations < 2:
        yield "num_generations: a pair needs at least 2 completions of a prompt"
    elif launched_step_size(config) % config.num_generations:
        yield (
            f"num_generations: per_device_train_batch_size x gradient_accumulation_steps = "
            f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps}{times_ranks()} completions "
            f"are no whole number of groups of {config.num_generations}"
        )
    if config.beta == 0:
        yield "beta: 0 leaves nothing to learn; set it above 0, such as 0.1"
    if config.temperature == 0:
        yield "temperature: 0 is greedy, every completion of a prompt would be the same; set it above 0"
    if "" in config.stop:
        yield "stop: an empty text would end every completion at once; remove it"
    longest = config.max_completion_length + (config.rollout.max_prompt_length or 1)
    if config.packing.token_budget < 2 * longest:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold a pair of two sequences of "
            f"rollout.max_prompt_length + max_completion_length = {longest} tokens; raise it"
        )


def _pair_budget(config: PreferenceConfig) -> Problems:
    if config.max_length is not None and config.packing.token_budget < 2 * config.max_length:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold a pair of two sequences of max_length "
            f"{config.max_length}; raise it, or lower max_length"
        )
