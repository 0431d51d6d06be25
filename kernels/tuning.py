"""Launch configurations by architecture, and who multiplies in a forward that keeps no logits: tables, not searches.

A row of a table is correct anywhere it compiles; only its speed is an opinion until it is measured. No choice here
depends on the number of rows except `spans`, so `linear_stats` gives a row the same bits in every batch.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = "interpreted"  # the architecture of CPU tensors: tiles small enough that tests cross their borders
ROUNDING = {"enable_fp_fusion": True}  # Triton's default before 3.10, and what the audit compiles
OTHER = "other"  # an architecture without a row of its own: 64 KiB of shared memory are enough


class RowTile(NamedTuple):
    """Columns a program works on at a time, its warps, and how many such loads are under way."""

    block_v: int
    num_warps: int
    prefetch: int


class CombineTile(NamedTuple):
    """Rows and parts a program of the combining kernel works on at a time."""

    rows: int
    parts: int
    num_warps: int


class ProductTile(NamedTuple):
    """Tile of the product with statistics: rows, columns, depth; row tiles that share a sweep over columns."""

    block_n: int
    block_v: int
    block_d: int
    group: int
    num_warps: int
    num_stages: int


class Machine(NamedTuple):
    """What the cost model knows of an architecture: operations and bytes per second, programs that fill it."""

    vendor_flops: float
    triton_flops: float
    bandwidth: float
    programs: int


# Of `token_stats`.
ROWS: dict[str, RowTile] = {
    INTERPRETED: RowTile(256, 4, 1),
    OTHER: RowTile(1024, 4, 1),
    "sm_80": RowTile(4096, 8, 1),
    "sm_90": RowTile(4096, 8, 1),
    "sm_100": RowTile(2048, 8, 1),
    "gfx942": RowTile(4096, 8, 1),
}
# Of `token_gradient`, which carries nothing from block to block; until it is measured, the same.
GRADIENT_ROWS: dict[str, RowTile] = dict(ROWS)
FLOAT64_BLOCK_V, FLOAT64_WARPS = 1024, 4  # wider ones do not fit a thread's registers
COMBINE = CombineTile(32, 16, 4)
# 16-bit operands; the tile of float32 operands, which a GPU multiplies without tensor cores, is PRODUCT_FLOAT32.
PRODUCTS: dict[str, ProductTile] = {
    INTERPRETED: ProductTile(16, 128, 16, 2, 4, 1),
    OTHER: ProductTile(64, 128, 32, 8, 4, 2),
    "sm_80": ProductTile(128, 128, 64, 8, 8, 3),
    "sm_90": ProductTile(128, 128, 64, 8, 8, 3),
    "sm_100": ProductTile(128, 128, 64, 8, 8, 3),
    "gfx942": ProductTile(128, 128, 64, 8, 8, 2),
}
PRODUCT_FLOAT32 = ProductTile(64, 64, 32, 8, 4, 2)
# H200: 790 TFLOP/s dense and 4.3 TB/s measured; the other rows are data sheets at the same fractions.
MACHINES: dict[str, Machine] = {
    INTERPRETED: Machine(1.0, 1.0, 1.0, 8),
    OTHER: Machine(1e14, 6e13, 8e11, 128),
    "sm_80": Machine(2.5e14, 2.0e14, 1.7e12, 216),
    "sm_90": Machine(7.5e14, 5.5e14, 4.3e12, 264),
    "sm_100": Machine(1.6e15, 9.0e14, 6.8e12, 296),
    "gfx942": Machine(6.5e14, 4.5e14, 4.0e12, 608),
}
# (architecture, D, V) -> does the product with statistics beat the vendor's product followed by `token_stats`?
MEASURED: dict[tuple[str, int, int], bool] = {}


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, where a product of bf16 is wrong (triton#11584)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """The key of the tables for a device."""
    if device.type != "cuda" or interprets():
        return INTERPRETED
    return _device_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        # 10.3 runs what was tuned for 10.0; 8.6, 8.9 and 12.0 have less shared memory than 8.0 and 10.0.
        capability = (properties.major, properties.minor)
        name = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, OTHER)
    return name if name in ROWS else OTHER


def row_tile(logits: Tensor, table: dict[str, RowTile]) -> RowTile:
    """Tile for a chunk of logits from ROWS or GRADIENT_ROWS; no wider than a row needs, and narrow for float64."""
    tile = table[architecture(logits.device)]
    tile = _wide(tile) if logits.dtype == torch.float64 else tile
    return tile._replace(block_v=min(tile.block_v, max(128, triton.next_power_of_2(logits.shape[1]))))


def _wide(tile: RowTile) -> RowTile:
    """The tile where statistics are float64."""
    return tile._replace(block_v=min(tile.block_v, FLOAT64_BLOCK_V), num_warps=FLOAT64_WARPS)


def memory_columns(rows: Tensor) -> int:
    """Columns of rows [C, V] that may be touched: V, rounded up to 16 where every row has that much memory."""
    (n, v), stride = rows.shape, rows.stride(0)
    rounded = triton.cdiv(v, 16) * 16
    last = rows.storage_offset() + (n - 1) * stride + rounded
    is_padded = stride >= rounded and last * rows.element_size() <= rows.untyped_storage().nbytes()
    return rounded if is_padded else v


def spans(logits: Tensor, tile: RowTile) -> int:
    """Programs that share a row of logits [C, V]: more than one only where rows alone do not fill the device."""
    n, v = logits.shape
    fill = MACHINES[architecture(logits.device)].programs
    return max(1, min(fill // max(n, 1), triton.cdiv(v, tile.block_v)))


def product_tile(hidden: Tensor) -> ProductTile:
    """Tile of `linear_stats`; the same for every number of rows."""
    name = architecture(hidden.device)
    return PRODUCT_FLOAT32 if hidden.dtype == torch.float32 and name != INTERPRETED else PRODUCTS[name]


def fuses_statistics(hidden: Tensor, v: int) -> bool:
    """Whether statistics of hidden [N, D] over V tokens come sooner from `linear_stats` than from logits in memory.

    The vendor's product is faster per operation, and pays for it by writing and reading V float32 numbers a row.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return False
    name, d = architecture(hidden.device), hidden.shape[1]
    if (name, d, v) in MEASURED:
        return MEASURED[name, d, v]
    machine = MACHINES[name]
    separate = 2 * d / machine.vendor_flops + 8 / machine.bandwidth
    return 2 * d / machine.triton_flops < separate


def row_tiles(table: dict[str, RowTile]) -> tuple[tuple[RowTile, tuple[str, ...]], ...]:
    """For the audit: every tile of a table with the chips that choose it, and the narrowest, for small vocabularies."""
    tiles = _tiles_and_targets(table)
    return (*tiles, *((tile._replace(block_v=128), targets) for tile, targets in tiles[:1]))


def wide_row_tiles(table: dict[str, RowTile]) -> tuple[tuple[RowTile, tuple[str, ...]], ...]:
    """For the audit: `row_tiles` for float64."""
    return row_tiles({name: _wide(tile) for name, tile in table.items()})


def product_tiles() -> tuple[tuple[ProductTile, tuple[str, ...]], ...]:
    """For the audit: every product tile with the chips that choose it."""
    return _tiles_and_targets(PRODUCTS)


def _tiles_and_targets(table: dict) -> tuple:
    chosen: dict = {}
    for name, tile in table.items():
        if name != INTERPRETED:
            chosen.setdefault(tile, []).append(name)
    # What an unknown chip gets must compile for all.
    return tuple((tile, () if OTHER in names else tuple(names)) for tile, names in chosen.items())


def audited(
    kernel: triton.JITFunction,
    types: dict[str, str],
    constexprs: dict[str, object],
    num_warps: int,
    num_stages: int,
    targets: tuple[str, ...] = (),
    *,
    wide: bool = False,
    tensor_core: bool = False,
) -> dict:
    """One entry of a file's AUDIT: a configuration its launcher may choose, as `triton.compile` wants it.

    Args:
        kernel: the device function.
        types: of its arguments; a pointer that is not named is to f32 (f64 when `wide`), an integer is i32. An
            integer's ":16" says that 16 divides it.
        constexprs: by name; an optional pointer of None is absent, one of "*" is present after all.
        num_warps: per program.
        num_stages: of the compiler's own pipelining.
        targets: the chips that choose it; none means all.
        wide: statistics are f64.
        tensor_core: the audit fails without such instructions.
    """
    given = {name: value for name, value in constexprs.items() if value != "*"}
    number = "*fp64" if wide else "*fp32"
    signature = {
        name: "constexpr" if name in given else types.get(name, number if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    entry = {"kernel": kernel, "signature": signature, "constexprs": given, "num_warps": num_warps}
    entry |= {"num_stages": num_stages, "options": ROUNDING, "tensor_core": tensor_core}
    return entry | ({"targets": targets} if targets else {})
