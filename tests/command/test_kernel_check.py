"""The check passes what agrees, fails what does not, and tells an absent backend from a broken one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.command import kernel_check as module
from fastrl.command.kernel_check import CASES, Case, check


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.tensor([1.0, 2.0], device=device, dtype=dtype),)


def square(x: Tensor, *, backend: str) -> Tensor:
    """Value right, gradient wrong on "native"; "triton" is absent."""
    if backend == "triton":
        raise RuntimeError("backend 'triton' of square does not exist")
    return x.detach() ** 2 + 3 * x - 3 * x.detach() if backend == "native" else x**2


def broken(x: Tensor, *, backend: str) -> Tensor:
    if backend != "reference":
        raise RuntimeError("out of memory\nand more")
    return x


def checked(monkeypatch: pytest.MonkeyPatch, call: Any) -> dict[str, module.Checked]:
    monkeypatch.setattr(module, "CASES", (Case("square", call, inputs, (0,), (torch.float32,)),))
    return {record.backend: record for record in check("cpu")}


def test_a_wrong_gradient_disagrees_and_an_absent_backend_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(monkeypatch, square)
    assert found["torch"].problem is None
    assert found["torch"].error == 0
    assert found["torch"].milliseconds > 0
    assert found["native"].milliseconds is None
    # d x^2 = 2 x with cotangents (-1, 1): -2 and 4; the wrong one gives -3 and 3.
    assert (found["native"].problem, found["native"].error) == ("disagrees", 1.0)
    assert found["triton"].cannot_run == "backend 'triton' of square does not exist"
    assert found["triton"].problem is None


def test_a_backend_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(monkeypatch, broken)["torch"].problem == "RuntimeError: out of memory"


def test_every_op_agrees_with_float64_on_every_backend_of_this_machine() -> None:
    records = list(check("cpu"))
    assert [record for record in records if record.problem] == []
    products = {record.op for record in records if record.floor_fraction}
    assert products == {case.op for case in CASES if case.op.startswith("linear_")}
    ran = {(record.op, record.backend) for record in records if record.error is not None}
    assert {(case.op, "torch") for case in CASES} <= ran
    assert ("reverse_scan", "triton") in ran  # interpreted in tests


def test_every_op_of_the_library_has_a_case() -> None:
    from importlib import import_module
    from pkgutil import iter_modules

    from fastrl import ops
    from fastrl.ops.backend import Implementations

    values = [x for item in iter_modules(ops.__path__, "fastrl.ops.") for x in vars(import_module(item.name)).values()]
    assert {x.op for x in values if isinstance(x, Implementations)} == {case.op for case in CASES}
