"""The values each number in a configuration may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

# The values each number may take, wherever a configuration has an option of this name. NaN is in no interval.
RANGES = {
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "adaptive_kl_horizon": "[1, inf)",
    "adaptive_kl_target": "(0, inf)",
    "alpha": "[0, 1]",
    "beta": "[0, inf)",
    "center_rewards_coefficient": "[0, inf)",
    "cliprange": "(0, 1]",
    "cliprange_value": "(0, inf)",
    "cpo_alpha": "[0, inf)",
    "data.max_rows": "[1, inf)",
    "delta": "(1, inf)",
    "desirable_weight": "[0, inf)",
    "discopop_tau": "(0, inf)",
    "distributed.timeout_seconds": "(0, inf)",
    "dynamic_sampling.max_rounds": "[0, inf)",
    "entropy_coef": "[0, inf)",
    "environment.episode_seconds": "(0, inf)",
    "environment.max_tool_calling_iterations": "[0, inf)",
    "environment.reward_weight": "(-inf, inf)",
    "environment.tool_timeout_seconds": "(0, inf)",
    "environment.turn_advantage_weight": "[0, inf)",
    "environment.turn_gamma": "[0, 1]",
    "environment.workers": "[0, inf)",
    "epsilon": "(0, 1]",
    "epsilon_high": "(0, inf)",
    "eval_steps": "[1, inf)",
    "gamma": "[0, 1]",
    "gradient_accumulation_steps": "[1, inf)",
    "kernels.chunk_rows": "[1, inf)",
    "kernels.skip_tolerance": "[0, 1)",
    "kl_coef": "[0, inf)",
    "label_smoothing": "[0, 1)",
    "lam": "[0, 1]",
    "learning_rate": "(0, inf)",
    "lmbda": "[0, 1]",
    "logging_steps": "[1, inf)",
    "lora_alpha": "[1, inf)",
    "lora_r": "[1, inf)",
    "loss_weights": "[0, inf)",
    "max_completion_length": "[1, inf)",
    "max_critique_length": "[1, inf)",
    "max_grad_norm": "[0, inf)",
    "max_length": "[2, inf)",
    "max_new_tokens": "[1, inf)",
    "max_per_prompt": "[1, inf)",
    "max_steps": "[-1, inf)",
    "min_margin": "[0, 1]",
    "min_p": "[0, 1]",
    "missing_eos_penalty": "(-inf, inf)",
    "nll_coef": "[0, inf)",
    "num_generations": "[1, inf)",
    "num_iterations": "[1, inf)",
    "num_mini_batches": "[1, inf)",
    "num_ppo_epochs": "[1, inf)",
    "num_train_epochs": "(0, inf)",
    "overlong.buffer": "[0, inf)",
    "overlong.penalty": "[0, inf)",
    "packing.token_budget": "[2, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "pretrain_batch_size": "[1, inf)",
    "pretrain_max_length": "[2, inf)",
    "ptx_coef": "[0, inf)",
    "ref_model_mixup_alpha": "(0, 1]",
    "ref_model_sync_steps": "[1, inf)",
    "repetition_penalty": "(0, inf)",
    "report.log_completions": "[0, inf)",
    "revisions": "[0, inf)",
    "reward_clip": "(0, inf)",
    "reward_model_weight": "(-inf, inf)",
    "reward_weights": "(-inf, inf)",
    "rewards.cache_size": "[0, inf)",
    "rewards.max_error_rate": "[0, 1]",
    "rewards.spare_workers": "[0, inf)",
    "rewards.timeout_seconds": "(0, inf)",
    "rewards.workers": "[0, inf)",
    "rollout.batch_size": "[1, inf)",
    "rollout.max_prompt_length": "[1, inf)",
    "rollout.max_staleness": "[0, 1000]",
    "rollout.segment_tokens": "[1, inf)",
    "rollout.server.concurrency": "[1, inf)",
    "rollout.server.count": "[1, 64]",
    "rollout.server.gpu_memory_utilization": "(0, 1)",
    "rollout.server.kv_cache_gib": "(0, inf)",
    "rollout.server.lost_steps": "[1, inf)",
    "rollout.server.max_model_len": "[2, inf)",
    "rollout.server.patience_seconds": "[0, inf)",
    "rollout.server.port": "[1024, 65535]",
    "rollout.server.probe_tolerance": "(0, inf)",
    "rollout.server.request_seconds": "(0, inf)",
    "rollout.server.retries": "[0, 100]",
    "rollout.server.start_seconds": "(0, inf)",
    "rollout.server.update_seconds": "(0, inf)",
    "rollout.timeout_seconds": "(0, inf)",
    "rollout.vllm.gpu_memory_utilization": "(0, 1)",
    "rollout.vllm.kv_cache_gib": "(0, inf)",
    "rollout.vllm.max_model_len": "[2, inf)",
    "rollout.vllm.probe_tolerance": "(0, inf)",
    "sampler_correction.high": "(0, inf)",
    "sampler_correction.low": "[0, inf)",
    "save_steps": "[1, inf)",
    "save_total_limit": "[1, inf)",
    "seed": "[0, 4294967295]",
    "signals.clip_tail": "[0, 1]",
    "signals.entropy_collapse": "[0, 1]",
    "signals.format_hacking": "[0, inf)",
    "signals.kl_blowup": "(0, inf)",
    "signals.kl_factor": "(1, inf)",
    "signals.length_hacking": "[0, 1]",
    "signals.lr_factor": "(0, 1)",
    "signals.max_rollbacks": "[0, inf)",
    "signals.mode_collapse": "[0, 1]",
    "signals.ratio_tail": "[0, 1]",
    "signals.reward_errors": "[0, 1]",
    "signals.reward_hacking": "[0, inf)",
    "signals.sparse_reward": "[0, 1]",
    "signals.window": "[2, 500]",
    "simpo_gamma": "[0, inf)",
    "steps_per_generation": "[1, inf)",
    "target_kl": "(0, inf)",
    "temperature": "[0, inf)",
    "top_entropy_quantile": "(0, 1]",
    "top_k": "[0, inf)",
    "top_p": "(0, 1]",
    "undesirable_weight": "[0, inf)",
    "value_learning_rate": "(0, inf)",
    "verify_threshold": "(-inf, inf)",
    "vf_coef": "[0, inf)",
    "warmup_ratio": "[0, 1]",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
}


def range_problems(config: Any) -> Iterator[str]:
    """Each number of a configuration that is outside its interval."""
    for key, value in _leaves(config):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not _inside(number, RANGES[key]):
                yield f"{key}: must be in {RANGES[key]}, got {number}"


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _inside(number: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)
