"""Counted work and memory of the waist: the figures that docs/kernels.md states, on every backend that runs here.

Work is counted in units of one product of the whole head, 2 N D V operations: the single pass is 3 of them, 6 N D V.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastrl.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import MemoryMeter, gemm_flops, linear_logprob_inputs
from tests.ops.test_properties import backends

N, D, V = 24, 8, 40
BACKENDS = pytest.mark.parametrize("backend", [*backends(linear_token_loss), "triton"])
ROWS = torch.arange(N)


def leaves(n=N, d=D, v=V, *, frozen=False, dtype=torch.float32, peak=0.0):
    hidden, weight, target = linear_logprob_inputs(n, d, v, dtype=dtype, peak=peak)
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), target


def units(run, n=N, d=D, v=V):
    return gemm_flops(run) / (2 * n * d * v)


def nll(logprob, entropy, rows):
    return -logprob


def policy_loss(advantage):
    """PPO's surrogate, on policy, except that rows 1, 4, 7, ... moved past the clip in the direction of their gain."""

    def clipped(logprob, entropy, rows):
        moved = torch.where(rows % 3 == 1, 0.5 * advantage[rows].sign(), 0.0)
        ratio = (logprob - logprob.detach() + moved).exp()
        return -torch.minimum(ratio * advantage[rows], ratio.clamp(0.8, 1.2) * advantage[rows])

    return clipped


def work(x, loss_fn=nll, **options):
    return units(lambda: linear_token_loss(*x, loss_fn, chunk_rows=8, **options).loss.backward())


@BACKENDS
def test_the_single_pass_is_three_products_and_a_frozen_head_two(backend):
    assert work(leaves(), backend=backend) == 3
    assert work(leaves(frozen=True), backend=backend) == 2
    hidden, weight, target = leaves()
    assert work((hidden.detach(), weight, target), backend=backend) == 2
    assert units(lambda: linear_cross_entropy(*leaves(), chunk_rows=8, backend=backend).backward()) == 3
    assert units(lambda: linear_cross_entropy(*leaves(frozen=True), chunk_rows=8, backend=backend).backward()) == 2


def test_without_a_gradient_one_product_is_left():
    with torch.no_grad():
        for op in (linear_logprob, linear_cross_entropy, partial(linear_token_loss, loss_fn=nll)):
            assert units(lambda op=op: op(*leaves(), chunk_rows=8)) == 1


@BACKENDS
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_masked_rows_cost_nothing(share, backend):
    is_masked = 4 * share > ROWS % 4
    assert work(leaves(), row_weight=(~is_masked).float(), backend=backend) == pytest.approx(3 * (1 - share))
    hidden, weight, target = leaves()
    target = target.masked_fill(is_masked, -100)
    loss = partial(linear_cross_entropy, hidden, weight, target, chunk_rows=8, backend=backend)
    assert units(lambda: loss().backward()) == pytest.approx(3 * (1 - share))


@BACKENDS
def test_clipped_rows_and_rows_without_advantage_cost_one_product_of_three(backend):
    ones = torch.ones(N)
    assert work(leaves(), policy_loss(ones * 0), backend=backend) == 1
    assert work(leaves(), policy_loss(ones), backend=backend) == pytest.approx(1 + 2 * 2 / 3)  # a third is clipped
    advantage = torch.where(ROWS < N // 2, 0.0, 1 - 2 * (ROWS % 2))  # zero-advantage groups: a half
    # Of the other half a third is clipped.
    assert work(leaves(), policy_loss(advantage), backend=backend) == pytest.approx(1 + 2 * 1 / 3)
    # Half of the batch is prompt and never arrives; of the rest a third is clipped.
    masked = {"row_weight": (ROWS >= N // 2).float()}
    assert work(leaves(), policy_loss(ones), **masked, backend=backend) == pytest.approx(1 / 2 * (1 + 2 * 2 / 3))


@BACKENDS
@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_ignored_targets_cost_one_product_and_their_rows_stay_out_of_the_gradient(broken, backend):
    def x():
        hidden, weight, target = leaves()
        with torch.no_grad():
            hidden[::2] += broken
        return hidden, weight, target.masked_fill(ROWS % 2 == 0, -100)

    inputs = x()
    assert work(inputs, backend=backend) == 1 + 2 * 1 / 2
    assert all(one.grad.isfinite().all() for one in inputs[:2])
    inputs = x()
    statistics = partial(linear_logprob, *inputs, cache_gib=0.0, chunk_rows=8, backend=backend)
    assert units(lambda: statistics().logprob.sum().backward()) == 1 + 3 * 1 / 2
    assert all(one.grad.isfinite().all() for one in inputs[:2])


@BACKENDS
@pytest.mark.parametrize("tolerance", [1e-3, 0.05, 0.5])
def test_certified_rows_cost_one_product_of_three(tolerance, backend):
    hidden, weight, target = leaves(N, 64, 200, peak=25.0)
    with torch.no_grad():
        hidden[::8] = 0  # three rows know nothing; they carry the gradient
    loss = partial(linear_token_loss, hidden, weight, target, nll, skip_tolerance=tolerance, backend=backend)
    counted = units(lambda: loss().loss.backward(), N, 64, 200)
    moved = (hidden.grad != 0).any(1).sum().item()
    assert 0 < moved <= N // 8
    assert counted == pytest.approx(1 + 2 * moved / N)


@BACKENDS
@pytest.mark.parametrize("cached", [0, 8, 16, 24])
def test_only_rows_outside_the_cache_are_multiplied_again(cached, backend):
    hidden, weight, target = leaves()
    options = {"chunk_rows": 8, "cache_gib": cached * V * 4 / 2**30, "backend": backend}
    step = lambda: linear_logprob(hidden, weight, target, **options).logprob.sum().backward()  # noqa: E731
    assert units(step) == pytest.approx(3 + (N - cached) / N)


def logprob(hidden, weight, target, **options):
    stats = linear_logprob(hidden, weight, target, **options)
    return (stats.logprob + stats.entropy).sum()


def token_loss(hidden, weight, target, **options):
    return linear_token_loss(hidden, weight, target, lambda lp, ent, rows: -lp - 0.1 * ent, **options).loss


def memory_bound(n, d, v, chunk, *, frozen, capped, narrow, cached=0):
    """Bytes above the inputs, gradients included, as docs/kernels.md has it; `narrow`: of 16 bits, on a CPU."""
    summed = 0 if frozen else v * d
    copied = v * d if narrow else 0  # tensor cores need no copy
    itemsize = 2 if narrow else 4
    working = max((4 if capped else 3) * chunk * v, summed)  # logits are gone when the sum is scaled or rounded
    return 4 * (working + summed + copied + 2 * n * d + 24 * n) + itemsize * cached * v


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [partial(logprob, cache_gib=0.0), token_loss, linear_cross_entropy])
def test_memory_is_a_few_chunks_and_the_sum_of_d_weight(op, dtype, capped, frozen):
    backend = backends(linear_token_loss)[0]
    for n, d, v, chunk in ((512, 2, 1999, 32), (512, 64, 1999, 32), (2048, 16, 509, 64)):
        hidden, weight, target = leaves(n, d, v, frozen=frozen, dtype=dtype)
        with MemoryMeter(hidden, weight, target) as meter:
            op(hidden, weight, target, softcap=2.0 if capped else None, chunk_rows=chunk, backend=backend).backward()
        bound = memory_bound(n, d, v, chunk, frozen=frozen, capped=capped, narrow=dtype == torch.bfloat16)
        assert meter.peak_bytes <= bound
        assert bound < 4 * n * v  # not even one matrix of logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_cache_is_its_rows_in_hiddens_type(dtype):
    hidden, weight, target = leaves(512, 16, 999, dtype=dtype)
    for cached in (0, 128, 512):
        options = {"chunk_rows": 32, "cache_gib": cached * 999 * dtype.itemsize / 2**30}
        with MemoryMeter(hidden, weight, target) as meter:
            logprob(hidden, weight, target, **options).backward()
        common = {"frozen": False, "capped": False, "narrow": dtype == torch.bfloat16}
        assert meter.peak_bytes <= memory_bound(512, 16, 999, 32, **common, cached=cached)
        assert meter.peak_bytes >= memory_bound(0, 0, 0, 0, **common) + cached * 999 * dtype.itemsize


@pytest.mark.parametrize("op", [partial(logprob, cache_gib=0.0), token_loss, linear_cross_entropy])
def test_a_frozen_head_leaves_nothing_of_its_size(op):
    hidden, weight, target = leaves(32, 128, 1000, frozen=True)
    with MemoryMeter(hidden, weight, target) as meter:
        op(hidden, weight, target, chunk_rows=8).backward()
    assert meter.largest_numel == 8 * 1000
    assert weight.grad is None
