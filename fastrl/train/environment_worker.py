"""What runs in the processes of environments: one environment each, made at the first `reset` and reset ever after.

They are forked from a nursery of their own, as `fastrl.rewards.worker` describes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from functools import partial

from fastrl.rewards.frames import FrameError, receive_frame, send_frame
from fastrl.rewards.worker import Work, serve_nursery
from fastrl.train.config import EnvironmentBlock
from fastrl.train.environment_spec import EnvironmentSpec, environment_spec


def main(descriptor: int, trainer: int) -> None:
    """Run the nursery of environments."""
    serve_nursery(descriptor, trainer, _prepared)


def _prepared(specs: Sequence[str]) -> Work:
    """What the trainer asks for: the factory, "" when there is none, and the tools that run here."""
    factory, *tools = specs
    spec = environment_spec(EnvironmentBlock(factory=factory or None, tools=tuple(tools)))
    return partial(_serve, spec)


def _serve(spec: EnvironmentSpec, channel: socket.socket) -> None:
    """Answer requests until the channel closes; an environment that raises is the trainer's to end."""
    environment, process = None, os.getpid()
    while True:
        try:
            request = receive_frame(channel)
        except FrameError:
            return
        try:
            environment = environment or spec.make()
            answer = json.dumps(environment.answer(request))
        except (Exception, SystemExit, asyncio.CancelledError):  # the user's code ends its own episode alone
            answer = json.dumps({"fault": traceback.format_exc()})
        if os.getpid() != process:  # a tool forked and let its child return: one of the two may answer
            os._exit(0)
        sys.stdout.flush()  # a worker is killed without notice, and what it printed should be seen before
        send_frame(channel, answer)
