"""Row of the packed scan, forward and backward: one pass in C++ against log2(T) passes of torch.

`torch.compile` of the specification is no contender: it is a loop over tokens, which would be unrolled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Row, register
from fastrl.ops.reverse_scan import reverse_scan

SHAPES = {"16 x 8192": (131072, 8192), "128 x 1024": (131072, 1024)}  # T, longest sequence
QUICK_SHAPES = {"16 x 512": (8192, 512), "4 x 8192": (32768, 8192)}


def scan_inputs(
    total: int, longest: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x and decay [T] in f32 or f64 (never half), cu_seqlens [S + 1]."""
    generator = torch.Generator().manual_seed(0)
    precise = torch.promote_types(dtype, torch.float32)
    x = torch.randn(total, generator=generator).to(device, precise)
    decay = (0.9 + 0.1 * torch.rand(total, generator=generator)).to(device, precise)
    return x, decay, borders(total, longest, device)


def borders(total: int, longest: int, device: str) -> Tensor:
    """[S + 1] int32 borders of sequences of one length."""
    return torch.arange(0, total + 1, longest, dtype=torch.int32, device=device)


register(
    Row(
        name="reverse_scan",
        make_inputs=scan_inputs,
        spec=partial(reverse_scan, backend="reference"),
        contenders={name: partial(reverse_scan, backend=name) for name in ("torch", "native", "triton")},
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
    )
)
