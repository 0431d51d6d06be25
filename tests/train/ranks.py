"""Real processes with gloo between them, as torchrun starts them, and runs of recipes on them.

A server process imports everything once and forks, so that two ranks cost a tenth of a second and not ten.
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastrl.command.ranks import run_together
from fastrl.recipes import cpo, distill, dpo, gkd, grpo, kto, online_dpo, orpo, ppo, prm, reward, rrhf, sft
from fastrl.train.config import DistributedBlock, GRPOConfig, TrainConfig
from fastrl.train.distributed import joined

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    module.__name__.rpartition(".")[2]: module
    for module in (cpo, distill, dpo, gkd, grpo, kto, online_dpo, orpo, ppo, prm, reward, rrhf, sft)
}
ALONE = GRPOConfig(
    model_name_or_path="", output_dir="", train_dataset="", device="cpu",
    distributed=DistributedBlock(timeout_seconds=30),
)  # fmt: skip


@dataclass(frozen=True)
class Failed:
    """What a rank died of."""

    kind: str
    message: str
    trace: str


def on_ranks(n: int, function: Callable[..., Result], *arguments: Any, seconds: float = 60) -> list[Result | Failed]:
    """What `function(*arguments)` returns on each of n ranks; it joins the others itself.

    Args:
        function: of a module, as processes find it by name.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.train.ranks"])
    with contextlib.chdir(ROOT):  # where the server finds `tests`: it leaves out in silence what it cannot import
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    processes = [
        context.Process(target=_rank, args=(rank, n, port, pipes[rank][1], function, arguments)) for rank in range(n)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    found: list[Result | Failed] = []
    try:
        for receiver, _ in pipes:
            assert receiver.poll(seconds), f"a rank of {function.__name__} has said nothing for {seconds} s"
            try:
                found.append(receiver.recv())
            except EOFError:
                found.append(Failed("EOFError", "the process ended without a word", ""))
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for receiver, _ in pipes:
            receiver.close()
    return found


def results(found: list[Result | Failed]) -> list[Result]:
    """The results of ranks that must all have ended well."""
    for each in found:
        assert not isinstance(each, Failed), each.trace
    return found  # type: ignore[return-value]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside a process of `on_ranks`: the other ranks are there."""
    with joined(ALONE):
        yield


def run_recipe(name: str, config: TrainConfig) -> int | None:
    """Run a recipe as the command line does."""
    return run_together(RECIPES[name].run, config)


def on_two(name: str, config: TrainConfig, **changes: Any) -> list[int | Failed | None]:
    """The exit codes of two ranks that together take the steps of one process."""
    half = config.per_device_train_batch_size // 2
    return on_ranks(2, run_recipe, name, replace(config, per_device_train_batch_size=half, **changes))


def _rank(
    rank: int, n: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        result = function(*arguments)
    except BaseException as error:
        result = Failed(type(error).__name__, str(error), traceback.format_exc())
    sender.send(result)
    sender.close()
