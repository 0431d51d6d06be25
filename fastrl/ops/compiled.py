"""`linear_logprob` inside `torch.compile`: an operator of torch.library, which a graph contains as it is.

What runs is the eager op. `linear_token_loss` and `linear_cross_entropy` differentiate a Python function in forward,
which no operator can contain: they stay out of the compiler's sight and break the graph once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.ops.checks import check_map, check_vocab
from fastrl.ops.gemm import accumulation_dtype
from fastrl.ops.lora import Lora

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor target, "
    "Tensor? row_temperature, float temperature, float? softcap, float logit_scale, float lora_scale, "
    "float? cache_gib, SymInt? chunk_rows, bool batch_invariant, str? backend"
)
_DIFFERENTIABLE = 5  # the first arguments: hidden, weight, bias, lora_a, lora_b


def is_declared(hidden: Tensor, weight: Tensor, process_group: object, backend: str | None) -> bool:
    """Whether this call is being compiled and is one that the operator can stand for.

    Collectives and `main_grad` change what a graph does not see, float16 gradients must stay float32 until a
    GradScaler's factor is in them, a DTensor has no rule for the operator, and the specification is ordinary PyTorch.
    Those calls run uncompiled and break the graph once.
    """
    if not torch.compiler.is_compiling() or backend == "reference" or process_group is not None:
        return False
    is_dtensor = hasattr(weight, "device_mesh")
    return not is_dtensor and getattr(weight, "main_grad", None) is None and hidden.dtype != torch.float16


def declared_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    lora: Lora | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    cache_gib: float | None,
    chunk_rows: int | None,
    batch_invariant: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_logprob` as one node of a graph; the operator checks shapes and targets when it runs.

    Backward makes the statistics once more: 2 N D V operations beside those of `linear_logprob`.
    """
    check_map(temperature, softcap, logit_scale)
    check_vocab(weight.shape[0], valid_vocab)
    a, b, lora_scale = (None, None, 1.0) if lora is None else (lora.a, lora.b, lora.scale)
    if valid_vocab is not None:
        weight = weight[:valid_vocab]
        bias, b = (None if x is None else x[:valid_vocab] for x in (bias, b))
    rows, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    options = (rows, number, softcap, logit_scale, lora_scale, cache_gib, chunk_rows, batch_invariant, backend)
    logprob, entropy, lse = _forward(hidden, weight, bias, a, b, target, *options)
    return logprob, entropy, lse


def _eager(arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    from fastrl.ops.linear_logprob import linear_logprob

    hidden, weight, bias, a, b, target, rows, number, softcap, logit_scale, lora_scale, *others = arguments
    cache_gib, chunk_rows, batch_invariant, backend = others
    return linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        lora=None if a is None else Lora(a, b, lora_scale),
        temperature=number if rows is None else rows,
        softcap=softcap,
        logit_scale=logit_scale,
        cache_gib=cache_gib,
        chunk_rows=chunk_rows,
        batch_invariant=batch_invariant,
        backend=backend,
    )


@torch.library.custom_op(
    "fastrl::linear_logprob", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(_eager(arguments))


@_forward.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden)) for _ in range(3))


@torch.library.custom_op(
    "fastrl::linear_logprob_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor[] upstream, bool[] needs) -> Tensor[]",
)
def _backward(*arguments: Any) -> list[Tensor]:
    *others, upstream, needs = arguments
    # An operator's body runs below autograd, which differentiates an autograd.Function there and nothing else.
    leaves = [
        None if x is None else x.detach().requires_grad_(needed)
        for x, needed in zip(others[:_DIFFERENTIABLE], needs, strict=True)
    ]
    with torch.enable_grad():
        stats = _eager([*leaves, *others[_DIFFERENTIABLE:]])
    return list(torch.autograd.grad(stats, _needed(leaves, needs), upstream))


@_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _needed(arguments, arguments[-1])]


def _needed(arguments: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    return [x for x, needed in zip(arguments[:_DIFFERENTIABLE], needs, strict=True) if needed]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))


def _differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = [constant if x is None else x for x, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)]
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    grads = iter(_backward(*inputs, list(upstream), needs))
    return *(next(grads) if needed else None for needed in needs), *(None,) * (len(inputs) - len(needs))


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)
