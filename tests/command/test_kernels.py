"""`fastrl kernels`: its arguments, its tables and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from fastrl.cli import main
from fastrl.command import kernel_audit, kernel_check
from fastrl.command.kernel_audit import Audited
from fastrl.command.kernel_check import Checked

GOOD = Audited("gae._gae", "fp32 BLOCK=1024 4 warps 3 stages", "sm_90", 152, 0, 512, 0, 0)
BAD = Audited("gae._gae", "fp64 BLOCK=4096 4 warps 3 stages", "sm_90", 255, 368, 512, 368, 0, "spills 368")


def stand_in(monkeypatch: pytest.MonkeyPatch, *records: Audited) -> list[tuple[list[str], list[str], int, bool]]:
    calls = []

    def audit(files: Sequence[str], targets: Sequence[str], *, every: int, rotate: bool) -> list[Audited]:
        calls.append((list(files), list(targets), every, rotate))
        return list(records)

    monkeypatch.setattr(kernel_audit, "audit", audit)
    return calls


def test_the_audit_prints_a_row_each_and_succeeds_without_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, GOOD)
    assert main(["kernels", "audit", "gae", "--targets", "sm_90", "sm_80", "--every=3", "--rotate"]) == 0
    assert calls == [(["gae"], ["sm_90", "sm_80"], 3, True)]
    printed = capsys.readouterr().out
    assert "gae._gae" in printed
    assert "152" in printed
    assert "1 compilations, 0 with a problem" in printed


def test_a_finding_is_exit_code_1_in_text_and_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, GOOD, BAD)
    assert main(["kernels", "audit"]) == 1
    assert "spills 368" in capsys.readouterr().out
    assert main(["kernels", "audit", "--json"]) == 1
    printed = capsys.readouterr()
    good, bad = json.loads(printed.out)
    assert list(good.values()) == ["gae._gae", "fp32 BLOCK=1024 4 warps 3 stages", "sm_90", 152, 0, 512, 0, 0]
    assert list(bad) == ["kernel", "config", "target", "registers", "spills", "shared_bytes", "stack", "tensor_core"]
    assert printed.err == "gae._gae on sm_90: spills 368 (fp64 BLOCK=4096 4 warps 3 stages)\n"


def test_the_list_names_every_kernel_and_its_chips(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list", "reverse_scan", "--targets", "sm_90", "gfx942"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["kernel", "configurations", "chips"]
    assert [row.split()[0] for row in rows] == ["reverse_scan._from_right", "reverse_scan._from_left"]
    assert all(row.endswith("sm_90 gfx942") for row in rows)
    assert main(["kernels", "list", "reverse_scan", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert set(records[0]) == {"kernel", "config", "target"}
    assert {record["target"] for record in records} == set(kernel_audit.TARGETS)


def test_the_check_fails_on_a_disagreement_and_hides_what_was_never_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Checked("gae", "native", "float32", "[4]", cannot_run="backend 'native' of gae does not exist")
    fine = Checked("gae", "torch", "float32", "[4]", error=1e-8, allowed=1e-5)
    wrong = Checked("gae", "triton", "float32", "[4]", error=1.0, allowed=1e-5, problem="disagrees")
    monkeypatch.setattr(kernel_check, "check", lambda device: iter([absent, fine]))
    assert main(["kernels", "check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "native" not in printed
    assert "[4]" in printed
    monkeypatch.setattr(kernel_check, "check", lambda device: iter([fine, wrong]))
    assert main(["kernels", "check", "--device", "cpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["problem"] == "disagrees"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: fastrl kernels list"),
        (["bake"], "usage: fastrl kernels list"),
        (["list", "softmax"], "no kernel file 'softmax'"),
        (["list", "--json", "gae"], "--json takes no value, got 'gae'"),
        (["audit", "--every", "0"], "--every: expected a whole number"),
        (["audit", "--fast"], "unknown flag '--fast'"),
        (["audit", "softmax"], "no kernel file 'softmax'"),
        (["audit", "gae", "--targets"], "--targets: expected a value"),
        (["check", "--device", "tpu"], "--device: expected cpu or cuda, got tpu"),
        (["check", "--device", "cpu", "cuda"], "--device: expected cpu or cuda, got cpu cuda"),
        (["check", "gae"], "check takes no files, got 'gae'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--help"]) == 0
    assert "--targets" in capsys.readouterr().out
    assert main(["kernels", "audit", "-h"]) == 0
