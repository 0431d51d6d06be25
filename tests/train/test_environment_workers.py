"""Environments in processes: a hang, a crash or an exit is one episode's; the trainer and the others go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fastrl.rollout.episodes import EnvironmentFault, Environments
from fastrl.train.config import EnvironmentBlock
from fastrl.train.environment_spec import environment_spec, schemas_of
from fastrl.train.environments import environments_of

SOURCE = '''
import asyncio, os, subprocess, time

NAME = "sleep 4817.5"

class Odd:
    made = 0

    def __init__(self, extra=0):
        Odd.made += 1
        self.number, self.extra = Odd.made, extra

    def reset(self, kind="fine"):
        self.kind = kind
        if kind == "refuses":
            raise RuntimeError("no such game")
        return str(os.getpid())

    async def act(self, x: int) -> int:
        """
        Acts.

        Args:
            x: Any number.
        """
        if self.kind == "hangs":
            time.sleep(60)
        if self.kind == "dies":
            os._exit(3)
        if self.kind == "exits":
            raise SystemExit
        if self.kind == "fails":
            raise ValueError("ordinary")
        if self.kind == "cancels":
            raise asyncio.CancelledError
        if self.kind == "forks":
            os.fork()
        if self.kind == "leaves":
            subprocess.Popen(["setsid", "sh", "-c", NAME + " & setsid sh -c '" + NAME + " & setsid " + NAME + "'"])
        await asyncio.sleep(0.3 if self.kind == "waits" else 0)
        return x + self.extra

    def get_reward(self):
        return self.extra


def double(x: int) -> int:
    """
    Doubles.

    Args:
        x: Any number.
    """
    return 2 * x
'''
KINDS = ("fine", "refuses", "hangs", "dies", "exits", "fails")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "odd.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def environments(source: Path) -> Iterator[Environments]:
    block = EnvironmentBlock(
        factory=f"{source}:Odd(extra=10)",
        tools=(f"{source}:double", "calculator"),
        workers=2,
        tool_timeout_seconds=2.0,
    )
    made = environments_of(block)
    yield made
    made.close()


def call(*names: str) -> dict[str, object]:
    arguments = {"act": {"x": 1}, "double": {"x": 4}, "calculator": {"expression": "1 + 1"}}
    return {"calls": [[name, arguments[name]] for name in names]}


def test_each_failure_is_its_own_episodes(environments: Environments) -> None:
    began = environments.ask({seat: {"reset": {"kind": kind}} for seat, kind in enumerate(KINDS)})
    assert "no such game" in began[1].message  # type: ignore[union-attr]
    alive = [seat for seat in range(len(KINDS)) if seat != 1]
    answers = environments.ask({seat: call("calculator", "act", "double") for seat in alive})
    assert answers[0] == {"results": [("2", False), ["11", False], ["8", False]], "reward": None}
    assert answers[5]["results"][1] == ["{'error': 'ordinary'}", True]  # type: ignore[index]
    for seat, says in ((2, "longer than 2 seconds"), (3, "ended its process"), (4, "SystemExit")):
        fault = answers[seat]
        assert isinstance(fault, EnvironmentFault)
        assert says in fault.message
    # Only a reset brings a seat back; the one that is well keeps its process and its instance.
    assert isinstance(environments.ask({2: call("act")})[2], EnvironmentFault)
    again = environments.ask({seat: {"reset": {}} for seat in (0, 2)})
    assert again[0] == began[0]
    assert again[2] != began[2]
    assert environments.ask({2: {"finish": True}})[2]["reward"] == 10  # type: ignore[index]


def test_calls_that_wait_run_beside_each_other(environments: Environments) -> None:
    environments.ask({seat: {"reset": {"kind": "waits"}} for seat in range(12)})
    started = time.monotonic()
    answers = environments.ask({seat: call("act") for seat in range(12)})
    assert all(answer == {"results": [["11", False]], "reward": None} for answer in answers.values())
    assert time.monotonic() - started < 12 / 2 * 0.3  # what two workers would take one after another


def test_the_loss_of_a_process_between_turns_is_a_fault(environments: Environments) -> None:
    began = environments.ask({0: {"reset": {}}, 1: {"reset": {}}})
    os.kill(int(began[0]["observation"]), signal.SIGKILL)  # type: ignore[index]
    time.sleep(0.2)
    answers = environments.ask({0: call("act"), 1: call("act")})
    assert isinstance(answers[0], EnvironmentFault)
    assert answers[1] == {"results": [["11", False]], "reward": None}


def test_what_json_does_not_hold_cannot_be_sent(environments: Environments) -> None:
    fault = environments.ask({0: {"reset": {"kind": object()}}})[0]
    assert isinstance(fault, EnvironmentFault)
    assert "set environment.workers to 0" in fault.message


def test_closing_ends_the_processes(environments: Environments) -> None:
    began = environments.ask({0: {"reset": {}}})
    pid = int(began[0]["observation"])  # type: ignore[index]
    environments.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_no_process_is_needed_for_built_in_tools_and_none_is_used_with_workers_0(source: Path) -> None:
    calculator = environments_of(EnvironmentBlock(tools=("calculator",)))
    assert calculator.ask({0: {"reset": {}}, 1: call("calculator")})[1]["results"] == [("2", False)]  # type: ignore[index]
    calculator.close()
    here = environments_of(EnvironmentBlock(factory=f"{source}:Odd", workers=0))
    assert here.ask({0: {"reset": {}}})[0] == {"observation": str(os.getpid())}
    assert isinstance(here.ask({0: {"reset": {"kind": "refuses"}}})[0], EnvironmentFault)
    here.close()


def test_schemas_come_from_signatures_and_docstrings_without_an_instance(source: Path) -> None:
    spec = environment_spec(EnvironmentBlock(factory=f"{source}:Odd", tools=(f"{source}:double", "calculator")))
    schemas = schemas_of(spec.functions())
    assert sorted(schema["function"]["name"] for schema in schemas) == ["act", "calculator", "double"]
    act = next(schema["function"] for schema in schemas if schema["function"]["name"] == "act")
    assert act["parameters"]["properties"] == {"x": {"type": "integer", "description": "Any number."}}
    json.dumps(schemas)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"factory": "{0}:double(x=1)"}, "needs a method reset"),
        ({"factory": "{0}:Gone"}, "has no 'Gone'"),
        ({"factory": "{0}:Odd(wrong=1)"}, "cannot be made"),
        ({"factory": "{0}:double"}, r"missing a required argument: 'x'; options go in parentheses"),
        ({"tools": ("search",)}, "missing a required argument: 'corpus'"),
        ({"tools": ("calculatr",)}, "Did you mean 'calculator'"),
    ],
)
def test_names_that_make_no_environment_are_refused(source: Path, block: dict[str, object], says: str) -> None:
    filled = {
        key: value.format(source) if isinstance(value, str) else value  # tools name no file here
        for key, value in block.items()
    }
    with pytest.raises(ValueError, match=says):
        environment_spec(EnvironmentBlock(**filled))  # type: ignore[arg-type]


def test_tools_that_cannot_be_described_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.py"
    path.write_text("def bare(x): return x\n\nclass Silent:\n    def reset(self): ...\n")
    with pytest.raises(ValueError, match="the tool bare needs a type for each parameter"):
        schemas_of(environment_spec(EnvironmentBlock(tools=(f"{path}:bare",))).functions())
    with pytest.raises(ValueError, match="has no tool"):
        schemas_of(environment_spec(EnvironmentBlock(factory=f"{path}:Silent")).functions())
    with pytest.raises(ValueError, match="need different names"):
        schemas_of(environment_spec(EnvironmentBlock(tools=("calculator", "calculator"))).functions())


def test_a_tool_that_forks_answers_once(environments: Environments) -> None:
    environments.ask({seat: {"reset": {"kind": "forks"}} for seat in range(2)})
    for _ in range(3):
        answers = environments.ask({seat: call("act", "double") for seat in range(2)})
        assert answers == {seat: {"results": [["11", False], ["8", False]], "reward": None} for seat in range(2)}
    assert environments.ask({0: {"finish": True}})[0]["reward"] == 10  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cancelled_task_ends_its_episode(source: Path, workers: int) -> None:
    made = environments_of(EnvironmentBlock(factory=f"{source}:Odd", workers=workers))
    made.ask({0: {"reset": {"kind": "cancels"}}, 1: {"reset": {}}})
    answers = made.ask({seat: call("act") for seat in range(2)})
    assert "CancelledError" in answers[0].message  # type: ignore[union-attr]
    assert [*map(tuple, answers[1]["results"])] == [("1", False)]  # type: ignore[index]
    made.close()


def test_what_tools_leave_behind_ends_with_them(environments: Environments) -> None:
    environments.ask({seat: {"reset": {"kind": "leaves"}} for seat in range(4)})
    environments.ask({seat: call("act") for seat in range(4)})
    time.sleep(0.3)
    assert _sleepers()
    environments.close()
    assert _sleepers() == []


def _sleepers() -> list[str]:
    """Processes of the source's NAME."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            found += [path.parent.name] if b"4817.5" in path.read_bytes() else []
    return found


def test_every_kind_of_method_has_its_own_parameters_in_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "kinds.py"
    described = '"""\n        Says.\n\n        Args:\n            x: A number.\n        """'
    kinds = (("@staticmethod", "static", ""), ("@classmethod", "of_class", "cls, "), ("", "plain", "self, "))
    methods = "".join(f"\n    {mark}\n    def {name}({first}x: int): {described}\n" for mark, name, first in kinds)
    path.write_text(f"class Kinds:\n    def reset(self): ...\n{methods}")
    schemas = environment_spec(EnvironmentBlock(factory=f"{path}:Kinds")).schemas()
    assert sorted(schema["function"]["name"] for schema in schemas) == ["of_class", "plain", "static"]
    assert all(list(schema["function"]["parameters"]["properties"]) == ["x"] for schema in schemas)


def test_a_factory_or_schemas_that_fail_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(
        "class Talks:\n    def reset(self): ...\n    def get_reply(self, message): ...\n"
        "    async def get_tool_schemas(self): return []\n\n\ndef failing(): raise OSError('no server')\n"
        "\n\nclass Names(Talks):\n    def get_tool_schemas(self): return ['press']\n"
    )
    with pytest.raises(ValueError, match=r"failing cannot be made: it raised OSError: no server"):
        environment_spec(EnvironmentBlock(factory=f"{path}:failing"))
    with pytest.raises(ValueError, match="must return a list of JSON schemas"):
        environment_spec(EnvironmentBlock(factory=f"{path}:Names")).schemas()
    assert environment_spec(EnvironmentBlock(factory=f"{path}:Talks")).schemas() == []
