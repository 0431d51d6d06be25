"""Environments in the trainer's own process, one after another: nothing stops one that hangs."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping
from typing import Any

from fastrl.rollout.environment import Environment
from fastrl.rollout.episodes import EnvironmentFault, Request
from fastrl.train.environment_spec import EnvironmentSpec


class LocalEnvironments:
    """Owns one environment per seat; meets `fastrl.rollout.episodes.Environments`."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._seats: dict[int, Environment] = {}

    def ask(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Any] | EnvironmentFault]:
        """As `Environments.ask`."""
        return {seat: self._answer(seat, request) for seat, request in requests.items()}

    def _answer(self, seat: int, request: Request) -> dict[str, Any] | EnvironmentFault:
        try:
            if seat not in self._seats:
                self._seats[seat] = self._spec.make()
            return self._seats[seat].answer(request)
        except (Exception, SystemExit, asyncio.CancelledError):  # the user's code ends its own episode alone
            if seat in self._seats:
                self._seats.pop(seat).close()
            return EnvironmentFault(traceback.format_exc())

    def close(self) -> None:
        """Forget the environments; a second call does nothing."""
        for environment in self._seats.values():
            environment.close()
        self._seats.clear()
