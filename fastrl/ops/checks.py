"""The public edge of the ops: shapes, dtypes and ranges are checked here, once, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_shapes(spec: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Check shapes against a spec such as "hidden[N,D] weight[V,D] target[N]"; None tensors are absent options.

    All must be on the device of the first.

    Raises:
        ValueError: a tensor with other axes or on another device, naming it, what was expected and what came.
    """
    sizes: dict[str, int] = {}
    first, home = next((name, tensor.device) for name, tensor in tensors.items() if tensor is not None)
    for item in spec.split():
        name, axes = item.rstrip("]").split("[")
        expected = axes.split(",") if axes else []
        tensor = tensors[name]
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != len(expected):
            raise ValueError(f"{name} must be [{axes}], got shape {shape}")
        for axis, size in zip(expected, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} must be [{axes}] with {axis}={sizes[axis]}, got shape {shape}")
        if tensor.device != home:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {home}: move one with .to()")


def check_head(hidden: Tensor, weight: Tensor, vocabulary: int, valid_vocab: int | None) -> None:
    """Check dtypes of a linear head, and that the valid part of its vocabulary exists, on whatever ranks.

    Raises:
        ValueError: what is wrong, and the remedy.
    """
    if hasattr(hidden, "device_mesh"):
        raise ValueError("hidden is a DTensor: pass hidden.full_tensor(), or hidden.to_local() when it is replicated")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}: cast one with .to()"
        )
    check_vocab(vocabulary, valid_vocab)


def check_vocab(size: int, valid_vocab: int | None) -> None:
    """Check that 1 <= valid_vocab <= size, and that there is a vocabulary at all."""
    if size == 0:
        raise ValueError("the vocabulary axis V must not be empty, got V=0")
    if valid_vocab is not None and not 1 <= valid_vocab <= size:
        raise ValueError(f"valid_vocab must be between 1 and V={size}, got {valid_vocab}")


def check_target(target: Tensor, vocabulary: int) -> None:
    """Check that target holds int64 token ids below `vocabulary`; negative ones are ignored tokens.

    On CUDA only the dtype is checked, because reading the range would stall the device: there an id out of range
    ends in torch's device-side assert, and under Triton in a log-probability that is NaN.

    Raises:
        ValueError: another dtype, or an id out of range.
    """
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if target.device.type == "cpu" and target.numel() and (top := int(target.max())) >= vocabulary:
        raise ValueError(f"target must be below the vocabulary of {vocabulary}, got {top} (use -100 to ignore a token)")


def check_map(temperature: float | Tensor, softcap: float | None, logit_scale: float) -> None:
    """Check temperature > 0 (a number; a tensor's values are the caller's), a finite softcap > 0 and a finite scale."""
    check_constant("temperature", temperature)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature} (greedy log-probabilities use 1)")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")


def check_one_temperature(temperature: float) -> None:
    """Check that temperature is not a tensor, for ops that have one for all rows."""
    if isinstance(temperature, Tensor):
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Check that chunk_rows, when given, is at least 1."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


def check_constant(name: str, tensor: Tensor | float | None) -> None:
    """Check that a tensor no gradient is computed for does not expect one."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        raise ValueError(f"{name} is a constant: detach() it; no gradient is computed for it")
