"""Reward functions for workers, named by spec; a completion says what its judging does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from fastrl.rewards import promises


def misbehave(completion: str) -> Any:
    kind = completion.partition(" ")[0]
    if kind == "hang":
        time.sleep(3600)
    if kind == "spin":
        while True:
            pass
    if kind == "crash":
        os._exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        import ctypes

        ctypes.string_at(0)
    if kind == "raise":
        raise KeyError(completion)
    if kind == "type":
        return {"score": 1.0}
    if kind == "nan":
        return float("nan")
    return float(len(completion))


def one_call_per_group(completions: list[str], **_: Any) -> list[Any]:
    return [misbehave(completion) for completion in completions]


def short_list(completions: list[str], **_: Any) -> list[Any]:
    """Forgets the items it cannot judge, as a filter in a comprehension does."""
    return [1.0 for completion in completions if completion != "forget"]


@promises(per_item=True)
def each(completions: list[str], **_: Any) -> list[Any]:
    return [misbehave(completion) for completion in completions]


@promises(per_item=True)
def costly(completions: list[str], **_: Any) -> list[Any]:
    """Two milliseconds of arithmetic for each item, then what it says."""
    results = []
    for completion in completions:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        results.append(misbehave(completion))
    return results


@promises(whole_batch=True)
def rank(completions: list[str], **_: Any) -> list[float]:
    """Compares completions of different prompts."""
    if "raise" in completions:
        raise ValueError("no rank")
    return [float(sorted(completions).index(completion)) for completion in completions]


def group_size(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("length", sum(len(completion) for completion in completions) / len(completions))
    log_extra("first", [completion[0] for completion in completions])
    return [float(len(completions))] * len(completions)


async def patient(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.001)
    return [float(len(completion)) for completion in completions]


@promises(pure=True)
def counted(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Notes every call in the file that `answer` names."""
    for path in answer:
        with Path(path).open("a") as file:
            file.write("x")
    return [misbehave(completion) for completion in completions]


def step_of(completions: list[str], trainer_state: Any) -> list[float]:
    return [float(trainer_state.global_step)] * len(completions)


def leaves_children(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Starts one child in its process group and one that leaves it, notes both, and hangs."""
    children = [subprocess.Popen(["sleep", "3600"]), subprocess.Popen(["sleep", "3600"], start_new_session=True)]
    Path(answer[0]).write_text(" ".join(str(child.pid) for child in children) + f" {os.getpid()} {os.getppid()}")
    time.sleep(3600)
    return [0.0]


@promises(per_item=True)
def kills_its_nursery(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Once; the file that `answer` names remembers."""
    if not Path(answer[0]).exists():
        Path(answer[0]).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)
    return [1.0] * len(completions)


def waits(completions: list[str], **_: Any) -> list[float]:
    time.sleep(0.2)
    return [1.0] * len(completions)
