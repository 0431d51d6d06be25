"""What verl calls the metrics that we log under TRL's names, for people who compare runs."""

from __future__ import annotations

from collections.abc import Mapping

VERL_NAMES: Mapping[str, str] = {
    "reward": "critic/score/mean",
    "kl": "actor/kl_loss",  # to the reference; verl's ppo_kl is to the policy that sampled
    "entropy": "actor/entropy",
    "loss": "actor/pg_loss",
    # Both bounds; verl's pg_clipfrac_lower counts its dual clip, not the lower bound.
    "clip_ratio/region_mean": "actor/pg_clipfrac",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "completions/mean_length": "response_length/mean",
    "completions/min_length": "response_length/min",
    "completions/max_length": "response_length/max",
    "completions/clipped_ratio": "response_length/clip_ratio",
    "time/rollout": "timing_s/gen",
    "time/reward": "timing_s/reward",
    "time/logprob": "timing_s/old_log_prob",
    "time/train": "timing_s/update_actor",
    "time/sync": "timing_s/update_weights",
    "step_time": "timing_s/step",
    "tokens_per_second": "perf/throughput",  # verl's is per device
    "mfu": "perf/mfu/actor",
    "memory/peak_gib": "perf/max_memory_allocated_gb",  # verl's "gb" are GiB
}


def with_verl_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under verl's names where verl has one, the others unchanged."""
    return {VERL_NAMES.get(name, name): value for name, value in metrics.items()}
