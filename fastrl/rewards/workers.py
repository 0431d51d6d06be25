"""Rewards in processes that may be killed: a hang, a crash or an exception costs the one item that caused it.

Where a reward runs: in this process when it promises `in_process` (the built-in rewards that are plain, linear Python)
or when another process could not make it (closures, models); in a worker otherwise. How a batch is cut into calls:
`fastrl.rewards.jobs`. What the processes are: `fastrl.rewards.worker`.

At most `workers` calls use a core at a time. A call that only waits (for a server, or for ever) uses none, so another
one starts beside it, up to `spare_workers` of them; a hang then costs its time limit divided by the spares.
"""

from __future__ import annotations

import os
import socket
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from selectors import EVENT_READ, DefaultSelector
from time import monotonic
from types import TracebackType
from typing import Any

from fastrl.rewards.call import Fault, Judgement, call_rewards
from fastrl.rewards.frames import FrameError, Inbox, send_frame
from fastrl.rewards.jobs import Call, RewardBatch
from fastrl.rewards.nursery import Nursery
from fastrl.rewards.protocol import Reward, traits_of

SECONDS_TO_SEND = 10.0  # a worker that is asked is idle, and reads at once
SECONDS_TO_PARK = 0.02  # a call that sleeps after this time is one that waits
MOST_RESTARTS = 3  # of the nursery within one batch


class RewardWorkers:
    """A pool of reward processes. Starts them when the first reward needs one; owns them.

    Args:
        workers: calls that use a core at a time; None takes the number of cores of this process.
        spare_workers: further calls that may wait for something at the same time.
        timeout_seconds: for one item.
        cache_size: results of pure functions that are kept, the least recently used forgotten first; 0 keeps none.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        spare_workers: int = 32,
        timeout_seconds: float = 10.0,
        cache_size: int = 65536,
    ) -> None:
        if (workers is not None and workers < 1) or spare_workers < 0 or not timeout_seconds > 0 or cache_size < 0:
            raise ValueError(
                "RewardWorkers needs workers >= 1, spare_workers >= 0, timeout_seconds > 0, cache_size >= 0; "
                f"got {workers}, {spare_workers}, {timeout_seconds}, {cache_size}"
            )
        self._workers = workers if workers is not None else cores()
        self._spare_workers = spare_workers
        self._timeout_seconds = timeout_seconds
        self._kept = _Kept(cache_size)
        self._specs: list[str] = []
        self._nursery: Nursery | None = None
        self._selector = DefaultSelector()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._channels: set[socket.socket] = set()
        self._finalizer = weakref.finalize(self, _close_all, self._channels)

    def judge(self, rewards: Sequence[Reward], inputs: Mapping[str, Any]) -> list[Judgement]:
        """As `call_rewards`: one judgement per reward, in order; what fails is a Fault of its item.

        Args:
            rewards: of one run.
            inputs: name -> value of every keyword argument on offer but the loggers; `completions` is [S].

        Raises:
            RuntimeError: a reward cannot be imported in another process.
        """
        away = [reward for reward in rewards if reward.spec and not traits_of(reward.function).in_process]
        for reward in away:
            if reward.spec not in self._specs:
                self._stop()
                self._specs.append(reward.spec)
        batches = {
            reward.name: RewardBatch(
                reward, self._specs.index(reward.spec), inputs, timeout_seconds=self._timeout_seconds
            )
            for reward in away
        }
        kept = {reward.name: self._kept.recall(reward.spec, batches[reward.name]) for reward in away}
        here = [reward for reward in rewards if reward.name not in batches]
        local = dict(
            zip([each.name for each in here], call_rewards([each.function for each in here], inputs), strict=True)
        )
        self._run(list(batches.values()))
        for name, missing in kept.items():
            self._kept.keep(batches[name], missing)
        return [
            batches[reward.name].judgement() if reward.name in batches else local[reward.name] for reward in rewards
        ]

    def close(self) -> None:
        """End the processes; the next batch would start new ones."""
        self._stop()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, batches: Sequence[RewardBatch]) -> None:
        """Make every call of the batches; on an interrupt, leave no worker with half a call."""
        waiting: deque[Call] = deque()
        restarts = 0
        try:
            while self._fill(waiting, batches) or self._busy:
                try:
                    self._start(waiting, batches)
                    for key, _ in self._selector.select(self._patience()):
                        self._read(key.data)
                    self._expire()
                except FrameError as error:
                    restarts += 1
                    self._recover()
                    if restarts > MOST_RESTARTS:
                        raise RuntimeError(
                            f"the process that starts reward workers ended {restarts} times in one batch; "
                            "does a reward kill its parent, or is memory short?"
                        ) from error
            for worker in self._idle[self._workers :]:
                self._end(worker)
        except BaseException:
            self._stop()
            raise

    def _fill(self, waiting: deque[Call], batches: Sequence[RewardBatch]) -> bool:
        """Whether a call is ready to be made."""
        for batch in batches:
            if not waiting and (call := batch.next_call(workers=self._workers)) is not None:
                waiting.append(call)
        return bool(waiting)

    def _start(self, waiting: deque[Call], batches: Sequence[RewardBatch]) -> None:
        """Make calls as long as there is room."""
        while self._has_room() and self._fill(waiting, batches):
            worker = self._idle.pop() if self._idle else self._forked()
            call = waiting.popleft()
            worker.call, worker.started, worker.is_parked = call, monotonic(), False
            self._busy.append(worker)
            try:
                send_frame(worker.channel, call.batch.request(call))
            except FrameError:  # killed while it had nothing to do, by a system short of memory, say
                call.batch.repeat(call)
                worker.call = None
                self._end(worker)

    def _has_room(self) -> bool:
        now = monotonic()
        for worker in self._busy:
            if not worker.is_parked and now - worker.started > SECONDS_TO_PARK:
                worker.is_parked = sleeps(worker.pid)
        active = sum(not worker.is_parked for worker in self._busy)
        return active < self._workers and len(self._busy) < self._workers + self._spare_workers

    def _patience(self) -> float:
        """Seconds until a limit is reached, or a call may be seen to sleep."""
        now = monotonic()
        left = [worker.deadline - now for worker in self._busy]
        if any(not worker.is_parked for worker in self._busy):
            left.append(SECONDS_TO_PARK)
        return max(0.0, min(left, default=0.0))

    def _read(self, worker: _Worker) -> None:
        try:
            answer = worker.inbox.read()
        except FrameError as error:
            call, cause = worker.call, self._end(worker)
            if call is not None:
                call.batch.fail(call, f"ended its worker ({cause}; {error})")
            return
        if answer is not None and worker.call is not None:
            worker.call.batch.finish(worker.call, answer)
            worker.call = None
            self._busy.remove(worker)
            self._idle.append(worker)

    def _expire(self) -> None:
        now = monotonic()
        for worker in [worker for worker in self._busy if worker.deadline <= now]:
            call = worker.call
            assert call is not None
            self._end(worker)
            call.batch.fail(call, f"took longer than {call.limit:g} seconds")

    def _forked(self) -> _Worker:
        if self._nursery is None:
            self._nursery = Nursery(self._specs)
        ours, theirs = socket.socketpair()
        ours.settimeout(SECONDS_TO_SEND)
        try:
            with theirs:
                worker = _Worker(self._nursery.fork(theirs), ours)
        except BaseException:
            ours.close()
            raise
        self._selector.register(ours, EVENT_READ, worker)
        self._channels.add(ours)
        return worker

    def _end(self, worker: _Worker) -> str:
        """Kill a worker; return how it ended."""
        assert self._nursery is not None
        cause = self._nursery.kill(worker.pid)
        self._forget(worker)
        return cause

    def _forget(self, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        worker.channel.close()
        self._channels.discard(worker.channel)
        for workers in (self._busy, self._idle):
            if worker in workers:
                workers.remove(worker)

    def _recover(self) -> None:
        """After the loss of the nursery, and of its workers with it: make their calls again."""
        for worker in self._busy:
            if worker.call is not None:
                worker.call.batch.repeat(worker.call)
        self._stop()

    def _stop(self) -> None:
        for worker in [*self._busy, *self._idle]:
            self._forget(worker)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


class _Worker:
    """A process and the call it is making."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.inbox = Inbox(channel)
        self.call: Call | None = None
        self.started = 0.0
        self.is_parked = False

    @property
    def deadline(self) -> float:
        return self.started + (0.0 if self.call is None else self.call.limit)


class _Kept:
    """Results of pure functions, by the hash of what they were asked."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[bytes, float | None] = OrderedDict()

    def recall(self, spec: str, batch: RewardBatch) -> dict[bytes, list[int]]:
        """Fill in what is known; let the batch judge one item of each other content, and return those contents."""
        missing: dict[bytes, list[int]] = {}
        contents = batch.contents()
        for content, items in contents.items():
            key = spec.encode() + content
            if key in self._results:
                self._results.move_to_end(key)
                batch.values.update(dict.fromkeys(items, self._results[key]))
            else:
                missing[key] = items
        if contents:
            batch.wait_for([items[0] for items in missing.values()])
        return missing

    def keep(self, batch: RewardBatch, missing: Mapping[bytes, Sequence[int]]) -> None:
        """Give the items of one content the same value, and remember it unless judging failed."""
        for key, items in missing.items():
            value = batch.values[items[0]]
            batch.values.update(dict.fromkeys(items, value))
            if not isinstance(value, Fault) and self._size:
                self._results[key] = value
                if len(self._results) > self._size:
                    self._results.popitem(last=False)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _close_all(channels: set[socket.socket]) -> None:
    for channel in channels:
        channel.close()


def sleeps(pid: int) -> bool:
    """Whether a process waits for something; False where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"S", b"D")
    except OSError:
        return False
