"""The learning rate of each optimizer step, as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_at(
    step: int,
    *,
    peak: float,
    kind: Literal["constant", "linear", "cosine"],
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Linear warm-up from 0 to `peak`, then constant, or down to 0 at `total_steps` in a line or half a cosine.

        step < warmup:  peak * step / warmup
        linear:         peak * (1 - progress),                 progress = (step - warmup) / (total - warmup)
        cosine:         peak * (1 + cos(pi * progress)) / 2

    Args:
        step: optimizer steps taken so far; 0 for the first. With a warm-up the first step has rate 0, as in
            transformers, whose numbers these are.
        peak: rate after the warm-up.
        total_steps: steps of the whole run; the rate is 0 from there on unless `kind` is "constant".

    Source: the schedules of `transformers.get_scheduler`; cosine from Loshchilov and Hutter, arXiv:1608.03983, eq. 5.
    """
    if step < 0 or warmup_steps < 0 or total_steps < 1:
        raise ValueError(
            f"step and warmup_steps must not be negative and total_steps must be positive, "
            f"got step={step}, warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return peak * (1.0 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"kind must be 'constant', 'linear' or 'cosine', got {kind!r}")


def warmup_length(total_steps: int, *, warmup_steps: int, warmup_ratio: float) -> int:
    """Steps of warm-up: `warmup_steps` when it is set, else that share of the run, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)
