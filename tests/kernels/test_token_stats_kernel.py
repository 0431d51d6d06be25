"""Rows of logits to statistics, against float64: block borders, spans of a row, maps, and rows with nothing in them."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.kernels import token_stats as kernel
from fastrl.kernels.logit_map import map_arguments
from fastrl.kernels.tuning import RowTile, spans
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.token_stats import row_stats

TILE = RowTile(128, 4, 1)
MAPS = {
    "identity": LogitMap(),
    "scale and temperature": LogitMap(-1.3, None, 0.7),
    "cap": LogitMap(1.3, 4.0, 0.7),
    "cap and temperature per row": LogitMap(1.0, 4.0, torch.tensor([0.5, 0.8, 1.0, 1.5, 2.0])),
}


def forward(raw, target, logit_map=MAPS["identity"], **kwargs):
    dtype = torch.promote_types(raw.dtype, torch.float32)
    arguments = map_arguments(logit_map.scale, logit_map.softcap, logit_map.temperature, dtype)
    return kernel.forward(raw, target, arguments, **kwargs)


def logits(n, v, dtype=torch.float32):
    generator = torch.Generator().manual_seed(v)
    return (3 * torch.randn(n, v, generator=generator)).to(dtype), torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize(
    ("v", "dtype"),
    [(1, torch.float32), (128, torch.float32), *((509, x) for x in (torch.float64, torch.float32, torch.bfloat16))],
)
def test_four_statistics_are_those_of_float64(dtype, v, logit_map):
    raw, target = logits(5, v, dtype)
    got = forward(raw, target, MAPS[logit_map], with_mean=True, tile=TILE)
    truth = torch.stack(row_stats(raw.double(), target, MAPS[logit_map], with_mean=True))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


def test_few_rows_are_cut_into_spans_that_merge_to_the_same_numbers():
    raw, target = logits(1, 1000, torch.float64)
    assert spans(raw, TILE) == 8
    assert spans(raw.expand(9, -1), TILE) == 1
    alone = forward(raw, target, with_mean=True, tile=TILE)
    among = forward(raw.repeat(9, 1), target.repeat(9), with_mean=True, tile=TILE)[:, :1]
    torch.testing.assert_close(alone, among, rtol=1e-14, atol=1e-14)


def test_a_maximum_that_rises_in_every_block_and_one_that_never_does():
    up = torch.arange(600, dtype=torch.float64) / 3
    raw = torch.stack([up, up.flip(0), up - 1e4, up / 100])
    target = torch.tensor([599, 0, 300, 5])
    truth = torch.stack(row_stats(raw, target, LogitMap())[:3])
    torch.testing.assert_close(forward(raw, target, tile=TILE), truth, rtol=1e-13, atol=1e-11)


def test_forbidden_tokens_have_no_part_in_a_row_and_a_forbidden_target_is_impossible():
    raw = torch.full((4, 300), -math.inf)
    raw[:, 130], raw[:, 290] = math.log(1.0), math.log(3.0)
    raw[3, :128] = torch.finfo(torch.float32).min
    logprob, entropy, lse = forward(raw, torch.tensor([130, 290, 5, 290]), tile=TILE)
    torch.testing.assert_close(logprob, torch.tensor([0.25, 0.75, 0.0, 0.75]).log())
    torch.testing.assert_close(lse, torch.full((4,), math.log(4.0)))
    torch.testing.assert_close(entropy, torch.full((4,), math.log(4.0) - 0.75 * math.log(3.0)))


def test_ignored_targets_count_zero_and_ids_past_the_vocabulary_are_loud():
    raw, _ = logits(3, 200)
    logprob, entropy, lse = forward(raw, torch.tensor([-100, 200, 2**40]), tile=TILE)
    assert logprob[0] == 0
    assert logprob[1:].isnan().all()
    assert entropy.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_logit_is_not_swallowed_and_stays_in_its_row(bad):
    raw, target = logits(3, 300)
    clean = forward(raw, target, tile=TILE)
    raw[1, 170] = bad
    got = forward(raw, target, tile=TILE)
    assert got[:, 1].isnan().all()
    torch.testing.assert_close(got[:, [0, 2]], clean[:, [0, 2]], rtol=0, atol=0)


def test_a_row_without_a_token_has_no_mass_and_no_distribution():
    raw = torch.full((2, 300), -math.inf)
    raw[1] = math.nan
    logprob, entropy, lse = forward(raw, torch.tensor([0, 0]), tile=TILE)
    assert lse[0] == -math.inf  # what a shard of padding adds to the other ranks' sum
    assert lse[1].isnan()
    assert logprob.isnan().all()
    assert entropy.isnan().all()


def test_padding_between_rows_is_read_but_never_counted():
    raw, target = logits(4, 509)
    padded = torch.full((4, 512), math.nan)
    padded[:, :509] = raw
    torch.testing.assert_close(forward(padded[:, :509], target), forward(raw, target), rtol=0, atol=0)


def test_no_rows_are_no_work():
    assert forward(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)).shape == (3, 0)
