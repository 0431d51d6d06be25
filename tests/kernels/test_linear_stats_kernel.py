"""The product whose tiles become statistics, against float64 logits; and the same bits in every batch."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.kernels import linear_stats as kernel
from fastrl.kernels.logit_map import map_arguments
from fastrl.kernels.tuning import INTERPRETED, MEASURED, ProductTile, architecture, fuses_statistics
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.token_stats import row_stats
from fastrl.testing import linear_logprob_inputs

TILE = ProductTile(16, 64, 16, 2, 4, 1)


def forward(hidden, weight, target, bias=None, logit_map=LogitMap(), **kwargs):  # noqa: B008
    arguments = map_arguments(logit_map.scale, logit_map.softcap, logit_map.temperature, torch.float32)
    return kernel.forward(hidden, weight, bias, target, arguments, tile=TILE, **kwargs)


def truth(hidden, weight, target, bias=None, logit_map=LogitMap()):  # noqa: B008
    raw = hidden.double() @ weight.double().t()
    return torch.stack(row_stats(raw if bias is None else raw + bias.double(), target, logit_map, with_mean=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 16, 1), (15, 32, 63), (16, 7, 64), (17, 40, 509)])
def test_statistics_are_those_of_float64_logits(n, d, v, dtype):
    hidden, weight, target = linear_logprob_inputs(n, d, v, dtype=dtype)
    got = forward(hidden, weight, target, with_mean=True)
    torch.testing.assert_close(got.double(), truth(hidden, weight, target), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2.0, 37)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_cap_scale_and_temperature_act_in_the_epilogue(softcap, temperature):
    hidden, weight, target = linear_logprob_inputs(37, 16, 200)
    target[3] = -100
    bias = torch.linspace(-1, 1, 200)
    logit_map = LogitMap(-1.3, softcap, temperature)
    got = forward(hidden, weight, target, bias, logit_map, with_mean=True)
    torch.testing.assert_close(got.double(), truth(hidden, weight, target, bias, logit_map), rtol=2e-6, atol=4e-6)
    assert got[0, 3] == 0


def test_forbidden_tokens_a_forbidden_target_and_an_id_past_the_vocabulary():
    hidden, weight, _ = linear_logprob_inputs(3, 16, 200)
    bias = torch.zeros(200)
    bias[10:190] = -math.inf  # whole tiles without a token
    target = torch.tensor([5, 100, 200])
    logprob, entropy, lse = forward(hidden, weight, target, bias)
    assert logprob[1] == -math.inf
    assert logprob[2].isnan()
    expected = truth(hidden, weight, target.clamp(max=5), bias)
    assert logprob[0].item() == pytest.approx(expected[0, 0].item(), rel=1e-6)
    torch.testing.assert_close(torch.stack([entropy, lse]).double(), expected[1:3], rtol=2e-6, atol=2e-6)


def test_a_row_has_the_same_bits_alone_and_in_every_batch():
    hidden, weight, target = linear_logprob_inputs(37, 24, 509)
    whole = forward(hidden, weight, target, with_mean=True)
    parts = [forward(hidden[a:b], weight, target[a:b], with_mean=True) for a, b in ((0, 1), (1, 20), (20, 37))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
def test_a_nan_stays_in_its_row():
    hidden, weight, target = linear_logprob_inputs(20, 16, 100)
    clean = forward(hidden, weight, target)
    hidden[7, 3] = math.nan
    got = forward(hidden, weight, target)
    others = torch.arange(20) != 7
    assert got[:, 7].isnan().all()
    torch.testing.assert_close(got[:, others], clean[:, others], rtol=0, atol=0)


def test_a_measurement_overrules_the_cost_model_and_float32_is_the_vendors(monkeypatch):
    assert architecture(torch.device("cpu")) == INTERPRETED
    hidden = torch.zeros(1, 64, dtype=torch.bfloat16)
    for answer in (True, False):
        monkeypatch.setitem(MEASURED, (INTERPRETED, 64, 1000), answer)
        assert fuses_statistics(hidden, 1000) == answer
        assert not fuses_statistics(hidden.float(), 1000)


@pytest.mark.parametrize(("d", "fuses"), [(1024, True), (4096, False)])
def test_the_cost_model_gives_small_heads_to_the_fused_product(d, fuses, monkeypatch):
    monkeypatch.setattr("fastrl.kernels.tuning.architecture", lambda device: "sm_90")
    assert fuses_statistics(torch.zeros(1, d, dtype=torch.bfloat16), 151936) == fuses
