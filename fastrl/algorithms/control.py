"""What a run adjusts between updates: the KL coefficient, and when to stop reusing a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A KL coefficient that steers the KL to the reference towards a target.

    Attributes:
        coef: beta now.
        target: nats per token to hold.
        horizon: samples over which a constant error of 20 % changes the coefficient by about 20 %.
    """

    coef: float
    target: float
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if not self.target > 0 or self.horizon <= 0:
            raise ValueError(f"an adaptive KL needs target > 0 and horizon > 0, got {self.target} and {self.horizon}")


def adapted(state: AdaptiveKL, kl: float, *, samples: int) -> AdaptiveKL:
    """The controller after a step.

        coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon)

    Args:
        state: before.
        kl: mean KL per token measured in the step, nats.
        samples: sequences of the step.

    Source: Ziegler 2019, arXiv:1909.08593, sec. 2.2; verl, OpenRLHF `AdaptiveKLController`.
    """
    error = min(max(kl / state.target - 1, -0.2), 0.2)
    return replace(state, coef=state.coef * (1 + error * samples / state.horizon))


def exceeds_target_kl(kl: float, target: float | None) -> bool:
    """Whether the remaining updates of a batch are skipped: mean KL to the policy that sampled it above the target.

    Args:
        kl: mean of the metric "approx_kl", nats per token; NaN counts as exceeded.
        target: nats per token; None never stops.
    """
    return target is not None and not kl <= target
