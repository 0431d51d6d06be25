"""The reward processes of a run, from its configuration, and the end of a run whose rewards fail too often."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fastrl.rewards.score import Scores
from fastrl.rewards.workers import RewardWorkers
from fastrl.train.config import RewardsBlock
from fastrl.train.ranks import launched_ranks

MOST_FAILING_STEPS = 3


class RewardErrorRateError(RuntimeError):
    """A reward failed on too many completions for several steps: what trains is what it happens to be able to judge."""


def workers_of(block: RewardsBlock) -> RewardWorkers | None:
    """Return the pool that judges; None when the configuration wants every reward in this process."""
    if block.workers == 0:
        return None
    ranks = launched_ranks().local_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return RewardWorkers(
        # Each rank of a machine has its own pool; together they use its cores once.
        workers=max(1, cores // ranks) if block.workers is None and ranks > 1 else block.workers,
        spare_workers=block.spare_workers,
        timeout_seconds=block.timeout_seconds,
        cache_size=block.cache_size,
    )


def check_error_rates(scores: Scores, failing: Mapping[str, int], block: RewardsBlock) -> dict[str, int]:
    """Count the steps in a row in which each reward failed too often, and stop the run at the third.

    Args:
        scores: of this step.
        failing: reward name -> steps in a row before it.

    Returns:
        The counts after it.

    Raises:
        RewardErrorRateError: naming the reward, with its first failure.
    """
    counts = {}
    for name, error in scores.errors.items():
        rate = scores.metrics[f"rewards/{name}/error_rate"]
        if rate <= block.max_error_rate:
            continue
        counts[name] = failing.get(name, 0) + 1
        if counts[name] == MOST_FAILING_STEPS:
            raise RewardErrorRateError(
                f"reward {name!r} failed on {rate:.1%} of the completions, more than rewards.max_error_rate = "
                f"{block.max_error_rate:.1%}, in {MOST_FAILING_STEPS} steps in a row. Mend it and pass --resume auto, "
                f"or raise the limit. It said:\n{error.first}"
            )
    return counts
