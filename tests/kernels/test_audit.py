"""A sample of every kernel file compiles for every vendor without a spill; `make kernels-audit` compiles the whole."""

from __future__ import annotations

from importlib import import_module

import pytest

from fastrl.command.kernel_audit import TARGETS, audit, known_modules

ALL_DATA_CENTRE_CHIPS = ("reverse_scan",)  # the others are compiled for one chip of each vendor


@pytest.mark.parametrize("module", known_modules())
def test_every_configuration_names_what_the_launcher_chooses(module):
    entries = vars(import_module(f"fastrl.kernels.{module}")).get("AUDIT", ())
    for entry in entries:
        assert {"kernel", "signature", "constexprs", "num_warps", "num_stages"} <= set(entry)
        assert set(entry.get("targets", TARGETS)) <= set(TARGETS)
        # A pointer that may be None is a constant, so both may name it.
        named = set(entry["signature"]) | set(entry["constexprs"])
        assert named == set(entry["kernel"].arg_names)


@pytest.mark.timeout(600)  # seconds when cached; a busy machine compiles slowly
def test_the_first_configuration_of_every_file_compiles_without_spills():
    records = audit(targets=("sm_90", "gfx942"), every=10**6)
    records += audit(ALL_DATA_CENTRE_CHIPS, ("sm_80", "sm_100"), every=10**6)
    assert [record for record in records if record.problem] == []
    assert {record.target for record in records} == set(TARGETS)
    assert all(0 < record.registers < 255 for record in records)
    audited = {record.module for record in records}
    assert {"token_objective", "group_advantage", "reverse_scan", "gae"} <= audited
