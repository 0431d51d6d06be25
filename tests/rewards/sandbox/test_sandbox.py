"""The sandbox refuses to be weak, proves its layers, survives its slots, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.rewards.sandbox import CallTest, Limits, Sandbox, Status, StdinTest, grade_in
from fastrl.rewards.sandbox import sandbox as module
from fastrl.rewards.sandbox.layers import Layers, missing_layers, without
from fastrl.rewards.sandbox.sandbox import run_once, usable_layers
from fastrl.rewards.sandbox.self_test import PROBE_LIMITS, self_test

ROOT = Path(__file__).resolve().parents[3]


def test_every_layer_holds(layers: Layers) -> None:
    assert missing_layers(layers) == {}
    assert self_test(layers, run_once) == {}


@pytest.mark.parametrize("name", ["uid", "bwrap", "landlock", "seccomp", "rlimits"])
def test_a_layer_that_is_gone_is_found_by_its_name(layers: Layers, name: str) -> None:
    if name == "uid" and os.getuid() != 0:
        pytest.skip("needs root: others have no uid to drop")
    assert list(self_test(without(layers, name), run_once)) == [name]
    assert list(missing_layers(without(layers, name))) == [name]


def test_the_weaker_layers_hold_by_themselves(weak_layers: Layers) -> None:
    assert self_test(weak_layers, run_once).keys() <= {"bwrap", "uid"}


def test_strict_refuses_without_bubblewrap_and_says_how_to_get_it(weak_layers: Layers) -> None:
    with pytest.raises(RuntimeError, match=r"lacks .*bwrap.*apt-get install bubblewrap.*strict=False"):
        usable_layers(weak_layers, strict=True)


@pytest.mark.parametrize("name", ["landlock", "seccomp", "rlimits"])
def test_the_other_layers_are_never_optional(weak_layers: Layers, name: str) -> None:
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"lacks .*{name}"):
            usable_layers(without(weak_layers, name), strict=strict)


def test_a_layer_that_claims_to_be_there_and_leaks_is_refused(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "self_test", lambda *_: {"landlock": ["it can list /"]})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"does not hold: landlock: it can list /"):
            usable_layers(layers, strict=strict)


def test_bubblewrap_that_does_not_start_is_named_or_done_without(weak_layers: Layers, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    for path in (fake, tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    broken = Layers(**{**{name: getattr(weak_layers, name) for name in Layers.__slots__}, "bwrap": str(fake)})
    with pytest.raises(RuntimeError, match=r"start: INFRA: .*No permissions.*user namespaces"):
        usable_layers(broken, strict=True)
    assert usable_layers(broken, strict=False) == weak_layers


def test_a_weaker_sandbox_grades_and_says_so_each_time(
    weak_layers: Layers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "found_layers", lambda python: weak_layers)
    weak = Sandbox(slots=1, strict=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert grade_in(weak, "def f(): return 1", [CallTest("f", (), 1)]).passed
    weak.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("PASS without" in message and "bwrap" in message for message in messages)


def test_a_slot_that_dies_gives_infra_and_is_replaced(sandbox: Sandbox) -> None:
    source = "def f(x):\n    while x: pass\n    return 1"
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(grade_in(sandbox, source, [CallTest("f", (1,), 1)], limits=Limits(seconds=20)))
    )
    for _ in range(2):
        assert grade_in(sandbox, source, [CallTest("f", (0,), 1)]).passed
    waiting.start()
    time.sleep(0.5)
    for slot in list(sandbox._all.values()):
        slot.process.send_signal(signal.SIGKILL)
    waiting.join(20)
    assert [result.status for result in results] == [Status.INFRA]
    assert "slot failed" in results[0].detail
    statuses = [grade_in(sandbox, source, [CallTest("f", (0,), 1)]).status for _ in range(4)]
    assert statuses[2:] == [Status.PASS, Status.PASS]


def test_nothing_outlives_a_process_that_is_killed(
    layers: Layers, processes_below: Callable[[list[int]], list[int]]
) -> None:
    code = (
        "from fastrl.rewards.sandbox import CallTest, Limits, grade\n"
        "grade('', [CallTest('f', (), 1)]); print('up', flush=True)\n"
        "source = 'import os, time\\nif os.fork() == 0:\\n    os.setsid()\\ntime.sleep(987654)'\n"
        "grade(source, [CallTest('f', (), 1)], limits=Limits(seconds=500))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        time.sleep(0.5)
        below = processes_below([child.pid])
        assert len(below) >= 4  # a slot, bubblewrap, its init, the submission and its daemon
        child.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process for process in below if Path(f"/proc/{process}").exists()] == []


def test_secrets_of_this_process_are_not_inside(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTRL_CANARY", "canary-in-the-environment")
    source = """
import os, sys
print(sys.argv, dict(os.environ), sorted(os.listdir("/proc/self/fd")))
for process in (name for name in os.listdir("/proc") if name.isdigit()):
    for name in ("environ", "cmdline"):
        try:
            print(open(f"/proc/{process}/{name}").read().count("canary"))
        except OSError:
            pass
"""
    job = {"role": "program", "source": source, "stdin": "", "limits": PROBE_LIMITS}
    printed = run_once(layers, job)["stdout"]
    assert "canary-in" not in printed
    assert "FASTRL" not in printed
    assert "'3'" in printed  # its own listing is the only descriptor above the standard ones
    assert "'4'" not in printed


def test_a_number_of_slots_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="slots must be from 1 to 100, got -1"):
        Sandbox(slots=-1)


def test_a_python_that_nobody_can_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="that every user can reach"):
        Sandbox(python=str(tmp_path / "python"))


def test_two_thousand_bytes_of_input_for_each_of_many_gradings_leak_no_descriptor(sandbox: Sandbox) -> None:
    test = StdinTest("x" * 2000, "2000")

    def descriptors() -> int:
        return sum(len(os.listdir(f"/proc/{slot.process.pid}/fd")) for slot in sandbox._all.values())

    for _ in range(2):
        grade_in(sandbox, "print(len(input()))", [test])
    before = descriptors()
    for _ in range(6):
        assert grade_in(sandbox, "print(len(input()))", [test]).passed
    assert descriptors() == before
