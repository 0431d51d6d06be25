"""Rows of the packed scans: what one pass in C++ saves over log2(T) passes of torch.

`torch.compile` of the specification is no contender: it is a loop over tokens, which would be unrolled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Row, register
from fastrl.ops.gae import gae
from fastrl.ops.reverse_scan import reverse_scan

SHAPES = {"16 x 8192": (131072, 8192), "128 x 1024": (131072, 1024)}  # T, longest sequence
QUICK_SHAPES = {"16 x 512": (8192, 512), "4 x 8192": (32768, 8192)}


def gae_inputs(
    total: int, longest: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reward, value [T] in f32 or f64 (never half), cu_seqlens [S + 1], trained [T]: three tokens of four."""
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(total, generator=generator).to(device, _precise(dtype)) for _ in range(2))
    trained = (torch.rand(total, generator=generator) < 0.75).to(device)
    return reward, value, _borders(total, longest, device), trained


def scan_inputs(
    total: int, longest: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x and decay [T] in f32 or f64 (never half), cu_seqlens [S + 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(total, generator=generator)
    decay = 0.9 + 0.1 * torch.rand(total, generator=generator)
    return x.to(device, _precise(dtype)), decay.to(device, _precise(dtype)), _borders(total, longest, device)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _borders(total: int, longest: int, device: str) -> Tensor:
    return torch.arange(0, total + 1, longest, dtype=torch.int32, device=device)


register(
    Row(
        name="reverse_scan",
        make_inputs=scan_inputs,
        spec=partial(reverse_scan, backend="reference"),
        contenders={name: partial(reverse_scan, backend=name) for name in ("torch", "native")},
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
    ),
    Row(
        name="gae",
        make_inputs=gae_inputs,
        spec=partial(gae, backend="reference"),
        contenders={name: partial(gae, backend=name) for name in ("torch", "native")},
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        differentiable=(),
    ),
)
