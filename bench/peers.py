"""Other projects' functions through their public names, as contenders; an absent package is reported as absent.

Every adapter imports its package when it is first called, so that a machine without it runs all other contenders.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastrl.ops.head import chunks, default_chunk_rows

TRL_TILE = 32_768  # vocabulary entries of a tile, as TRL's trainers ask for


def imported(module: str, package: str) -> Any:
    """The module of an optional package.

    Raises:
        RuntimeError: it is not installed, or cannot be imported here.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if getattr(error, "name", None) in (module.split(".")[0], None):
            raise RuntimeError(f"absent: pip install {package}") from None
        raise RuntimeError(f"{package} cannot be imported here: {error}") from None


def on_gpu(x: Tensor, package: str) -> None:
    """Refuse a CPU tensor for kernels that exist for GPUs only.

    Raises:
        RuntimeError: the tensor is on a CPU.
    """
    if not x.is_cuda:
        raise RuntimeError(f"{package} needs a GPU")


def trl_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's fused head: log-probability and entropy."""
    function = imported("trl.trainer.utils", "'trl>=1.16'")._ChunkedLogProbFunction
    outputs = ("entropy",)
    logprob, entropy, *_ = function.apply(hidden, weight, None, target, 1.0, TRL_TILE, None, 1.0, outputs)
    return logprob, entropy


def verl_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """verl's Triton head: log-probability and entropy."""
    module = imported("verl.utils.kernel.linear_cross_entropy", "verl")
    on_gpu(hidden, "verl's kernel")
    logprob, entropy = module.linear_cross_entropy(hidden, weight, target, 1.0, "none", None)
    return logprob, entropy


def liger_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's fused linear cross entropy."""
    module = imported("liger_kernel.transformers", "liger-kernel")
    on_gpu(hidden, "Liger's fused linear cross entropy")
    loss: Tensor = module.LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)
    return loss


def cce(*, filter_eps: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Apple's Cut Cross-Entropy; with its filter it leaves out small gradients."""

    def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        module = imported("cut_cross_entropy", "cut-cross-entropy")
        on_gpu(hidden, "CCE")
        loss: Tensor = module.linear_cross_entropy(hidden, weight, target, filter_eps=filter_eps)
        return loss

    return cross_entropy


def liger_chunked_grpo(
    hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, row_weight: Tensor, *, group: int
) -> Tensor:
    """Liger's chunked GRPO loss over the head, a sequence of `group` rows at a time; DAPO's token mean."""
    module = imported("liger_kernel.chunked_loss", "liger-kernel")
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=hidden.is_cuda)
    n = hidden.shape[0]
    if n % group:
        raise RuntimeError(f"Liger's GRPO loss takes whole sequences, and {n} rows are no multiple of {group}")
    found: Tensor = loss(
        hidden.view(n // group, group, -1),
        weight,
        target.view(n // group, group),
        (row_weight != 0).view(n // group, group).to(torch.float32),
        advantage.view(n // group, group)[:, 0],
    )[0]
    return found


def liger_triton_grpo(
    hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, row_weight: Tensor, *, group: int
) -> Tensor:
    """Liger's GRPO kernel on logits that are all in memory."""
    module = imported("liger_kernel.transformers.grpo_loss", "liger-kernel")
    on_gpu(hidden, "triton_grpo_loss")
    n = hidden.shape[0]
    if n % group:
        raise RuntimeError(f"Liger's GRPO loss takes whole sequences, and {n} rows are no multiple of {group}")
    logits = torch.nn.functional.linear(hidden, weight).view(n // group, group, -1)
    # It takes one position more than it judges: the one after the last token.
    padded = torch.cat([logits, logits[:, -1:]], dim=1)
    loss, _ = module.triton_grpo_loss(
        padded,
        None,
        None,
        target.view(n // group, group),
        advantage.view(n // group, group)[:, 0],
        (row_weight != 0).view(n // group, group).to(torch.float32),
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        loss_type="dapo",
        reduce=True,
    )
    found: Tensor = loss
    return found


def bare_products(hidden: Tensor, weight: Tensor, *_others: Any) -> Tensor:
    """The three matrix products of a head, forward and backward, in the inputs' precision and nothing between: 6NDV.

    On a GPU over all rows at once, the fastest form; on a CPU in the ops' chunks, as logits out of cache are slower.
    """
    fed, multiplied = hidden.detach(), weight.detach()
    n, v = fed.shape[0], multiplied.shape[0]
    d_weight = torch.zeros_like(multiplied)
    for rows in chunks(n, n if fed.is_cuda else default_chunk_rows(n, v, fed.device)):
        logits = fed[rows] @ multiplied.t()
        torch.mm(logits, multiplied)
        torch.addmm(d_weight, logits.t(), fed[rows], out=d_weight)
    return d_weight
