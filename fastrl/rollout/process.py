"""A built-in engine in a process of its own, so that sampling runs while the trainer computes.

    trainer --weights--> shared memory <--reads-- child        prompts and rollouts travel over a socket

Two threads of one Python process do not overlap: each holds the interpreter between its small operations. The child has
its own copy of the model; `load_weights` writes the shared memory and lets the child read it. It ends with the trainer,
whatever ends that. A child that dies or hangs costs the completions of one call: they come back with finish_reason
"error", and a new child starts from the weights that are in the shared memory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.engine import Sampling, check_sampling
from fastrl.rollout.process_child import Start
from fastrl.rollout.seeds import request_seed
from fastrl.rollout.shared_weights import share
from fastrl.rollout.weights import copy_weights
from fastrl.types import Rollout

SECONDS_TO_START = 300.0  # it imports torch and transformers, and may wait for a GPU's context
SECONDS_TO_END = 30.0  # between the end of its connection and its own: an interpreter that is leaving
MOST_LOSSES = 3  # of the process in a row before the run ends
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from fastrl.rollout.process_child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class EngineProcessError(RuntimeError):
    """The sampling process does not start, or was lost several times in a row."""


class _LostError(Exception):
    """The process ended or hung; the message says how."""


class ProcessEngine:
    """Samples in a child process; meets `fastrl.rollout.engine.Engine`. Call it from one thread at a time.

    Args:
        model: copied; the child computes on its device.
        tokenizer: gives the EOS token and the text for stop strings.
        batch_size: most rows decoded together.
        seed: of the generator for calls without seeds.
        timeout_seconds: a call that takes longer has hung.
        modules: to import in the child before it reads the model: those that register its attention.

    Raises:
        EngineProcessError: the child does not start.
        ValueError: weights that cannot be shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 256,
        seed: int = 0,
        timeout_seconds: float = 1800.0,
        modules: Sequence[str] = (),
    ) -> None:
        if batch_size < 1 or not timeout_seconds > 0:
            raise ValueError(
                f"ProcessEngine needs batch_size >= 1 and timeout_seconds > 0, got {batch_size} and {timeout_seconds}"
            )
        self._shared = share(model)
        self._free = weakref.finalize(self, os.close, self._shared.descriptor)
        self._modules, self._tokenizer, self._device = tuple(modules), tokenizer, str(model.device)
        self._batch_size, self._seed, self._timeout = batch_size, seed, timeout_seconds
        self._requests_seeded = 0
        self._version = 0
        self._losses = 0
        self.lost_calls = 0
        self._child: _Child | None = None
        self._start()

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Let the child read `model`'s weights; it is idle between calls, so nothing reads what is being written."""
        copy_weights(model, self._shared.module)
        self._version = version
        try:
            self._asked(("load", version))
        except _LostError as error:
            self._recover(error)  # the new child starts from the weights just written

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order; see `fastrl.rollout.engine.Engine.generate`.

        When the child dies or hangs, every rollout of the call is empty and has finish_reason "error".

        Raises:
            EngineProcessError: that happened `MOST_LOSSES` times in a row.
        """
        check_sampling(sampling)
        ids = [tuple(int(token) for token in prompt) for prompt in prompts]
        if seeds is None:
            first = self._requests_seeded
            seeds = [request_seed(self._seed, first + i, 0) for i in range(len(ids))]
            self._requests_seeded += len(ids)
        begun = None if prefixes is None else [tuple(int(token) for token in prefix) for prefix in prefixes]
        try:
            rollouts: list[Rollout] = self._asked(("generate", ids, sampling, list(seeds), begun))
        except _LostError as error:
            self._recover(error)
            return [Rollout(prompt, (), (), "error", self._version) for prompt in ids]
        self._losses = 0
        return rollouts

    def rest(self) -> None:
        """Nothing to give back between rounds."""

    def close(self) -> None:
        """End the child and give the shared memory back; a second call does nothing."""
        if self._child is not None:
            self._child.close()
            self._child = None
        self._free()

    def _asked(self, message: tuple[Any, ...]) -> Any:
        assert self._child is not None, "the engine was closed"
        answer = self._child.ask(message, self._timeout)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _recover(self, error: _LostError) -> None:
        """Start a new child in place of the lost one, unless too many were lost."""
        self._losses += 1
        self.lost_calls += 1
        assert self._child is not None
        self._child.close()
        self._child = None
        if self._losses >= MOST_LOSSES:
            raise EngineProcessError(
                f"the sampling process was lost {self._losses} times in a row, at last it {error}; is memory short, or "
                f"a call longer than rollout.timeout_seconds = {self._timeout:g}?"
            ) from error
        print(f"the sampling process {error}; its completions are lost and a new one starts", file=sys.stderr)
        self._start()

    def _start(self) -> None:
        start = Start(
            modules=self._modules,
            structure=self._shared.structure,
            memory=self._shared.descriptor,
            tokenizer=self._tokenizer,
            device=self._device,
            threads=torch.get_num_threads(),
            batch_size=self._batch_size,
            version=self._version,
        )
        self._child = _started(self._shared.descriptor)
        try:
            self._child.connection.send(self._modules)
            answer = self._child.ask(start, SECONDS_TO_START)
            assert answer == "ready", answer
        except (_LostError, OSError) as error:
            self.close()
            raise EngineProcessError(f"the sampling process does not start: it {error}; see above") from error
        except BaseException:  # an interrupt, say: nobody holds this engine yet, so nobody else closes it
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class _Child:
    """A process, its connection, and the pipe that tells it that we are alive."""

    process: subprocess.Popen[bytes]
    connection: Connection
    life: int

    def ask(self, message: object, seconds: float) -> Any:
        """Send a message and return the answer.

        Raises:
            _LostError: no answer, in words.
        """
        try:
            self.connection.send(message)
            if not self.connection.poll(seconds):
                raise _LostError(f"gave no answer within {seconds:g} seconds")
            return self.connection.recv()
        except (EOFError, OSError):
            raise _LostError(self._end()) from None

    def _end(self) -> str:
        try:
            code = self.process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def close(self) -> None:
        self.connection.close()
        os.close(self.life)
        self.process.kill()
        self.process.wait()


def _started(memory: int) -> _Child:
    ours, theirs = socket.socketpair()
    read_end, life = os.pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno()), str(read_end), json.dumps(sys.path)],
            pass_fds=[theirs.fileno(), read_end, memory],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
    os.close(read_end)
    return _Child(process, Connection(ours.detach()), life)
