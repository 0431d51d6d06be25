"""Statistics of linear logits that never reach memory: a tiled product whose epilogue reduces each tile's rows.

For row n and the tile of tokens v0 <= v < v0 + BLOCK_V, with z = map(hidden[n] . weight[v] + bias[v]):

    m = max_v z      S = sum_v exp(z - m)      W = sum_v exp(z - m) (z - m)      sum_v z      z_target, if inside

`token_stats.combined` merges the tiles of a row. Sums are float32; 16-bit operands stay on the tensor cores. A row's
bits depend on its own numbers, D, V and the tile: not on the other rows, their number or its place among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.logit_map import MapArguments, outer_factor, squashed
from fastrl.kernels.token_stats import LOWEST, combined
from fastrl.kernels.tuning import (
    PRODUCT_FLOAT32,
    ROUNDING,
    ProductTile,
    audited,
    interprets,
    product_tile,
    product_tiles,
)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_map: MapArguments,
    *,
    with_mean: bool = False,
    tf32: bool = False,
    tile: ProductTile | None = None,
) -> Tensor:
    """hidden [N, D], weight [V, D], bias [V] f32, target [N] -> [3 or 4, N] f32 logprob, entropy, lse, mean_logit.

    hidden and weight are bf16, fp16 or f32; tf32 lets f32 operands be rounded to 10 bits for the tensor cores.
    """
    assert hidden.dtype == weight.dtype
    assert hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert all(x is None or x.is_contiguous() for x in (hidden, weight, bias, target))
    assert bias is None or bias.dtype == torch.float32
    (n, d), v = hidden.shape, weight.shape[0]
    tile = tile or product_tile(hidden)
    tiles = triton.cdiv(v, tile.block_v)
    partial = torch.empty((4 if with_mean else 3, tiles, n), dtype=torch.float32, device=hidden.device)
    taken = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n:
        with torch.cuda.device_of(hidden):
            _product_partials[(triton.cdiv(n, tile.block_n) * tiles,)](
                hidden,
                weight,
                bias,
                target,
                logit_map.temperature,
                partial,
                taken,
                n,
                v,
                d,
                INNER=logit_map.inner,
                OUTER=logit_map.outer,
                WITH_MEAN=with_mean,
                UPCAST=interprets(),
                PRECISION="tf32" if tf32 else "ieee",
                EVEN_D=d % tile.block_d == 0,
                BLOCK_N=tile.block_n,
                BLOCK_V=tile.block_v,
                BLOCK_D=tile.block_d,
                GROUP=tile.group,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **ROUNDING,
            )
    return combined(partial, taken, target, v)


@triton.jit(do_not_specialize=["n_rows"])
def _product_partials(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    partial_ptr,
    taken_ptr,
    n_rows,
    V,
    D,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per tile; GROUP tiles of rows go through the tokens together, so that both operands stay in L2."""
    program = tl.program_id(0)
    tiles_n, tiles_v = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(V, BLOCK_V)
    first = (program // (GROUP * tiles_v)) * GROUP
    members = tl.minimum(tiles_n - first, GROUP)
    tile_n = first + (program % (GROUP * tiles_v)) % members
    tile_v = (program % (GROUP * tiles_v)) // members
    row = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end read the last one again; nothing of them is stored or counted.
    near_row = tl.minimum(row, n_rows - 1)
    near_column = tl.minimum(column, V - 1)
    hidden_ptrs = hidden_ptr + near_row[:, None] * D + depth[None, :]
    weight_ptrs = weight_ptr + near_column.to(tl.int64)[None, :] * D + depth[:, None]
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=(start + depth < D)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(start + depth < D)[:, None], other=0.0)
        if UPCAST:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        z = tl.dot(hidden, weight, z, input_precision=PRECISION)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D

    if bias_ptr is not None:
        z += tl.load(bias_ptr + near_column)[None, :]
    outer = outer_factor(temperature_ptr, near_row, OUTER, tl.float32)
    z = squashed(z, INNER) * (outer if temperature_ptr is None else outer[:, None])
    inside = column < V
    stored = row < n_rows
    slot = partial_ptr + tile_v.to(tl.int64) * n_rows + row
    kind = tiles_v.to(tl.int64) * n_rows
    if WITH_MEAN:
        tl.store(slot + 3 * kind, tl.sum(tl.where(inside[None, :], z, 0.0), 1), mask=stored)
    target = tl.load(target_ptr + row, mask=stored, other=-1)
    is_target = column[None, :] == target[:, None]
    taken = tl.sum(tl.where(is_target, z, 0.0), 1)
    # The one tile that holds the target stores its logit.
    holds = (target >= tile_v * BLOCK_V) & (target < tile_v * BLOCK_V + BLOCK_V) & (target < V)
    tl.store(taken_ptr + row, taken, mask=stored & holds)
    # Written as a choice, because a maximum would swallow NaN.
    z = tl.where(inside[None, :], tl.where(z < LOWEST, LOWEST, z), LOWEST)
    top = tl.max(z, 1)
    step = z - top[:, None]
    e = tl.exp(step)
    tl.store(slot, top, mask=stored)
    tl.store(slot + kind, tl.sum(e, 1), mask=stored)
    tl.store(slot + 2 * kind, tl.sum(e * step, 1), mask=stored)


def _audited_product(tile: ProductTile, targets: tuple[str, ...], number: str, **options: object) -> dict:
    constexprs = {"bias_ptr": None, "temperature_ptr": None, "INNER": 0.0, "OUTER": 1.0, "WITH_MEAN": False}
    constexprs |= {"UPCAST": False, "PRECISION": "ieee", "EVEN_D": True} | options
    constexprs |= {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "GROUP": tile.group}
    types = {"hidden_ptr": f"*{number}", "weight_ptr": f"*{number}", "target_ptr": "*i64", "D": "i32:16"}
    # NVIDIA's tensor cores have no float32 without rounding.
    tensor_core = number != "fp32" or constexprs["PRECISION"] == "tf32"
    return audited(
        _product_partials, types, constexprs, tile.num_warps, tile.num_stages, targets, tensor_core=tensor_core
    )


_EVERY_OPTION = {"bias_ptr": "*", "temperature_ptr": "*", "INNER": 0.5, "WITH_MEAN": True, "EVEN_D": False}
AUDIT = (
    *(
        _audited_product(tile, targets, number, **options)
        for tile, targets in product_tiles()
        for number in ("bf16", "fp16")
        for options in ({}, _EVERY_OPTION)
    ),
    *(
        _audited_product(PRODUCT_FLOAT32, (), "fp32", PRECISION=precision, **options)
        for precision in ("ieee", "tf32")
        for options in ({}, _EVERY_OPTION)
    ),
)
