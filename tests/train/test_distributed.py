"""What ranks tell each other, on two or three real processes; and how they part when one of them fails."""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import torch

from fastrl.train import distributed
from fastrl.train.config import DistributedBlock
from fastrl.train.distributed import (
    add_up,
    any_of,
    from_first,
    gather,
    gather_bytes,
    joined,
    spread,
    to_first,
    told_tensors,
)
from tests.train.ranks import ALONE, Failed, on_ranks, results, together


def test_alone_every_exchange_is_the_identity() -> None:
    tensor = torch.arange(3.0)
    add_up([tensor], "nothing")
    spread([tensor], 0, "nothing")
    assert tensor.tolist() == [0, 1, 2]
    assert gather({"a": 1}, "nothing") == [{"a": 1}]
    assert gather_bytes(b"xy", "nothing") == [b"xy"]
    assert from_first(lambda: 3, "nothing") == 3
    assert any_of(True, "nothing")
    assert to_first({"t": tensor}, "nothing")["t"] is tensor


def exchange() -> dict[str, object]:
    with together():
        me = distributed.rank()
        distributed.BUCKET_BYTES = 40  # ten floats: several buckets
        sums = [torch.full((7,), 1.0 + me), torch.full((2, 3), 10.0 * me), torch.tensor(0.5 + me, dtype=torch.float64)]
        sums += [torch.full((30,), 2.0**-40 * (me + 1), dtype=torch.bfloat16), torch.zeros(0), torch.ones(1)]
        add_up(sums, "sums")
        theirs = [torch.full((4,), float(me)), torch.full((9,), me, dtype=torch.bfloat16)]
        spread(theirs, 1, "of rank 1")
        parts = {f"of{me}": torch.tensor([me, 7]), f"also{me}": torch.tensor(float(me))}
        told = {"x": torch.tensor([[3.5]]), "step": torch.tensor(2)} if me == 0 else {}
        return {
            "sums": [each.flatten().tolist() for each in sums],
            "spread": [each.tolist() for each in theirs],
            "gathered": gather({"me": me, "nan": math.nan, "inf": -math.inf}, "words"),
            "bytes": gather_bytes(b"abc" * me, "bytes of any length", lane="sampling"),
            "first": from_first(lambda: [me, "first"], "a word"),
            "any": [any_of(me == 1, "a yes"), any_of(False, "a no")],
            "collected": {name: value.tolist() for name, value in to_first(parts, "parts").items()},
            "told": {name: value.tolist() for name, value in told_tensors(told, "a state").items()},
        }


def test_sums_words_and_tensors_reach_every_rank() -> None:
    first, second, third = results(on_ranks(3, exchange))
    # 1 + 2 + 3, 0 + 10 + 20, 0.5 + 1.5 + 2.5, and 2^-40 (1 + 2 + 3), which bfloat16 holds
    assert first["sums"] == [[6.0] * 7, [30.0] * 6, [4.5], [6 * 2.0**-40] * 30, [], [3.0]]
    assert first["spread"] == [[1.0] * 4, [1.0] * 9]
    assert [each["me"] for each in first["gathered"]] == [0, 1, 2]
    assert all(math.isnan(each["nan"]) and each["inf"] == -math.inf for each in first["gathered"])
    assert first["bytes"] == [b"", b"abc", b"abcabc"]
    assert first["first"] == [0, "first"]
    assert first["any"] == [True, False]
    assert first["collected"] == {"of0": [0, 7], "also0": 0, "of1": [1, 7], "also1": 1, "of2": [2, 7], "also2": 2}
    assert first["told"] == {"x": [[3.5]], "step": 2}
    for other in (second, third):
        assert other["collected"] == {}
        for name in ("sums", "spread", "bytes", "first", "any", "told"):
            assert other[name] == first[name], name


def fail_on_first() -> None:
    with together():
        from_first(lambda: 1 / 0, "the answer")


def test_what_rank_0_cannot_do_fails_on_every_rank() -> None:
    first, second = on_ranks(2, fail_on_first)
    assert isinstance(first, Failed)
    assert first.kind == "ZeroDivisionError"
    assert isinstance(second, Failed)
    assert (second.kind, second.message) == ("RanksError", "rank 0 could not give the answer: division by zero")


def lose_rank_1() -> str:
    with together():
        if distributed.rank() == 1:
            os._exit(9)
        started = time.monotonic()
        try:
            add_up([torch.ones(3)], "the gradients of the step")
        except distributed.RanksError as error:
            assert time.monotonic() - started < 20, "a closed connection is noticed at once, not at the time limit"
            return str(error)
    return "nothing"


def test_a_rank_that_dies_ends_the_others_who_say_what_they_waited_for() -> None:
    found = on_ranks(2, lose_rank_1)
    # The survivor's way out meets nobody either, which is what its process ends with.
    words = found[0].trace if isinstance(found[0], Failed) else found[0]
    assert "rank 0 of 2 waited for" in words
    assert "first error of the others" in words


def come_too_late() -> None:
    with joined(replace(ALONE, distributed=DistributedBlock(timeout_seconds=1))):
        if distributed.rank() == 1:
            time.sleep(3)
        gather(1, "the rewards")


def test_a_rank_that_is_too_late_is_named_by_what_it_owes() -> None:
    found = on_ranks(2, come_too_late)[0]
    assert isinstance(found, Failed)
    assert found.kind == "RanksError"
    assert "rank 0 of 2 waited for the rewards" in found.message
    assert "distributed.timeout_seconds" in found.message


def meet_where_somebody_listens() -> None:
    os.environ["WORLD_SIZE"] = "2"
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))), together():
        pass


def test_a_port_in_use_is_named() -> None:
    found = on_ranks(1, meet_where_somebody_listens)[0]
    assert isinstance(found, Failed)
    assert found.kind == "RanksError"
    assert "another program uses the port" in found.message
    assert "torchrun --master_port" in found.message


def call_somebody_silent(said: Path) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": "1"}
    distributed.MEETING_GRACE_SECONDS = 0.5
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    at_once = replace(ALONE, distributed=DistributedBlock(timeout_seconds=1))
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))), joined(at_once):
        pass


def test_a_program_that_is_no_rank_and_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    found = on_ranks(1, call_somebody_silent, tmp_path / "said")[0]
    assert isinstance(found, Failed)
    assert found.message == "the process ended without a word"
    words = (tmp_path / "said").read_text()
    assert "rank 1 found nobody of its run at 127.0.0.1:" in words
    assert "another program may listen there. Choose another MASTER_PORT" in words


def ask_for_a_gpu() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 0
    with joined(replace(ALONE, device="cuda")):
        pass


def test_more_ranks_than_gpus_are_refused() -> None:
    found = on_ranks(2, ask_for_a_gpu)[0]
    assert isinstance(found, Failed)
    assert found.message == (
        "rank 0 is number 0 on this machine, which has 0 GPUs: start at most one process per GPU, or pass --device cpu"
    )
