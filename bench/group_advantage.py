"""Row of the ragged group statistics, at the sizes of one optimizer step and of a large one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Row, register
from fastrl.ops.group_advantage import group_advantage


def group_inputs(
    size: int, group_size: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """reward [S], 0 or 1 in f32 or f64 (never half), and group [S] int64 in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.randint(2, (size,), generator=generator)
    group = torch.randperm(size, generator=generator) // group_size
    return reward.to(device, torch.promote_types(dtype, torch.float32)), group.to(device)


register(
    Row(
        name="group_advantage",
        make_inputs=group_inputs,
        spec=partial(group_advantage, backend="reference"),
        contenders={
            "torch": partial(group_advantage, backend="torch"),
            "loop over groups": partial(group_advantage, backend="reference"),
            "native": partial(group_advantage, backend="native"),
            "triton": partial(group_advantage, backend="triton"),
        },
        shapes={"128 x 8": (1024, 8), "1024 x 16": (16384, 16)},
        quick_shapes={"8 x 8": (64, 8), "128 x 8": (1024, 8)},
        differentiable=(),
    )
)
