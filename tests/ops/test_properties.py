"""Random heads, losses and backends against the specification in float64: 250 for each op of the waist.

What hypothesis draws is small and near every edge: no rows, one row, one token, a vocabulary of a vector's width and
one more, weights and temperatures of every kind, forbidden tokens, ignored targets, confident rows. Values and
gradients may err as much as the specification does in the same precision, plus SLACK. Every run draws the same cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrl.ops import Lora, linear_cross_entropy, linear_logprob, linear_token_loss, logits_logprob
from fastrl.ops.backend import choose
from fastrl.ops.gemm import accumulation_dtype
from fastrl.testing import assert_no_worse_than, double, linear_logprob_inputs, value_and_grads

SLACK = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
CASES = settings(max_examples=250, deadline=None, derandomize=True)
# An interpreted kernel takes a hundred times as long: few cases, and a failure is reported as it was drawn.
INTERPRETED = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@dataclass(frozen=True, slots=True)
class Head:
    """A head, its rows and its logit map, in numbers that hypothesis can draw and print."""

    n: int
    d: int
    v: int
    dtype: torch.dtype
    seed: int
    bias: str
    lora_rank: int
    temperature: str
    softcap: float | None
    logit_scale: float
    padding: int
    ignored: str
    peak: float
    row_weight: str
    chunk_rows: int | None

    def tensors(self) -> dict[str, Tensor]:
        """hidden [N, D], weight [V + padding, D], and what there is of bias, lora_a and lora_b."""
        hidden, weight, _ = self._drawn()
        total = self.v + self.padding
        tensors = {"hidden": hidden, "weight": weight}
        if self.bias != "none":
            bias = torch.linspace(-1, 1, total) - (30 if self.bias == "all negative" else 0)
            if self.bias == "forbids":  # all tokens but one in three
                bias[torch.arange(total) % 3 != self.seed % 3 % self.v] = -math.inf
            tensors["bias"] = bias.to(self.dtype)
        if self.lora_rank:
            shape = (self.lora_rank, self.d), (total, self.lora_rank)
            a, b = (torch.linspace(-0.5, 0.5, math.prod(x)).reshape(x).to(self.dtype) for x in shape)
            tensors |= {"lora_a": a, "lora_b": b}
        return tensors

    def target(self) -> Tensor:
        """[N] ids, some of them negative."""
        target = self._drawn()[2]
        ignored = {"none": 0, "some": torch.arange(self.n) % 3 == 1, "all": torch.ones(self.n)}[self.ignored]
        return torch.where(torch.as_tensor(ignored).bool(), -100, target)

    def largest_lse(self) -> float:
        """max |lse|, 0 without rows."""
        with torch.no_grad():
            stats = linear_logprob(**head_arguments(self.tensors()), target=self.target(), **self.options())
        return stats.lse.abs().max().item() if self.n else 0.0

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, target = linear_logprob_inputs(self.n, self.d, self.v, peak=self.peak, seed=self.seed)
        padding = torch.full((self.padding, self.d), 9.0)  # would win every softmax
        return hidden.to(self.dtype), torch.cat([weight, padding]).to(self.dtype), target

    def options(self) -> dict[str, Any]:
        """Keywords that the specification takes too."""
        per_row = torch.linspace(0.5, 2.0, self.n)
        return {
            "temperature": {"one": 1.0, "number": 0.7, "per row": per_row}[self.temperature],
            "softcap": self.softcap,
            # A forbidden token's -inf must not turn into +inf.
            "logit_scale": abs(self.logit_scale) if self.bias == "forbids" else self.logit_scale,
            "valid_vocab": self.v if self.padding else None,
        }

    def weights(self) -> Tensor | None:
        """[N] weights of the rows, zeros among them."""
        rows = torch.arange(self.n)
        return {"none": None, "some zeros": (rows % 3) / 4, "zeros": torch.zeros(self.n)}[self.row_weight]


HEADS = st.builds(
    Head,
    n=st.sampled_from([0, 1, 2, 3, 7, 8, 17]),
    d=st.sampled_from([1, 2, 5, 16]),
    v=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 127, 128, 129, 509]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    bias=st.sampled_from(["none", "ordinary", "forbids", "all negative"]),
    lora_rank=st.sampled_from([0, 0, 1, 2]),
    temperature=st.sampled_from(["one", "number", "per row"]),
    softcap=st.sampled_from([None, 2.0]),
    logit_scale=st.sampled_from([1.0, -1.3]),
    padding=st.sampled_from([0, 1, 5]),
    ignored=st.sampled_from(["none", "some", "all"]),
    peak=st.sampled_from([0.0, 16.0]),
    row_weight=st.sampled_from(["none", "some zeros", "zeros"]),
    chunk_rows=st.sampled_from([None, 1, 3, 8]),
)
# Interpreted, a result in bf16 is cut off where a GPU rounds it.
WIDE_HEADS = HEADS.map(lambda head: replace(head, dtype={torch.float64: torch.float64}.get(head.dtype, torch.float32)))


def backends(op: Callable[..., Any]) -> list[str]:
    """What runs on CPU by itself: torch, and native where it was built with the op."""
    implementations = import_module(f"fastrl.ops.{op.__name__}")._IMPLEMENTATIONS
    return sorted({"torch", choose(None, torch.zeros(1), implementations)})


@pytest.fixture(autouse=True)
def _memory_allocated_in_cpp_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(
    function: Callable[..., Any],
    head: Head,
    tensors: dict[str, Tensor],
    backend: str,
    *,
    rounding: float = 0.0,
    **only: Any,
) -> None:
    """Assert the accuracy rule for function(tensors by name, backend=...); the specification does not take `only`."""

    def run(*values: Tensor, **kwargs: Any) -> Any:
        return function(dict(zip(tensors, values, strict=True)), **kwargs)

    spec = partial(run, backend="reference")
    inputs = tuple(tensors.values())
    # A probability is exp(z - lse) with lse rounded, where plain autograd subtracts the maximum first.
    rounding += torch.finfo(accumulation_dtype(inputs[0])).eps / 2 * head.largest_lse()
    assert_no_worse_than(
        naive=value_and_grads(spec, *inputs),
        got=value_and_grads(partial(run, backend=backend, **only), *inputs),
        truth=value_and_grads(spec, *double(inputs)),
        slack=SLACK[head.dtype] + rounding,
    )


def head_arguments(given: dict[str, Tensor]) -> dict[str, Any]:
    """hidden, weight, bias and lora as the ops take them."""
    lora = Lora(given["lora_a"], given["lora_b"], 0.5) if "lora_a" in given else None
    return {"hidden": given["hidden"], "weight": given["weight"], "bias": given.get("bias"), "lora": lora}


def check_logprob(head: Head, cache_gib: float, backend: str) -> None:
    def run(given: dict[str, Tensor], **kwargs: Any) -> Any:
        return tuple(linear_logprob(**head_arguments(given), target=head.target(), **head.options(), **kwargs))

    # A kept probability is rounded to hidden's dtype, which plain autograd does not do.
    rounding = torch.finfo(head.dtype).eps / 2 if cache_gib and head.dtype.itemsize == 2 else 0.0
    only = {"cache_gib": cache_gib, "chunk_rows": head.chunk_rows}
    check(run, head, head.tensors(), backend, rounding=rounding, **only)


def check_token_loss(head: Head, entropy_coef: float, backend: str) -> None:
    rows = torch.arange(head.n, dtype=torch.float64)
    advantage, old = (rows % 4 - 1.5).where(rows % 5 > 0, 0), -rows % 7  # a fifth of the rows has no advantage

    def clipped(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        ratio = (logprob - old[index]).clamp(max=2).exp()
        surrogate = -torch.minimum(ratio * advantage[index], ratio.clamp(0.8, 1.2) * advantage[index])
        return (surrogate - entropy_coef * (index % 2) * entropy).to(logprob.dtype)

    def run(given: dict[str, Tensor], **kwargs: Any) -> Any:
        options = {"target": head.target(), "loss_fn": clipped, "row_weight": head.weights(), **head.options()}
        result = linear_token_loss(**head_arguments(given), **options, **kwargs)
        return result.loss, *result.stats

    check(run, head, head.tensors(), backend, chunk_rows=head.chunk_rows)


def check_cross_entropy(head: Head, smoothing: float, z_loss: float, backend: str) -> None:
    def run(given: dict[str, Tensor], **kwargs: Any) -> Any:
        options = {"target": head.target(), "token_weight": head.weights(), "z_loss": z_loss, **head.options()}
        # Smoothing would spread the target over forbidden tokens: an infinite loss, which has no gradient to compare.
        options["label_smoothing"] = 0.0 if head.bias == "forbids" else smoothing
        return linear_cross_entropy(**head_arguments(given), **options, **kwargs)

    check(run, head, head.tensors(), backend, chunk_rows=head.chunk_rows)


def check_logits(head: Head, backend: str) -> None:
    given = {name: x.float() for name, x in head.tensors().items()}
    logits = (given["hidden"] @ given["weight"].t() + given.get("bias", torch.zeros(()))).to(head.dtype)

    def run(given: dict[str, Tensor], **kwargs: Any) -> Any:
        return tuple(logits_logprob(**given, target=head.target(), **head.options(), **kwargs))

    check(run, head, {"logits": logits}, backend, chunk_rows=head.chunk_rows)


CACHES = st.sampled_from([0.0, 2.0**-30 * 1000, 1.0])
BONUSES = st.sampled_from([0.0, 0.1])
SMOOTHINGS = st.sampled_from([0.0, 0.1])


@CASES
@given(HEADS, CACHES, st.sampled_from(backends(linear_logprob)))
def test_linear_logprob(head, cache_gib, backend):
    check_logprob(head, cache_gib, backend)


@CASES
@given(HEADS, BONUSES, st.sampled_from(backends(linear_token_loss)))
def test_linear_token_loss(head, entropy_coef, backend):
    check_token_loss(head, entropy_coef, backend)


@CASES
@given(HEADS, SMOOTHINGS, st.sampled_from([0.0, 1e-2]), st.sampled_from(backends(linear_cross_entropy)))
def test_linear_cross_entropy(head, smoothing, z_loss, backend):
    check_cross_entropy(head, smoothing, z_loss, backend)


@CASES
@given(HEADS, st.sampled_from(backends(logits_logprob)))
def test_logits_logprob(head, backend):
    check_logits(head, backend)


@INTERPRETED
@given(WIDE_HEADS, CACHES)
def test_linear_logprob_interpreted(head, cache_gib):
    check_logprob(head, cache_gib, "triton")


@INTERPRETED
@given(WIDE_HEADS, BONUSES)
def test_linear_token_loss_interpreted(head, entropy_coef):
    check_token_loss(head, entropy_coef, "triton")


@INTERPRETED
@given(WIDE_HEADS, SMOOTHINGS)
def test_linear_cross_entropy_interpreted(head, smoothing):
    check_cross_entropy(head, smoothing, 1e-2, "triton")


@INTERPRETED
@given(WIDE_HEADS)
def test_logits_logprob_interpreted(head):
    check_logits(head, "triton")
