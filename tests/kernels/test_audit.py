"""Every configuration of every kernel compiles for one of its chips; `make kernels-audit` compiles each for all.

Which chip rotates with the configuration's place in its kernel's list, so every kernel meets every chip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fastrl.command.kernel_audit import TARGETS, audit, known_modules

PACKAGE = Path(__file__).resolve().parents[2] / "fastrl"
WAIST = ("linear_stats", "token_stats", "token_gradient")
COLUMNS = tuple(sorted(set(known_modules()) - set(WAIST)))


@pytest.mark.parametrize("module", known_modules())
def test_every_configuration_names_what_the_launcher_chooses(module):
    entries = vars(import_module(f"fastrl.kernels.{module}")).get("AUDIT", ())
    for entry in entries:
        assert {"kernel", "signature", "constexprs", "num_warps", "num_stages"} <= set(entry)
        assert set(entry.get("targets", TARGETS)) <= set(TARGETS)
        # A pointer that may be None is a constant, so both may name it.
        named = set(entry["signature"]) | set(entry["constexprs"])
        assert named == set(entry["kernel"].arg_names)


@pytest.mark.timeout(900)  # half a minute of compilation where nothing is cached; a busy machine compiles slowly
@pytest.mark.parametrize("modules", [WAIST, COLUMNS], ids=["waist", "columns"])
def test_every_configuration_fits_one_of_its_chips_in_rotation(modules):
    records = audit(modules, rotate=True, jobs=1)
    assert [record for record in records if record.problem] == []
    kernels = {record.kernel for record in records}
    assert {(record.kernel, record.target) for record in records} == {(x, y) for x in kernels for y in TARGETS}
    assert all(0 < record.registers < 255 for record in records)


PLANTED = """
import triton
import triton.language as tl

@triton.jit
def _planted(x_ptr, BLOCK: tl.constexpr, BROKEN: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    total = tl.sum(x)  # every number stays in a register until the last was added
    if BROKEN:
        x += tl.arange(0, 2 * BLOCK)
    tl.store(x_ptr + lane, x - total)

def entry(block, num_warps, **more):
    signature = {"x_ptr": "*fp32", "BLOCK": "constexpr", "BROKEN": "constexpr"}
    constexprs = {"BLOCK": block, "BROKEN": False} | more.pop("constexprs", {})
    entry = {"kernel": _planted, "signature": signature, "constexprs": constexprs, "num_warps": num_warps}
    return entry | {"num_stages": 1} | more

AUDIT = (
    entry(128, 4),
    entry(16384, 1),
    entry(128, 4, constexprs={"BROKEN": True}),
    entry(128, 4, tensor_core=True),
)
"""


def test_planted_violations_end_the_command_with_code_1_and_a_line_for_each(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastrl", ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels"))
    (tmp_path / "fastrl" / "kernels").mkdir()
    (tmp_path / "fastrl" / "kernels" / "planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "fastrl.cli", "kernels", "audit", "--targets", "sm_90", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    fine, spilling, broken, slow = json.loads(done.stdout)
    assert (fine["kernel"], fine["target"], fine["spills"]) == ("planted._planted", "sm_90", 0)
    assert fine["registers"] > 0
    assert spilling["spills"] > 0
    assert broken["registers"] is None
    assert slow["tensor_core"] == 0
    problems = [line.split(": ", 1)[1].split(" (")[0] for line in done.stderr.splitlines()]
    assert problems[0] == f"spills {spilling['spills']}"
    assert problems[1].startswith("does not compile: ")
    assert problems[2] == "a product without tensor-core instructions"
