"""Packed attention through fastrl._C: value and gradient against float64, family by family, and where it gives way."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrl.ops.backend
from fastrl.testing import assert_no_worse_than, double, value_and_grads
from fastrl.train import attention, native_attention
from fastrl.train.attention import packing, use_packed_attention
from fastrl.train.model import hidden_states
from fastrl.train.native_attention import is_available, packed_attention
from fastrl.train.packed_sdpa import bucketed, packed_sdpa
from tests.train.families import FAMILIES, family
from tests.train.test_attention import packed, random_sequences

pytestmark = pytest.mark.skipif(find_spec("fastrl._C") is None, reason="fastrl._C is not built here")


def borders(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()


def heads(rows: int, query_heads: int, key_heads: int, width: int, *, scale: float = 1.0) -> tuple[Tensor, ...]:
    assert is_available(torch.zeros(1), 1)  # loads the extension
    generator = torch.Generator().manual_seed(0)
    query = scale * torch.randn(rows, query_heads, width, generator=generator)
    key, value = (torch.randn(rows, key_heads, width, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("lengths", [[1], [4], [16, 1, 17], [5, 0, 3, 33, 2], [64] * 3, [130], [37] * 9, []])
@pytest.mark.parametrize(("query_heads", "key_heads", "width"), [(1, 1, 1), (4, 2, 16), (3, 1, 12), (2, 2, 40)])
def test_value_and_gradients_are_those_of_float64(lengths: list[int], query_heads: int, key_heads: int, width: int):
    cu_seqlens = borders(lengths)
    inputs = heads(sum(lengths), query_heads, key_heads, width)
    if not sum(lengths):
        assert packed_attention(*inputs, cu_seqlens, scaling=1.0).shape == inputs[0].shape
        return
    buckets = bucketed(cu_seqlens)

    def by_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_sdpa(query, key, value, buckets, scaling=0.3)

    def natively(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, cu_seqlens, scaling=0.3)

    assert_no_worse_than(
        naive=value_and_grads(by_sdpa, *inputs),
        got=value_and_grads(natively, *inputs),
        truth=value_and_grads(by_sdpa, *double(inputs)),
        slack=2e-6,
    )


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_flat_and_peaked_scores_stay_exact(scale: float):
    """At 1e4 every row sees one key, and differences of scores overflow an exponential that is not shifted."""
    inputs, cu_seqlens = heads(45, 4, 2, 16, scale=scale), borders([20, 25])
    got = value_and_grads(lambda *x: packed_attention(*x, cu_seqlens, scaling=0.25), *inputs)
    naive, truth = (
        value_and_grads(lambda *x: packed_sdpa(*x, bucketed(cu_seqlens), scaling=0.25), *numbers)
        for numbers in (inputs, double(inputs))
    )
    columns = zip((*got.values, *got.grads), (*naive.values, *naive.grads), (*truth.values, *truth.grads), strict=True)
    for a, plain, exact in columns:
        # Rounding a score of 10,000 moves its exponential by a thousandth, in any implementation.
        assert float((a - exact).norm()) <= 3 * float((plain - exact).norm()) + 1e-5 * float(exact.norm()) + 1e-6


def test_a_sequence_sees_no_other_and_no_future():
    query, key, value = heads(30, 2, 1, 8)
    cu_seqlens = borders([12, 18])
    before = packed_attention(query, key, value, cu_seqlens, scaling=1.0)
    for changed in (key.clone(), value.clone()):
        changed[20] = 100.0
        inputs = (changed, value) if changed[0, 0, 0] == key[0, 0, 0] else (key, changed)
        after = packed_attention(query, *inputs, cu_seqlens, scaling=1.0)
        assert torch.equal(after[:20], before[:20])
        assert not torch.equal(after[20:], before[20:])


def test_threads_change_nothing():
    inputs, cu_seqlens = heads(4000, 4, 2, 16), borders([40] * 100)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(value_and_grads(lambda *x: packed_attention(*x, cu_seqlens, scaling=0.25), *inputs))
    finally:
        torch.set_num_threads(before)
    for a, b in zip((*results[0].values, *results[0].grads), (*results[1].values, *results[1].grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_exact_as_through_sdpa(name: str, monkeypatch: pytest.MonkeyPatch):
    model, batch = family(name), packed(random_sequences())
    use_packed_attention(model, "sdpa")
    assert packing(model, batch.cu_seqlens, batch.max_seqlen).buckets is None
    parameters = [p for p in model.parameters() if p.requires_grad]

    def values() -> list[Tensor]:
        hidden = hidden_states(model, batch)
        grads = torch.autograd.grad(hidden.sin().sum(), parameters, allow_unused=True)
        return [hidden.detach(), *(grad for grad in grads if grad is not None)]

    got = values()
    monkeypatch.setattr(native_attention, "is_available", lambda tensor, max_seqlen: False)
    assert packing(model, batch.cu_seqlens, batch.max_seqlen).buckets is not None
    for a, b in zip(got, values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()))


def test_windows_and_caps_go_through_buckets(monkeypatch: pytest.MonkeyPatch):
    calls: list[int | None] = []
    sdpa = attention.packed_sdpa
    monkeypatch.setattr(attention, "packed_sdpa", lambda *x, **y: calls.append(y["window"]) or sdpa(*x, **y))
    for name in ("qwen3", "mistral-window", "gemma2"):
        model = family(name)
        use_packed_attention(model, "sdpa")
        hidden_states(model, packed(random_sequences()))
        assert len(calls) == {"qwen3": 0, "mistral-window": 2, "gemma2": 2}[name]
        calls.clear()


def test_long_sequences_other_precisions_and_missing_operators_keep_sdpa(monkeypatch: pytest.MonkeyPatch):
    x = torch.zeros(1)
    assert is_available(x, native_attention.LONGEST)
    assert not is_available(x, native_attention.LONGEST + 1)
    assert not is_available(x.double(), 8)
    assert not is_available(x.bfloat16(), 8)
    monkeypatch.setattr(fastrl.ops.backend, "_extension_is_loaded", lambda: False)
    assert not is_available(x, 8)


def test_direct_calls_with_wrong_memory_raise_instead_of_reading_it():
    query, key, value = heads(6, 4, 2, 8)
    cut = torch.tensor([0, 6])
    call = torch.ops.fastrl.packed_attention
    for inputs, message in (
        ((query, key[:5], value, cut), "key must be a contiguous float32 CPU tensor"),
        ((query, key, value[..., :4], cut), "value must be a contiguous"),
        ((query.double(), key, value, cut), "query must be a contiguous"),
        ((query, key[:, :1].contiguous(), value, cut), "value must have as many heads as key"),
        ((query[:, :3].contiguous(), key, value, cut), "they must divide those of query"),
        ((query, key, value, torch.tensor([0, 7])), "cu_seqlens must rise from 0 to 6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*inputs, 1.0)
    out, lse = call(query, key, value, cut, 1.0)
    backward = torch.ops.fastrl.packed_attention_backward
    for inputs, message in (
        ((query[:, :2].contiguous(), query, key, value, out, lse, cut), "grad must have as many heads as query"),
        ((query, query, key, value, out, lse[:5], cut), r"lse must be \[T, heads\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*inputs, 1.0)
