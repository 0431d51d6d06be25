"""What runs in the process of `fastrl.rollout.process.ProcessEngine`: a built-in engine and the loop that asks it.

Messages are Python's own small objects; weights are read from shared memory when a message says so.
"""

from __future__ import annotations

import copy
import importlib
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.shared_weights import read_shared


@dataclass(frozen=True, slots=True)
class Start:
    """The first message.

    Attributes:
        modules: to import before the model is read, such as those that register an attention.
        structure: of the model, see `shared_weights.share`.
        memory: descriptor of its weights.
        device: where the engine computes.
        threads: of torch.
        batch_size: of the engine.
        version: of the weights.
    """

    modules: tuple[str, ...]
    structure: bytes
    memory: int
    tokenizer: PreTrainedTokenizerBase
    device: str
    threads: int
    batch_size: int
    version: int


def main(descriptor: int, life: int) -> None:
    """Serve until the parent closes the connection, or ends.

    Args:
        descriptor: of the connection.
        life: of a pipe whose other end only the parent holds: it closes with the parent, whatever ends it.
    """
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    os.dup2(2, 1)  # what a library prints must not mix with what the recipe prints for other programs
    connection = Connection(descriptor)
    modules: tuple[str, ...] = connection.recv()
    for name in modules:
        importlib.import_module(name)
    start: Start = connection.recv()
    shared = read_shared(start.structure, start.memory)
    torch.set_num_threads(start.threads)
    model = copy.deepcopy(shared).to(start.device)
    assert isinstance(model, PreTrainedModel)
    engine = BuiltinEngine(model, start.tokenizer, batch_size=start.batch_size)
    engine.version = start.version
    connection.send("ready")
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        connection.send(_answer(engine, shared, message))


def _answer(engine: BuiltinEngine, shared: torch.nn.Module, message: tuple[Any, ...]) -> Any:
    """What was asked for, or the ValueError that refuses it; anything else ends this process, which the parent sees."""
    try:
        if message[0] == "load":
            engine.load_weights(shared, message[1])
            return None
        _, prompts, sampling, seeds, prefixes = message
        return engine.generate(prompts, sampling, seeds=seeds, prefixes=prefixes)
    except ValueError as error:
        return error


def _end_with_parent(life: int) -> None:
    os.read(life, 1)
    os._exit(1)
