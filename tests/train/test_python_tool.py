"""The interpreter that a policy may call: real programs in the real sandbox, hostile ones among them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrl.rewards.sandbox import Sandbox
from fastrl.rollout.environment import Environment
from fastrl.train import python_tool
from fastrl.train.config import EnvironmentBlock
from fastrl.train.environments import environments_of
from fastrl.train.python_tool import Python

HOSTILE = """
import os, socket
for attempt in (
    lambda: open({path!r}, "w").write("was here"),
    lambda: socket.create_connection(("127.0.0.1", 9), 1),
    lambda: os.kill(os.getppid(), 9),
    lambda: os.execv("/bin/sh", ["sh", "-c", "touch {path}"]),
):
    try:
        attempt()
        print("done")
    except BaseException as error:
        print(type(error).__name__)
"""


def tool(*, seconds: float = 5.0, characters: int = 2000) -> Environment:
    # Without bubblewrap the other layers hold these programs, too.
    return Environment(None, [Python(seconds=seconds, characters=characters, strict=False).python])


def ran(environment: Environment, code: str) -> tuple[str, bool]:
    return environment.call("python", {"code": code})


def test_a_program_runs_and_nothing_is_kept_for_the_next() -> None:
    environment = tool()
    assert ran(environment, "x = 6\nprint(x * 7)") == ("42\n", False)
    text, is_error = ran(environment, "print(x)")
    assert is_error
    assert "NameError" in text


def test_a_hostile_program_reaches_nothing(tmp_path: Path) -> None:
    target = tmp_path / "mark"
    text, _ = ran(tool(), HOSTILE.format(path=str(target)))
    assert "done" not in text
    assert not target.exists()
    assert ran(tool(), "print(1)") == ("1\n", False)  # and the next program runs


def test_a_program_that_does_not_end_is_ended() -> None:
    text, is_error = ran(tool(seconds=0.5), "while True: pass")
    assert is_error
    assert re.search("time", text)


def test_a_long_output_is_cut() -> None:
    text, is_error = ran(tool(characters=10), "print('x' * 1000)")
    assert (text, is_error) == ("x" * 10 + "...", False)


@pytest.mark.parametrize("workers", [None, 0])
def test_a_machine_without_a_sandbox_is_refused_before_the_first_episode(
    workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*, strict: bool) -> Sandbox:
        raise RuntimeError("the sandbox lacks bwrap; apt-get install bubblewrap")

    monkeypatch.setattr(python_tool, "default_sandbox", missing)
    with pytest.raises(RuntimeError, match="apt-get install bubblewrap"):
        environments_of(EnvironmentBlock(tools=("python",), workers=workers))
