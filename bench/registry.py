"""What a benchmark is: a `Row` of contenders that compute the same thing, registered by the file that defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: the same inputs through several implementations, forward plus backward.

    Attributes:
        name: what the command line and the results call it.
        make_inputs: (*shape, dtype=, device=) -> inputs of every contender; the first axis of a shape is rows.
        spec: the specification; its float64 result says who is right.
        contenders: name -> function of the inputs. The first is the baseline. One that raises RuntimeError
            cannot run on this machine and is reported so; one that disagrees with `spec` is not timed.
        shapes: name -> shape, for a GPU.
        quick_shapes: name -> shape, for a CPU or `--quick`.
        flops: (*shape) -> useful floating-point operations, forward and backward; None for memory-bound work.
        bytes: (*shape, element) -> bytes that must be read and written at least; None for arithmetic-bound work.
        floor: function of the inputs that does the bare work and nothing with it (the matrix products alone). It is
            timed in turn with the contenders, and each one's time over its time is the record's `floor_ratio`.
        differentiable: places of the inputs to differentiate; None means every floating-point tensor,
            () times the forward pass alone.
        slack: error allowed over the baseline's own, relative to the largest true value.
        check_rows: accuracy is checked on this many rows, the first axis of the shape, where float64 at full
            size would not fit; None checks at full size.
    """

    name: str
    make_inputs: Callable[..., tuple[Any, ...]]
    spec: Callable[..., Any]
    contenders: Mapping[str, Callable[..., Any]]
    shapes: Mapping[str, Shape]
    quick_shapes: Mapping[str, Shape]
    flops: Callable[..., float] | None = None
    bytes: Callable[..., float] | None = None
    floor: Callable[..., Any] | None = None
    differentiable: tuple[int, ...] | None = None
    slack: float = 1e-4
    check_rows: int | None = None


class Compiled:
    """`torch.compile` of a function, made at its first call: importing the rows costs no compiler."""

    def __init__(self, function: Callable[..., Any], *, dynamic: bool = False) -> None:
        self.function = function
        self.dynamic = dynamic
        self._made: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The function's own result."""
        if self._made is None:
            import torch

            self._made = torch.compile(self.function, dynamic=self.dynamic)
        return self._made(*inputs)


_rows: dict[str, Row] = {}


def register(*rows: Row) -> None:
    """Make rows known to `python -m bench`; called once, at the end of each file that defines some."""
    for row in rows:
        if row.name in _rows:
            raise ValueError(f"two benchmark rows are called {row.name!r}")
        _rows[row.name] = row


def all_rows() -> dict[str, Row]:
    """Import every file of bench/ that registers rows, and return them by name."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        # The other files are programs of their own, and import what a machine without network may lack.
        if "\nregister(" in path.read_text():
            import_module(f"bench.{path.stem}")
    return dict(sorted(_rows.items()))
