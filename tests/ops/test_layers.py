"""Norm, feed-forward product and rotation: value and gradient of every backend against the specification in float64."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from fastrl.ops.layers import rms_norm, rotary, swiglu
from fastrl.testing import ValueAndGrads, assert_no_worse_than, double, value_and_grads

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(find_spec("fastrl._C") is None, reason="fastrl._C is not built")),
    "triton",
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def norm_in_torch(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def swiglu_in_torch(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def turned_in_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def rotary_in_torch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turned_in_torch(query, cos, sin), turned_in_torch(key, cos, sin)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(rows: int, width: int) -> tuple[Tensor, Tensor]:
    half = randn(rows, width // 2, seed=1)
    return (angle := torch.cat([half, half], dim=-1)).cos(), angle.sin()


def compare(op, spec, inputs, backend: str, *, slack: float = 1e-6, differentiable=None) -> None:
    run = partial(value_and_grads, differentiable=differentiable)
    naive: ValueAndGrads = run(spec, *inputs)
    got, truth = run(partial(op, backend=backend), *inputs), run(spec, *double(inputs))
    assert [x.dtype for x in (*got.values, *got.grads)] == [x.dtype for x in (*naive.values, *naive.grads)]
    assert_no_worse_than(naive=naive, got=got, truth=truth, slack=slack)


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (7, 5), (3, 4, 33), (300, 64), (129, 257), (0, 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_norm_and_its_gradients_are_those_of_float64(backend: str, shape: tuple[int, ...], scale: float):
    inputs = (scale * randn(*shape), 1.0 + 0.1 * randn(shape[-1], seed=1))
    options = {"epsilon": 1e-6}
    compare(partial(rms_norm, **options), partial(norm_in_torch, **options), inputs, backend)


@pytest.mark.parametrize("op", ["reference", "torch", *BACKENDS])
def test_the_norm_of_three_and_four_is_what_a_reader_computes(op: str):
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    y = rms_norm(x, weight, epsilon=1e-12, backend=op)  # the root of (9 + 16) / 2
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    y[0, 0].backward()
    # r (1 - x0^2 r^2 / 2) and -r^3 x0 x1 / 2
    torch.testing.assert_close(x.grad, torch.tensor([[1 - 9 / 25, -12 / 25]]) / 12.5**0.5)
    torch.testing.assert_close(weight.grad, torch.tensor([3 / 12.5**0.5, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_the_norms_weight_gradient_over_many_rows_does_not_depend_on_threads(backend: str):
    x, weight = randn(20000, 16), torch.ones(16)
    truth = value_and_grads(partial(norm_in_torch, epsilon=1e-6), x.double(), weight.double())
    grads = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(value_and_grads(partial(rms_norm, epsilon=1e-6, backend=backend), x, weight).grads)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(grads[0][1].double(), truth.grads[1], rtol=1e-5, atol=1e-3)


@each_backend
def test_a_frozen_weight_gets_no_gradient_and_the_rows_keep_theirs(backend: str):
    inputs = (randn(70, 33), 1.0 + 0.1 * randn(33, seed=1))
    options = {"epsilon": 1e-6}
    compare(partial(rms_norm, **options), partial(norm_in_torch, **options), inputs, backend, differentiable=(0,))


@each_backend
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 9, 31), (257, 64), (0, 4)])
def test_swiglu_and_its_gradients_are_those_of_float64(backend: str, shape: tuple[int, ...]):
    compare(swiglu, swiglu_in_torch, (4.0 * randn(*shape), randn(*shape, seed=1)), backend)


@each_backend
def test_swiglu_is_right_where_the_exponential_overflows_and_keeps_nan(backend: str):
    gate = torch.tensor([-1e4, -100.0, -87.5, -20.0, -1e-30, 0.0, 20.0, 88.5, 1e4]).requires_grad_()
    exact = gate.detach().double().requires_grad_()
    got = swiglu(gate, torch.ones(9), backend=backend)
    got.sum().backward()
    swiglu_in_torch(exact, torch.ones(9).double()).sum().backward()
    torch.testing.assert_close(got.double(), nn.functional.silu(exact), rtol=3e-7, atol=1e-30)
    assert gate.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(gate.grad.double(), exact.grad, rtol=1e-6, atol=1e-30)
    assert swiglu(torch.tensor([float("nan"), 1.0]), torch.ones(2), backend=backend).isnan().tolist() == [True, False]


@each_backend
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (5, 3, 1, 6), (40, 4, 2, 16), (9, 9, 3, 128), (0, 2, 2, 4)])
def test_rotations_and_their_gradients_are_those_of_float64(backend: str, sizes: tuple[int, int, int, int]):
    rows, heads, key_heads, width = sizes
    inputs = (randn(rows, heads, width), randn(rows, key_heads, width, seed=2), *angles(rows, width))
    compare(rotary, rotary_in_torch, inputs, backend, differentiable=(0, 1))


@each_backend
def test_columns_of_a_wider_matrix_are_read_where_they_lie(backend: str):
    x, weight = randn(6, 20)[:, 3:11], randn(8, seed=1)
    compare(partial(rms_norm, epsilon=1e-6), partial(norm_in_torch, epsilon=1e-6), (x, weight), backend)
    compare(swiglu, swiglu_in_torch, (x, randn(8, 6, seed=1).T), backend)


def test_half_precision_is_computed_in_float32_and_rounded_once():
    def rounded(spec):
        """The specification in float32, on numbers of float16."""
        return lambda *inputs, **options: spec(*(x.float() for x in inputs), **options).half()

    x, other, weight = (x.half() for x in (randn(40, 33), randn(40, 33, seed=2), 1.0 + 0.1 * randn(33, seed=1)))
    norm = partial(norm_in_torch, epsilon=1e-6)
    compare(partial(rms_norm, epsilon=1e-6), rounded(norm), (x, weight), "triton", slack=1e-3)
    compare(swiglu, rounded(swiglu_in_torch), (x, other), "triton", slack=1e-3)
    got = rms_norm(x, weight, epsilon=1e-6, backend="triton")
    exact = norm(x.double(), weight.double())
    assert float((got.double() - exact).abs().max()) <= 2**-11 * float(exact.abs().max())


def test_what_does_not_fit_is_refused_in_a_sentence():
    x, w = randn(4, 6), torch.ones(6)
    for call, message in (
        (lambda: rms_norm(x, torch.ones(5), epsilon=1e-6), r"x must be \[..., D\] with D=5"),
        (lambda: rms_norm(x, w.double(), epsilon=1e-6), "of torch.float64 as weight"),
        (lambda: swiglu(x, x[:3]), r"up must be \(4, 6\) torch.float32 as gate, got \(3, 6\)"),
        (lambda: rotary(randn(4, 2, 6), randn(4, 1, 8), x, x), r"key must be \[T,K,d\] with d=6"),
        (lambda: rotary(randn(4, 2, 3), randn(4, 1, 3), x[:, :3], x[:, :3]), "an even d, got d=3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="of swiglu is for bfloat16, float16, float32, got"):
        swiglu(x.double(), x.double(), backend="triton")
    assert swiglu(x.double(), x.double()).dtype == torch.float64
