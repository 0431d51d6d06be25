"""The native operators of a decoding step against those in torch, and which of them a model gets."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fastrl.rollout import decode_operators
from fastrl.rollout.decode_operators import NATIVE, TORCH, Heads, operators_for
from fastrl.rollout.kv import RoomyLayer

built = pytest.mark.skipif(find_spec("fastrl._C") is None, reason="fastrl._C is not built here")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled_cache(rows: int, heads: Heads, used: int, room: int, dtype: torch.dtype) -> RoomyLayer:
    keys = torch.zeros(1, heads.key, used, heads.width, dtype=dtype)
    layer = RoomyLayer(keys, keys, batch=rows, used=used, limit=room)
    layer.keys[:, :, :used] = randn(rows, heads.key, used, heads.width, seed=1)
    layer.values[:, :, :used] = randn(rows, heads.key, used, heads.width, seed=2)
    return layer


@built
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("query", "key", "width"), [(1, 1, 2), (4, 2, 16), (3, 3, 12), (8, 2, 40), (6, 1, 64)])
@pytest.mark.parametrize("used", [1, 15, 16, 70])
def test_attention_is_that_of_float64_and_the_cache_gets_the_same_token(
    query: int, key: int, width: int, used: int, has_norm: bool, is_masked: bool
):
    assert operators_for(torch.zeros(1)) is NATIVE
    rows, heads = 5, Heads(query, key, width, 0.3, 1e-6)
    qkv = randn(rows, (query + 2 * key) * width)
    head_norm = 1.0 + 0.3 * randn(query + key, width, seed=3) if has_norm else None
    angle = randn(rows, width // 2, seed=4).repeat(1, 2)
    mask = None
    if is_masked:
        mask = torch.zeros(rows, 1, 1, used + 9)
        mask[2, ..., : used // 2] = torch.finfo(torch.float32).min
        mask = mask[..., : used + 1]
    results = []
    for operators, dtype in ((TORCH, torch.float64), (TORCH, torch.float32), (NATIVE, torch.float32)):
        cache = filled_cache(rows, heads, used, used + 4, dtype)
        inputs = [None if x is None else x.to(dtype) for x in (qkv, head_norm, angle.cos(), angle.sin(), mask)]
        x, norm, cos, sin, seen = inputs
        assert x is not None
        assert cos is not None
        assert sin is not None
        out = operators.attended(x, norm, (cos, sin), cache, seen, heads)
        assert cache.used == used + 1
        results.append((out, cache.keys[:, :, : used + 1], cache.values[:, :, : used + 1]))
    truth, naive, got = results
    for exact, plain, ours in zip(truth, naive, got, strict=True):
        # The norm of a head works in float32 in all of them.
        assert float((ours - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + 2e-6


@built
def test_norm_and_gate_are_those_of_torch():
    assert operators_for(torch.zeros(1)) is NATIVE
    x, weight = randn(7, 36), randn(36, seed=1)
    torch.testing.assert_close(NATIVE.normed(x, weight, 1e-6), TORCH.normed(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(NATIVE.gated(x), TORCH.gated(x), rtol=1e-5, atol=1e-6)


def test_other_precisions_and_missing_builds_get_torch(monkeypatch: pytest.MonkeyPatch):
    assert operators_for(torch.zeros(1, dtype=torch.bfloat16)) is TORCH
    assert operators_for(torch.zeros(1, dtype=torch.float64)) is TORCH
    monkeypatch.setattr(decode_operators, "find_spec", lambda name: None)
    assert operators_for(torch.zeros(1)) is TORCH


@built
def test_direct_calls_with_wrong_memory_raise_instead_of_reading_it():
    assert operators_for(torch.zeros(1)) is NATIVE
    qkv, cos, keys, norm = torch.ones(3, 32), torch.ones(3, 4), torch.ones(3, 2, 6, 4), torch.ones(6, 4)
    call = torch.ops.fastrl.decode_attention
    for inputs, message in (
        ((qkv[:, :31], norm, 1e-6, cos, cos, keys, keys, 5, None, 4, 1.0), "qkv must be .* with 96 numbers"),
        ((qkv, norm[:5], 1e-6, cos, cos, keys, keys, 5, None, 4, 1.0), "head_norm must be .* with 24 numbers"),
        ((qkv, norm, 1e-6, cos[:2], cos, keys, keys, 5, None, 4, 1.0), "cos must be .* with 12 numbers"),
        ((qkv, norm, 1e-6, cos, cos, keys, keys, 6, None, 4, 1.0), "keys must be .* with room for place 6"),
        ((qkv, norm, 1e-6, cos, cos, keys, keys[:, :, :5], 5, None, 4, 1.0), "values must be .* room for place 5"),
        ((qkv, norm, 1e-6, cos, cos, keys, keys, 5, None, 3, 1.0), "heads of keys must divide 3"),
        ((qkv, norm, 1e-6, cos, cos, keys, keys, 5, torch.ones(3, 5), 4, 1.0), r"mask must be .* \[B, place \+ 1\]"),
        ((qkv, norm, 1e-6, cos, cos, keys, keys, -1, None, 4, 1.0), "place must be at least 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*inputs)
