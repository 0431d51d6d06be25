"""What stands between a number that is not one and the weights, and measures of trainer and sampler drifting apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrl.rewards.score import RewardError


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; the weights are those of the step before."""


class NoVerdictError(RuntimeError):
    """No completion of several rounds in a row could be judged: a reward is broken, or what it calls is down."""


class SamplerMismatchError(RuntimeError):
    """The trainer and the sampler disagree about the policy's probabilities; training on would learn the difference."""


def finite(loss: Tensor, grad_norm: Tensor) -> bool:
    """Whether both scalars are finite; waits for the device once."""
    norm = grad_norm.detach().float()
    return bool(torch.stack([loss.detach().float().to(norm.device), norm]).isfinite().all())


def non_finite_cause(loss: Tensor, gradients: Mapping[str, Tensor]) -> str:
    """Name what is not finite, for a message: the loss, else the first such gradient, else an overflowing norm.

    Args:
        loss: [] of the step.
        gradients: name -> accumulated gradient.
    """
    if not loss.isfinite():
        return f"the loss is {float(loss)}"
    for name, gradient in gradients.items():
        bad = int((~gradient.isfinite()).sum())
        if bad:
            return f"the gradient of {name} has {bad} of {gradient.numel()} values that are not finite"
    return "the gradient norm overflows float32 although every gradient is finite"


def probability_error(logprob: Tensor, sampler_logprob: Tensor) -> Tensor:
    """Mean factor by which trainer and sampler differ on a token's probability; 1 is perfect agreement.

        mean over t of exp(|logprob[t] - sampler_logprob[t]|)

    Args:
        logprob: [N] of sampled tokens under the trainer, before any update, in nats; a constant.
        sampler_logprob: [N] under the distribution that sampled them; a constant.
    """
    return (logprob - sampler_logprob).abs().exp().mean()


def check_probability_error(value: float, *, step: int, stop_at: float = 1.2) -> None:
    """Stop a run whose sampler and trainer no longer compute the same policy.

    Raises:
        SamplerMismatchError: `value` of `probability_error` is above `stop_at`, or is not a number.
    """
    if not value <= stop_at:
        raise SamplerMismatchError(
            f"step {step}: sampler and trainer differ by a factor {value:.3f} on a token's probability, "
            f"above {stop_at}; compare their dtype, temperature, chat template and weight version"
        )


def effective_sample_share(log_ratio: Tensor) -> Tensor:
    """Effective sample size of importance weights as a share of their number, in (0, 1]; 1 when all are equal.

        (sum w)^2 / (N sum w^2),    w = exp(log_ratio)

    Args:
        log_ratio: [N] log-probability of the trained policy minus the sampling one, in nats; a constant.

    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """
    weight = (log_ratio - log_ratio.max()).exp()
    return weight.sum().square() / (weight.numel() * weight.square().sum())


MOST_ROUNDS_WITHOUT_VERDICT = 3


def check_verdicts(reward: Tensor, rounds_without: int, errors: Mapping[str, RewardError]) -> int:
    """Count the rounds in a row in which nothing could be judged, and stop the run at the third.

    Args:
        reward: [S] of this round; NaN is no verdict.
        rounds_without: the count before it.
        errors: failures of this round's rewards, by name.

    Returns:
        The count after it.

    Raises:
        NoVerdictError: naming the reward that failed most, with its first failure.
    """
    if bool(reward.isfinite().any()) or len(reward) == 0:
        return 0
    if rounds_without + 1 < MOST_ROUNDS_WITHOUT_VERDICT:
        return rounds_without + 1
    if not errors:
        raise NoVerdictError(f"no completion of {MOST_ROUNDS_WITHOUT_VERDICT} rounds in a row got a verdict: all None")
    name, error = max(errors.items(), key=lambda item: item[1].count)
    raise NoVerdictError(
        f"no completion of {MOST_ROUNDS_WITHOUT_VERDICT} rounds in a row could be judged; reward {name!r} failed on "
        f"{error.count} of {len(reward)} completions of the last one. Mend it and start again (a training run with "
        f"--resume auto). It said:\n"
        f"{error.first}"
    )
