"""The first process inside the sandbox: closes the last doors, then runs the submission, or the check of one.

It reads JSON lines from one descriptor and writes JSON lines to another; see `serve` and `check`. What it writes once a
submission runs may be forged by it: the reader takes it for outputs, never for a verdict. Sent as text, so it needs
no file in the sandbox; Python 3.10.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import types
from contextlib import suppress
from typing import Any

from fastrl.rewards.sandbox.landlock import restrict
from fastrl.rewards.sandbox.seccomp import install
from fastrl.rewards.sandbox.values import decode, encode

# Raised inside a check's own `all(map(...))`, the first two end it early, and it passes; the last is the check's own.
_CONTROL_FLOW = (StopIteration, StopAsyncIteration, AssertionError)


class Channel:
    """JSON lines in and out."""

    def __init__(self, descriptor_in: int, descriptor_out: int) -> None:
        self.lines = os.fdopen(descriptor_in, "r", encoding="utf-8")
        self.out = descriptor_out

    def read(self) -> Any:
        line = self.lines.readline()
        if not line:
            os._exit(0)  # nobody asks any more
        return json.loads(line)

    def write(self, *record: Any) -> None:
        data = (json.dumps(record) + "\n").encode()
        while data:
            data = data[os.write(self.out, data) :]


def main() -> None:
    """Argument vector: the descriptors to read and to write."""
    channel = Channel(int(sys.argv[1]), int(sys.argv[2]))
    job = channel.read()
    sys.argv = [""]
    try:
        close_doors(job["doors"])
    except (OSError, ValueError) as error:
        channel.write("failed", str(error))
        return
    channel.write("ready")
    roles = {"program": run_program, "function": serve, "script": check}
    roles[job["role"]](channel, job)


def close_doors(doors: dict[str, Any]) -> None:
    """Set resource limits, landlock and seccomp, those that are asked for, in this order.

    Raises:
        OSError, ValueError: one cannot be set.
    """
    os.chdir(doors["home"])
    for name, value in (doors["rlimits"] or {}).items():
        resource.setrlimit(getattr(resource, name), tuple(value))
    if doors["landlock"] is not None:
        restrict(doors["landlock"]["readable"], doors["landlock"]["writable"])
    if doors["seccomp"] is not None:
        install(bytes.fromhex(doors["seccomp"]))


def run_program(channel: Channel, job: dict[str, Any]) -> None:
    """Run the source as `__main__`; its stdout and exit status are the result."""
    code = compiled(channel, job["source"])
    module = new_module("__main__")
    channel.lines.close()
    os.close(channel.out)
    exec(code, module.__dict__)


def serve(channel: Channel, job: dict[str, Any]) -> None:
    """Load the source, then answer each `["call", name, args, named]`; `["broken", type, message]` ends it.

    An answer is `["value", tree]`, `["error", type, message]`, or `["unreadable", message]` for no plain value.
    """
    code = compiled(channel, job["source"])
    module = new_module("submission")
    try:
        exec(code, module.__dict__)
        while True:
            _, name, arguments, named = channel.read()
            channel.write(*answer(module, name, decode(arguments), decode(named)))
    except BaseException as error:  # SystemExit, too: outside a call there is no one to hand it to
        channel.write("broken", type(error).__name__, str(error)[:500])


def answer(module: types.ModuleType, name: str, arguments: list[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    """Call a function, or a method of a fresh object, of the module."""
    first, *rest = name.split(".")
    function = getattr(module, first)
    for attribute in rest:
        function = getattr(function() if isinstance(function, type) else function, attribute)
    try:
        result = function(*arguments, **named)
    except Exception as error:
        return ("error", type(error).__name__, str(error)[:500])
    try:
        return ("value", encode(result))
    except ValueError as error:
        return ("unreadable", str(error))


def check(channel: Channel, job: dict[str, Any]) -> None:
    """Run a check script about a function that is elsewhere, and say `["verdict", status, detail]`.

    No object of the submission comes here: only plain values and the names of built-in exceptions.
    """
    calls = 0

    def stand_in(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            call = (encode(list(arguments)), encode(named))
        except ValueError as error:
            channel.write("verdict", "INFRA", f"the script calls {job['entry_point']} with what cannot travel: {error}")
            os._exit(0)
        channel.write("call", job["entry_point"], *call)
        kind, *rest = channel.read()
        if kind == "value":
            return decode(rest[0])
        raise raised_there(*rest[:2])

    module = new_module("check")
    setattr(module, job["entry_point"], stand_in)
    try:
        exec(compile(job["source"], "check", "exec"), module.__dict__)
        setattr(module, job["entry_point"], stand_in)  # a HumanEval prompt defines an empty function of this name
        if "check" in module.__dict__:
            module.__dict__["check"](stand_in)
    except AssertionError as error:
        verdict = ("WRONG", str(error)[:500])
    except MemoryError:
        verdict = ("MEMORY", "MemoryError")
    except BaseException as error:
        came_back = hasattr(error, "_from_submission")
        verdict = ("RUNTIME" if came_back else "WRONG", f"{type(error).__name__}: {error}"[:500])
    else:
        verdict = ("PASS", "")
    if not calls:
        verdict = ("INFRA", f"the script did not call {job['entry_point']}: {verdict[1] or 'it ended first'}")
    channel.write("verdict", *verdict)


def raised_there(name: Any, message: Any = "") -> Exception:
    """A built-in exception of that name, so that a check can expect it; RuntimeError for all others."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    error: Exception = RuntimeError(f"{name}: {message}")
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _CONTROL_FLOW):
        with suppress(TypeError):  # UnicodeDecodeError takes five arguments
            error = kind(message)
    error._from_submission = True  # type: ignore[attr-defined]
    return error


def compiled(channel: Channel, source: str) -> Any:
    """The code of the source; says `["compile", message]` and ends when there is none."""
    try:
        return compile(source, "submission.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        channel.write("compile", f"{type(error).__name__}: {error}"[:500])
        os._exit(0)


def new_module(name: str) -> types.ModuleType:
    """An empty module that pickle and dataclasses find by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module
