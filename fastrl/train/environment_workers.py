"""Environments in processes that may be killed: a hang or a crash costs the one episode that caused it.

One process per seat, forked once and reset for each further episode. At most `workers` of them use a core at a time; a
tool that only waits (for a server, or for ever) uses none, so another one runs beside it. Built-in tools are bounded
and run in threads of the trainer: no process is started for a calculator, and the interpreter is a sandbox already.
"""

from __future__ import annotations

import json
import socket
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from selectors import EVENT_READ, DefaultSelector
from time import monotonic
from typing import Any

from fastrl.rewards.frames import FrameError, Inbox, send_frame
from fastrl.rewards.nursery import Nursery
from fastrl.rewards.workers import SECONDS_TO_PARK, SECONDS_TO_SEND, cores, sleeps
from fastrl.rollout.environment import Environment
from fastrl.rollout.episodes import EnvironmentFault, Environments, Request

Answer = dict[str, Any] | EnvironmentFault

MODULE = "fastrl.train.environment_worker"


class EnvironmentWorkers:
    """Owns a process per seat; meets `fastrl.rollout.episodes.Environments`. Starts them when they are first asked.

    Args:
        factory: spec of the environment; None when there are tools alone.
        tools: specs of the tools that run in the processes.
        workers: processes that use a core at a time; None takes the number of cores.
        seconds: for one request, which is one turn's calls.
    """

    def __init__(self, factory: str | None, tools: Sequence[str], *, workers: int | None, seconds: float) -> None:
        self._specs = [factory or "", *tools]
        self._workers = cores() if workers is None else workers
        self._seconds = seconds
        self._nursery: Nursery | None = None
        self._seats: dict[int, _Seat] = {}
        self._channels: set[socket.socket] = set()
        self._selector = DefaultSelector()
        self._finalizer = weakref.finalize(self, _close_all, self._channels)

    def ask(self, requests: Mapping[int, Request]) -> dict[int, Answer]:
        """As `Environments.ask`; a seat that does not answer in time is ended."""
        waiting = deque(requests)
        busy: list[_Seat] = []
        answers: dict[int, Answer] = {}
        try:
            while waiting or busy:
                while waiting and self._has_room(busy):
                    self._start(waiting.popleft(), requests, busy, answers)
                for key, _ in self._selector.select(self._patience(busy)):
                    self._read(key.data, busy, answers)
                for seat in [seat for seat in busy if seat.deadline <= monotonic()]:
                    answers[seat.number] = EnvironmentFault(f"took longer than {self._seconds:g} seconds")
                    busy.remove(seat)
                    self._end(seat)
        except BaseException:
            self.close()  # on an interrupt, leave no environment with half a request
            raise
        return answers

    def close(self) -> None:
        """End the processes; the next episode starts new ones."""
        for seat in list(self._seats.values()):
            self._forget(seat)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def _start(
        self, number: int, requests: Mapping[int, Request], busy: list[_Seat], answers: dict[int, Answer]
    ) -> None:
        """Send a request; an episode whose process is gone gets a fault, and only `reset` starts another."""
        request = requests[number]
        if number not in self._seats and "reset" not in request:
            answers[number] = EnvironmentFault("its process is gone")
            return
        try:
            text = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            answers[number] = EnvironmentFault(
                f"cannot be sent what JSON does not hold: {error}; set environment.workers to 0 to run it here"
            )
            return
        try:
            if number not in self._seats:
                self._seats[number] = self._forked(number)
            seat = self._seats[number]
            seat.began(self._seconds)
            send_frame(seat.channel, text)
        except FrameError as error:
            answers[number] = EnvironmentFault(f"its process is gone: {error}")
            if number in self._seats:
                self._end(self._seats[number])
            else:  # the nursery itself is gone, with all it had forked
                self._lose(busy, answers)
            return
        busy.append(seat)

    def _read(self, seat: _Seat, busy: list[_Seat], answers: dict[int, Answer]) -> None:
        try:
            answer = seat.inbox.read()
        except FrameError as error:
            answer = {"fault": f"ended its process ({error})"}
        if answer is None:
            return
        is_asked = seat in busy
        if is_asked:
            busy.remove(seat)
        if "fault" not in answer:
            answers[seat.number] = answer
            return
        if is_asked:
            answers[seat.number] = EnvironmentFault(answer["fault"])
        self._end(seat)

    def _has_room(self, busy: Sequence[_Seat]) -> bool:
        now = monotonic()
        for seat in busy:
            if not seat.is_parked and now - seat.started > SECONDS_TO_PARK:
                seat.is_parked = sleeps(seat.pid)
        return sum(not seat.is_parked for seat in busy) < self._workers

    @staticmethod
    def _patience(busy: Sequence[_Seat]) -> float:
        """Seconds until a limit is reached, or a request may be seen to sleep."""
        now = monotonic()
        left = [seat.deadline - now for seat in busy]
        if any(not seat.is_parked for seat in busy):
            left.append(SECONDS_TO_PARK)
        return max(0.0, min(left, default=0.0))

    def _forked(self, number: int) -> _Seat:
        if self._nursery is None:
            self._nursery = Nursery(self._specs, module=MODULE)
        ours, theirs = socket.socketpair()
        ours.settimeout(SECONDS_TO_SEND)
        try:
            with theirs:
                seat = _Seat(number, self._nursery.fork(theirs), ours)
        except BaseException:
            ours.close()
            raise
        self._selector.register(ours, EVENT_READ, seat)
        self._channels.add(ours)
        return seat

    def _end(self, seat: _Seat) -> None:
        """Kill a process and all it started."""
        self._forget(seat)
        assert self._nursery is not None
        try:
            self._nursery.kill(seat.pid)
        except FrameError:  # the nursery took its processes with it; the next fork finds out
            return

    def _forget(self, seat: _Seat) -> None:
        self._selector.unregister(seat.channel)
        seat.channel.close()
        self._channels.discard(seat.channel)
        del self._seats[seat.number]

    def _lose(self, busy: list[_Seat], answers: dict[int, Answer]) -> None:
        """After the loss of the nursery, and of every environment with it."""
        for seat in busy:
            answers[seat.number] = EnvironmentFault("the process that starts environments ended")
        busy.clear()
        self.close()


class ToolsAside:
    """Built-in tools in threads of this process, in front of the environments that have the others.

    Args:
        tools: that run here.
        environments: the others.
        workers: calls that run here at the same time; None takes the number of cores.
    """

    def __init__(self, tools: Environment, environments: Environments, *, workers: int | None) -> None:
        self._tools = tools
        self._environments = environments
        self._threads = ThreadPoolExecutor(cores() if workers is None else workers, "fastrl-tools")

    def ask(self, requests: Mapping[int, Request]) -> dict[int, Answer]:
        """As `Environments.ask`."""
        away, here = {}, []
        for seat, request in requests.items():
            calls = request.get("calls", [])
            mine = [place for place, (name, _) in enumerate(calls) if self._tools.has(name)]
            here += [(seat, place, self._threads.submit(self._tools.call, *calls[place])) for place in mine]
            if "calls" in request:
                away[seat] = {"calls": [call for place, call in enumerate(calls) if place not in mine]}
            else:
                away[seat] = dict(request)
        answers = self._environments.ask(away)
        for seat, place, result in here:
            answer = answers[seat]
            if not isinstance(answer, EnvironmentFault):
                answer["results"].insert(place, result.result())
        return answers

    def close(self) -> None:
        """End the threads and the environments behind; a second call does nothing."""
        self._threads.shutdown()
        self._environments.close()


class _Seat:
    """A process, and when it was last asked something."""

    def __init__(self, number: int, pid: int, channel: socket.socket) -> None:
        self.number = number
        self.pid = pid
        self.channel = channel
        self.inbox = Inbox(channel)
        self.is_parked = False
        self.started = self.deadline = 0.0

    def began(self, seconds: float) -> None:
        """Note that a request was sent."""
        self.started, self.is_parked = monotonic(), False
        self.deadline = self.started + seconds


def _close_all(channels: set[socket.socket]) -> None:
    for channel in channels:
        channel.close()
