"""Two ranks with half of the vocabulary each against one rank in float64: values, gradients and collectives."""

from __future__ import annotations

import math
import os
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastrl.ops import Lora, linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import (
    ValueAndGrads,
    assert_no_worse_than,
    cotangent,
    double,
    linear_logprob_inputs,
    value_and_grads,
)

N, D, V, RANKS = 23, 8, 42, 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ROW_WEIGHT = (torch.arange(N) % 3).double() / N
TEMPERATURE = torch.linspace(0.5, 2.0, N, dtype=torch.float64)


def token_loss(hidden, weight, bias, target, **options):
    def clipped(logprob, entropy, rows):  # half of the rows carry no gradient at all
        surrogate = torch.where(rows % 2 == 0, logprob.square(), 0)
        return surrogate - 0.1 * entropy * (rows % 4 == 0)

    result = linear_token_loss(hidden, weight, target, clipped, bias=bias, **options)
    return result.loss, *result.stats


def logprob(hidden, weight, bias, target, **options):
    return tuple(linear_logprob(hidden, weight, target, bias=bias, **options))


def cross_entropy(hidden, weight, bias, target, **options):
    return linear_cross_entropy(hidden, weight, target, bias=bias, **options)


def with_lora(hidden, weight, a, b, target, group=None):
    return tuple(linear_logprob(hidden, weight, target, lora=Lora(a, b, 0.5), process_group=group, chunk_rows=5))


MAP = {"softcap": 2.0, "logit_scale": -1.3, "temperature": TEMPERATURE}
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-2}
# name -> op, its options, what only the ranks are told, where the targets lie
CASES = {
    "logprob": (logprob, {}, {}, "anywhere"),
    "logprob, recomputed": (logprob, {}, {"cache_gib": 0.0, "chunk_rows": 5}, "anywhere"),
    "logprob, capped": (logprob, MAP, {"chunk_rows": 7}, "anywhere"),
    "logprob, second rank holds padding": (logprob, {"valid_vocab": 30}, {"chunk_rows": 7}, "first"),
    "logprob, second rank is all padding": (logprob, {"valid_vocab": 21}, {"chunk_rows": 7}, "first"),
    "logprob, first rank has no target": (logprob, MAP, {}, "second"),
    "token loss": (token_loss, {}, {}, "anywhere"),
    "token loss, compacted": (token_loss, {"row_weight": ROW_WEIGHT}, {"chunk_rows": 4}, "anywhere"),
    "token loss, capped": (token_loss, MAP | {"row_weight": ROW_WEIGHT}, {"chunk_rows": 4}, "anywhere"),
    "token loss, second rank has no target": (token_loss, {}, {"chunk_rows": 4}, "first"),
    "token loss, no row has a weight": (token_loss, {"row_weight": 0 * ROW_WEIGHT}, {}, "anywhere"),
    "cross entropy": (cross_entropy, {}, {}, "anywhere"),
    "cross entropy, smoothed": (cross_entropy, SMOOTHED, {"chunk_rows": 4}, "anywhere"),
    "cross entropy, smoothed, padded": (cross_entropy, SMOOTHED | {"valid_vocab": 21}, {"chunk_rows": 4}, "first"),
    "cross entropy, capped": (cross_entropy, SMOOTHED | MAP, {"chunk_rows": 4}, "second"),
    "cross entropy, all ignored": (cross_entropy, SMOOTHED, {}, "nowhere"),
    "cross entropy, triton": (cross_entropy, SMOOTHED | MAP, {"backend": "triton"}, "anywhere"),
    "logprob, first rank's tokens are forbidden": (logprob, {}, {}, "second"),
    "logprob, triton, tokens are forbidden": (logprob, {}, {"backend": "triton"}, "second"),
    "logprob, triton, second rank is all padding": (logprob, {"valid_vocab": 21}, {"backend": "triton"}, "first"),
}


def case_inputs(name, dtype):
    where = CASES[name][3]
    hidden, weight, target = linear_logprob_inputs(N, D, V, dtype=dtype, peak=6.0)
    target = {"anywhere": target, "first": target % 21, "second": 21 + target % 21, "nowhere": target * 0 - 100}[where]
    bias = torch.linspace(-1, 1, V, dtype=dtype)
    if "forbidden" in name:
        bias[:21] = -math.inf
    return hidden, weight, bias, target.index_fill(0, torch.tensor([3, N - 1]), -100)


def one_rank(name, dtype, backend="reference"):
    op, options, _, _ = CASES[name]
    return value_and_grads(partial(op, backend=backend, **options), *double(case_inputs(name, dtype)))


def _work(rank, folder):
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = dist.new_group([0, 1])
    part = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    found = {}
    for name, (op, options, of_ranks, _) in CASES.items():
        for dtype in DTYPES:
            hidden, weight, bias, target = case_inputs(name, dtype)
            call = partial(op, process_group=group, **options, **of_ranks)
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
                result = value_and_grads(call, hidden, weight[part], bias[part], target)
            found[name, dtype] = result, reduce.call_count
    no_rows = token_loss(torch.zeros(0, D), weight[part].float(), None, target[:0], process_group=group)[0]
    try:
        logprob(hidden, weight[part], None, target + V, process_group=group)
    except ValueError as error:
        found["refusal"] = str(error)
    found["no rows"] = no_rows
    hidden, weight, _, target = case_inputs("logprob", torch.float64)
    b = torch.linspace(-1, 1, 2 * V, dtype=torch.float64).reshape(V, 2)
    found["lora"] = value_and_grads(with_lora, hidden, weight[part], hidden[:2], b[part], target, group)
    skipping = partial(token_loss, skip_tolerance=0.2, chunk_rows=6)
    ranks_skip = partial(skipping, process_group=group)
    found["skip"] = value_and_grads(ranks_skip, hidden, weight[part], None, target)
    found["skip, one rank"] = value_and_grads(skipping, hidden, weight, None, target)
    found["lora, one rank"] = value_and_grads(with_lora, hidden, weight, hidden[:2], b, target)
    found["dtensor"] = _with_dtensors()
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def _with_dtensors():
    """Replicated and cut DTensors, and what is refused; 41 tokens make parts of 21 and 20."""
    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, weight, bias, target = (x[:41] for x in case_inputs("logprob", torch.float64))
    found = {"one rank": value_and_grads(logprob, hidden, weight, bias, target % 41)}
    for name, placement, group in (("replicated", Replicate(), None), ("cut", Shard(0), mesh.get_group())):
        leaves = [hidden.clone().requires_grad_()]
        leaves += [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in (weight, bias)]
        values = logprob(*leaves, target % 41, process_group=group)
        sum((cotangent(y, k) * y).sum() for k, y in enumerate(values)).backward()
        grads = [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for x in leaves]
        found[name] = ValueAndGrads(tuple(y.detach() for y in values), tuple(grads))
    refused = {
        "cut without a group": (distribute_tensor(weight, mesh, [Shard(0)]), None),
        "cut along D": (distribute_tensor(weight, mesh, [Shard(1)]), mesh.get_group()),
        "replicated with a group": (distribute_tensor(weight, mesh, [Replicate()]), mesh.get_group()),
    }
    for name, (distributed, group) in refused.items():
        with pytest.raises(ValueError, match="is a DTensor") as raised:
            logprob(hidden, distributed, None, target % 41, process_group=group)
        found[name] = str(raised.value)
    with pytest.raises(ValueError, match="hidden is a DTensor"):
        logprob(distribute_tensor(hidden, mesh, [Replicate()]), weight, None, target % 41)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_no_worse_than_one(ranks, name, dtype):
    first, second = (found[name, dtype][0] for found in ranks)
    for a, b in zip((*first.values, first.grads[0]), (*second.values, second.grads[0]), strict=True):
        assert torch.equal(a, b), "ranks disagree"
    parts = [torch.cat(pair) for pair in zip(first.grads[1:], second.grads[1:], strict=True)]
    op, options, _, _ = CASES[name]
    naive = value_and_grads(partial(op, backend="reference", **options), *case_inputs(name, dtype))
    assert_no_worse_than(
        naive=naive,
        got=type(first)(first.values, (first.grads[0], *parts)),
        truth=one_rank(name, dtype),
        slack={torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-3}[dtype],
    )


@pytest.mark.parametrize("name", CASES)
def test_every_rank_takes_part_in_the_same_collectives(ranks, name):
    first, second = (found[name, torch.float32][1] for found in ranks)
    assert first == second
    _, _, of_ranks, where = CASES[name]
    rows = 0 if "no row" in name or where == "nowhere" else N
    if "compacted" not in name and "row_weight" not in CASES[name][1] and not name.startswith("cross"):
        assert first == 2 * -(-rows // of_ranks.get("chunk_rows", N)) + 1  # two per chunk, one for d hidden


def test_no_rows_need_no_collective_and_give_zero(ranks):
    assert [found["no rows"].item() for found in ranks] == [0.0, 0.0]


def test_targets_are_checked_against_the_whole_vocabulary(ranks):
    for found in ranks:
        assert "below the vocabulary of 42" in found["refusal"]


def test_ranks_skip_the_same_rows(ranks):
    first, second = (found["skip"] for found in ranks)
    got = ValueAndGrads(first.values, (first.grads[0], torch.cat((first.grads[1], second.grads[1]))))
    whole = ranks[0]["skip, one rank"]
    assert_no_worse_than(naive=whole, got=got, truth=whole, slack=1e-12)
    assert (whole.grads[0] == 0).all(1).sum() > N / 2 + 1  # half of the rows have no gradient at all


def test_a_sharded_low_rank_head_gives_the_gradients_of_a_whole_one(ranks):
    first, second = (found["lora"] for found in ranks)
    got = [first.grads[0], torch.cat((first.grads[1], second.grads[1])), second.grads[2]]
    got.append(torch.cat((first.grads[3], second.grads[3])))
    whole = ranks[0]["lora, one rank"]
    assert_no_worse_than(naive=whole, got=ValueAndGrads(first.values, tuple(got)), truth=whole, slack=1e-12)


@pytest.mark.parametrize("name", ["replicated", "cut"])
def test_a_dtensor_head_gives_the_gradients_of_a_plain_one(ranks, name):
    for found in (rank["dtensor"] for rank in ranks):
        assert_no_worse_than(naive=found["one rank"], got=found[name], truth=found["one rank"], slack=1e-12)


def test_a_dtensor_that_may_be_fsdps_is_refused_with_the_remedies(ranks):
    for found in (rank["dtensor"] for rank in ranks):
        assert "unshard()" in found["cut without a group"]
        assert "process_group=weight.device_mesh.get_group()" in found["cut without a group"]
        assert "cut along dimension 0" in found["cut along D"]
        assert "cut along dimension 0" in found["replicated with a group"]


def test_parameters_that_are_not_gathered_are_refused_by_name():
    hidden, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    partitioned = torch.nn.Parameter(torch.zeros(0))
    partitioned.ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match=r"ZeRO-3 parameter .*forward, or inside .*GatheredParameters"):
        linear_logprob(hidden, partitioned, target)
    with pytest.raises(ValueError, match=r"flat outside .*summon_full_params"):
        linear_cross_entropy(hidden, torch.zeros(12), target)


def test_the_specification_has_one_rank_and_says_so(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="'reference' has one rank"):
            linear_logprob(*linear_logprob_inputs(2, 3, 5), process_group=dist.group.WORLD, backend="reference")
    finally:
        dist.destroy_process_group()
