"""What a benchmark record holds, who is timed and who is not, and what adapters say where a peer is absent."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.__main__ import measured, provenance
from bench.linear_token_loss import CONTENDERS, eager, policy_inputs
from bench.registry import Row, all_rows
from fastrl.testing import linear_logprob_inputs

FIELDS = {
    *("contender", "dtype", "max_error", "ms", "ms_p10", "ms_p90", "repeats", "cold_ms"),
    *("useful_tflops", "useful_gb_per_s", "floor_ratio", "peak_gib", "reserved_gib"),
}


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


def wrong(x: Tensor) -> Tensor:
    return 1.01 * square(x)


def absent(x: Tensor) -> Tensor:
    raise RuntimeError("absent: pip install something")


def row() -> Row:
    return Row(
        name="square",
        make_inputs=lambda n, dtype, device: (torch.ones(n, dtype=dtype, device=device),),
        spec=square,
        contenders={"power": lambda x: x.pow(2).sum(), "wrong": wrong, "absent": absent},
        shapes={},
        quick_shapes={},
        flops=lambda n: 4.0 * n,
        bytes=lambda n, element: 3.0 * element * n,
        floor=lambda x: x.sum(),
    )


def test_a_contender_that_disagrees_or_is_absent_is_listed_and_not_timed() -> None:
    power, bad, gone = measured(row(), (1000,), dtype=torch.float32, device="cpu", quick=True)
    assert bad == {"contender": "wrong", "dtype": "float32", "max_error": pytest.approx(0.01), "disagrees": True}
    assert gone == {"contender": "absent", "dtype": "float32", "cannot_run": "absent: pip install something"}
    assert set(power) == FIELDS
    assert 0 < power["ms_p10"] <= power["ms"] <= power["ms_p90"]
    assert power["useful_tflops"] == pytest.approx(4000 / power["ms"] / 1e9)
    assert power["useful_gb_per_s"] == pytest.approx(12000 / power["ms"] / 1e6)
    assert power["floor_ratio"] > 0
    assert power["peak_gib"] >= 4000 / 2**30  # the squares
    assert power["reserved_gib"] is None  # there is no allocator to ask on a CPU


def test_a_contender_too_large_for_the_memory_or_with_an_error_of_its_own_costs_its_record_alone() -> None:
    def hungry(x: Tensor) -> Tensor:
        if len(x) > 100:
            raise torch.OutOfMemoryError("139 GiB\nand a table of the allocator")
        return square(x)

    def broken(_: Tensor) -> Tensor:
        raise TypeError("an argument that this version has not")

    def even(x: Tensor) -> Tensor:
        if len(x) == 1000:
            raise RuntimeError("no multiple of 64")
        return square(x)

    added = {"hungry": hungry, "broken": broken, "even": even}
    given = replace(row(), check_rows=100, contenders={**row().contenders, **added})
    found = {
        each["contender"]: each for each in measured(given, (1000,), dtype=torch.float32, device="cpu", quick=True)
    }
    assert found["hungry"]["cannot_run"] == "139 GiB"
    assert found["hungry"]["max_error"] == 0
    assert found["broken"]["cannot_run"] == "an argument that this version has not"
    assert found["even"]["cannot_run"] == "no multiple of 64"
    assert found["power"]["ms"] > 0


def test_a_row_whose_data_is_missing_says_so_for_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_GSM8K", "/nowhere/train.jsonl")
    realistic = all_rows()["policy_loss_gsm8k"]
    found = list(measured(realistic, (8, 4, 50), dtype=torch.float32, device="cpu", quick=True))
    assert len(found) == len(realistic.contenders)
    assert all("needs GSM8K" in record["cannot_run"] for record in found)


def test_provenance_can_be_written_and_names_what_ran() -> None:
    found = provenance("cpu", quick=True)
    assert json.loads(json.dumps(found)) == found
    assert {"device", "threads", "versions", "commit", "tree_has_changes", "seed"} <= set(found)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]


def test_every_row_has_shapes_for_both_kinds_of_machine() -> None:
    for name, each in all_rows().items():
        assert each.quick_shapes, name
        assert next(iter(each.contenders)), name


@pytest.mark.parametrize(
    ("package", "adapter"),
    [
        ("trl", peers.trl_logprob),
        ("verl", peers.verl_logprob),
        ("liger_kernel", peers.liger_cross_entropy),
        ("cut_cross_entropy", peers.cce(filter_eps="high")),
    ],
)
def test_an_absent_peer_is_called_absent(package: str, adapter: object) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(RuntimeError, match="absent: pip install"):
        adapter(*linear_logprob_inputs(4, 8, 10))  # type: ignore[operator]


def test_the_bare_products_are_6ndv() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, d, v = 300, 16, 40
    hidden, weight, target = linear_logprob_inputs(n, d, v)
    with FlopCounterMode(display=False) as counter:
        peers.bare_products(hidden, weight, target)
    assert counter.get_total_flops() == 6 * n * d * v


@pytest.mark.parametrize(("name", "package"), [("TRL's head", "trl"), ("Liger, chunked GRPO", "liger_kernel")])
def test_a_peer_that_runs_here_computes_the_policy_loss(name: str, package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    hidden, weight, *others = policy_inputs(128, 16, 50, dtype=torch.float32, device="cpu")
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    CONTENDERS[name](*leaves, *others).backward()
    truth = [x.clone().requires_grad_() for x in (hidden, weight)]
    eager(*truth, *others).backward()  # type: ignore[no-untyped-call]
    for got, wanted in zip(leaves, truth, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-6, rtol=1e-4)
