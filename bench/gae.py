"""Row of generalised advantage estimation: one pass in C++ against log2(T) passes of torch.

`torch.compile` of the specification is no contender: it is a loop over tokens, which would be unrolled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Row, register
from bench.reverse_scan import QUICK_SHAPES, SHAPES, borders
from fastrl.ops.gae import gae


def gae_inputs(
    total: int, longest: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reward, value [T] in f32 or f64 (never half), cu_seqlens [S + 1], trained [T]: three tokens of four."""
    generator = torch.Generator().manual_seed(0)
    precise = torch.promote_types(dtype, torch.float32)
    reward, value = (torch.randn(total, generator=generator).to(device, precise) for _ in range(2))
    trained = (torch.rand(total, generator=generator) < 0.75).to(device)
    return reward, value, borders(total, longest, device), trained


register(
    Row(
        name="gae",
        make_inputs=gae_inputs,
        spec=partial(gae, backend="reference"),
        contenders={name: partial(gae, backend=name) for name in ("torch", "native", "triton")},
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        bytes=lambda n, _longest, element: (4.0 * max(element, 4) + 1) * n,  # two columns in, two out, a flag
        differentiable=(),
    )
)
