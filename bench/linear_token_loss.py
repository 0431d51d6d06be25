"""Rows of the single pass under a policy loss: dense, half of the tokens masked, and confident tokens skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.linear_logprob import QUICK_SHAPES, QUICK_VARIANTS, SHAPES, three_products
from bench.peers import bare_products, liger_chunked_grpo, liger_triton_grpo, trl_logprob, verl_logprob
from bench.registry import Compiled, Row, register
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.linear_logprob import reference as waist_reference
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.testing import linear_logprob_inputs

GROUP = 64  # rows that share an advantage
Head = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def policy_inputs(n: int, d: int, v: int, *, dtype: torch.dtype, device: str, active: float = 1.0) -> Head:
    """hidden, weight, target, advantage [N] (0 in 30 % of groups when tokens are masked), row weight [N]."""
    hidden, weight, target = linear_logprob_inputs(n, d, v, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    groups = torch.randn(-(-n // GROUP), generator=generator)
    if active < 1:
        groups = groups * (torch.rand(groups.shape, generator=generator) >= 0.3)
    is_trained = torch.rand(n, generator=generator) < active
    row_weight = is_trained / is_trained.sum().clamp(min=1)
    return hidden, weight, target, groups.repeat_interleave(GROUP)[:n].to(device), row_weight.to(device)


def surrogate(logprob: Tensor, advantage: Tensor) -> Tensor:
    """The clipped surrogate's gradient at ratio 1, for which no old log-probability is needed."""
    return -(logprob - logprob.detach()).exp() * advantage.to(logprob.dtype)


def single_pass(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    row_weight: Tensor,
    *,
    backend: str,
    skip_tolerance: float = 0.0,
) -> Tensor:
    """The loss inside the chunk loop."""
    result = linear_token_loss(
        hidden,
        weight,
        target,
        lambda logprob, _entropy, rows: surrogate(logprob, advantage[rows]),
        row_weight=row_weight,
        skip_tolerance=skip_tolerance,
        backend=backend,
    )
    return result.loss


def eager(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, row_weight: Tensor) -> Tensor:
    """The loss after N x V logits."""
    stats = waist_reference(hidden, weight, target)
    return (row_weight.to(stats.logprob.dtype) * surrogate(stats.logprob, advantage)).sum()


def two_steps(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, row_weight: Tensor) -> Tensor:
    """The loss after `linear_logprob`: what a drop-in can do."""
    stats = linear_logprob(hidden, weight, target, backend="torch")
    return (row_weight.to(stats.logprob.dtype) * surrogate(stats.logprob, advantage)).sum()


def over(head: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The loss after another project's log-probabilities: its trainer's form."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, row_weight: Tensor) -> Tensor:
        logprob, _ = head(hidden, weight, target)
        return (row_weight.to(logprob.dtype) * surrogate(logprob, advantage)).sum()

    return loss


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "eager, compiled": Compiled(eager),
    "linear_logprob": two_steps,
    "torch": partial(single_pass, backend="torch"),
    "triton": partial(single_pass, backend="triton"),
    "TRL's head": over(trl_logprob),
    "verl's head": over(verl_logprob),
    "Liger, chunked GRPO": partial(liger_chunked_grpo, group=GROUP),
    "Liger, triton_grpo_loss": partial(liger_triton_grpo, group=GROUP),
}


def peaked_inputs(n: int, d: int, v: int, *, dtype: torch.dtype, device: str) -> Head:
    """Nine rows of ten are confident of their target."""
    _, weight, target, advantage, row_weight = policy_inputs(n, d, v, dtype=dtype, device=device)
    peaked = linear_logprob_inputs(n, d, v, dtype=dtype, device=device, peak=25.0)[0]
    return peaked * (torch.arange(n, device=device) % 10 > 0)[:, None], weight, target, advantage, row_weight


register(
    Row(
        name="linear_token_loss",
        make_inputs=policy_inputs,
        spec=eager,
        contenders=CONTENDERS,
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        flops=three_products,
        floor=bare_products,
        differentiable=(0, 1),
        check_rows=256,
    ),
    Row(
        name="linear_token_loss_masked",
        make_inputs=partial(policy_inputs, active=0.5),
        spec=eager,
        contenders=CONTENDERS,
        shapes=SHAPES,
        quick_shapes=QUICK_VARIANTS,
        flops=three_products,
        floor=bare_products,
        differentiable=(0, 1),
        check_rows=256,
    ),
    Row(
        name="linear_token_loss_peaked",
        make_inputs=peaked_inputs,
        spec=eager,
        contenders={
            "eager": eager,
            "torch": partial(single_pass, backend="torch"),
            "torch, skip 1e-3": partial(single_pass, backend="torch", skip_tolerance=1e-3),
        },
        shapes=SHAPES,
        quick_shapes=QUICK_VARIANTS,
        flops=three_products,
        floor=bare_products,
        differentiable=(0, 1),
        slack=2e-3,  # what skipping may leave out
        check_rows=256,
    ),
)
