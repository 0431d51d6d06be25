"""z = softcap(scale raw) / temperature and its slope, on the chip: what lies between a product and a softmax.

With a cap, z = OUTER tanh(INNER raw), INNER = scale / cap, OUTER = cap / temperature; without one, INNER = 0 and
z = OUTER raw, OUTER = scale / temperature. A temperature per row stays out of OUTER and divides it in the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class MapArguments(NamedTuple):
    """How a launcher passes the map: temperature [C] of the accumulation dtype or None, and two constants."""

    temperature: Tensor | None
    inner: float
    outer: float


def map_arguments(scale: float, softcap: float | None, temperature: float | Tensor, dtype: torch.dtype) -> MapArguments:
    """The arguments of the map for rows whose statistics have `dtype`."""
    inner, numerator = (0.0, float(scale)) if softcap is None else (scale / softcap, float(softcap))
    if isinstance(temperature, Tensor):
        return MapArguments(temperature.to(dtype).contiguous(), inner, numerator)
    return MapArguments(None, inner, numerator / temperature)


@triton.jit
def outer_factor(temperature_ptr, row, OUTER: tl.constexpr, dtype: tl.constexpr):
    """OUTER, divided by the rows' temperatures where they have their own."""
    # A bare constant would be rounded to f32 beside f64 numbers too.
    outer = tl.full((), OUTER, dtype)
    if temperature_ptr is not None:
        outer = outer / tl.load(temperature_ptr + row)
    return outer


@triton.jit
def squashed(raw, INNER: tl.constexpr):
    """tanh(INNER raw), or raw without a cap: z is this times the outer factor."""
    t = raw
    if INNER != 0.0:
        x = raw * tl.full((), INNER, raw.dtype)
        # exp of a number that is at most 0 cannot overflow; NaN stays NaN.
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0.0, -t, t)
    return t
