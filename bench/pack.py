"""Row of best-fit-decreasing packing: which batch each sequence goes to, without moving a token."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from bench.registry import Row, register
from fastrl.data.pack import _best_fit_decreasing

BUDGET = 16384


def length_inputs(size: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor]:
    """[S] int64 lengths up to half of the budget; always on the CPU, where packing happens."""
    return (torch.randint(1, BUDGET // 2, (size,), generator=torch.Generator().manual_seed(0)),)


def in_python(lengths: Tensor) -> Tensor:
    """What `fastrl.data.pack` does, as [S] int64 bin of each sequence."""
    bins = np.empty(len(lengths), dtype=np.int64)
    for number, members in enumerate(_best_fit_decreasing(lengths.numpy(), BUDGET)):
        bins[members] = number
    return torch.from_numpy(bins)


def native(lengths: Tensor) -> Tensor:
    """The same assignment by `fastrl::pack_bins`."""
    if find_spec("fastrl._C") is None:
        raise RuntimeError("needs the compiled extension 'fastrl._C'")
    import_module("fastrl._C")
    bins: Tensor = torch.ops.fastrl.pack_bins(lengths, BUDGET)
    return bins


register(
    Row(
        name="pack_bins",
        make_inputs=length_inputs,
        spec=in_python,
        contenders={"python": in_python, "native": native},
        shapes={"1k": (1024,), "64k": (65536,)},
        quick_shapes={"1k": (1024,), "64k": (65536,)},
        differentiable=(),
    )
)
