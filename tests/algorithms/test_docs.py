"""The docs list every public loss, and docs/algorithms.md prints every named algorithm as the record it is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import fastrl.losses
from fastrl.algorithms import PolicyGradient, describe, parity, presets
from fastrl.losses.kl import KL

PAGES = Path(__file__).parents[2] / "docs"
DOCS = (PAGES / "algorithms.md").read_text()
ROWS = [line for page in sorted(PAGES.glob("*.md")) for line in page.read_text().splitlines()]
COLUMNS = ("advantage", "surrogate", "ratio", "weighting", "kl")
RECORDS = {
    "grpo": presets.grpo(),
    "dr_grpo(length=1024)": presets.dr_grpo(length=1024),
    "dapo": presets.dapo(),
    "rloo": presets.rloo(),
    "reinforce_pp": presets.reinforce_pp(),
    "gspo": presets.gspo(),
    "cispo": presets.cispo(),
    "sapo": presets.sapo(),
    "ppo": presets.ppo(),
    "gpg": presets.gpg(),
    "luspo": presets.luspo(),
    "vespo": presets.vespo(),
    "dppo": presets.dppo(),
    "parity trl": parity.trl(),
    "parity verl": parity.verl(),
    "parity openrlhf": parity.openrlhf(),
    "parity open_instruct": parity.open_instruct(),
}


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, KL):
        return f"`{describe(value.estimator)}` x {value.coef} in the {value.placement}"
    return (
        f"`{describe(value).replace(', dual_clip=None', '').replace(', delta=None', '').replace('(limit=None)', '')}`"
    )


def table_row(name: str, algorithm: PolicyGradient) -> str:
    """Options that are off (None) are left out; what has no column of its own is named when it is not the default."""
    others = [
        f"{f.name} {cell(getattr(algorithm, f.name))}"
        for f in fields(algorithm)
        if f.name not in COLUMNS and getattr(algorithm, f.name) != f.default
    ]
    return " | ".join([f"| {name}", *(cell(getattr(algorithm, c)) for c in COLUMNS), ", ".join(others) or "-"]) + " |"


@pytest.mark.parametrize("name", RECORDS)
def test_the_table_of_records_is_what_the_code_makes(name: str) -> None:
    assert table_row(name, RECORDS[name]) in DOCS.splitlines()


def test_every_preset_and_parity_mode_is_in_the_table() -> None:
    public = {n for n, f in vars(presets).items() if callable(f) and f.__module__ == presets.__name__ and n[0] != "_"}
    assert public == {n.split("(")[0] for n in RECORDS if not n.startswith("parity")}
    modes = {n for n, f in vars(parity).items() if callable(f) and f.__module__ == parity.__name__}
    assert {f"parity {n}" for n in modes} == {n for n in RECORDS if n.startswith("parity")}


@pytest.mark.parametrize("name", fastrl.losses.__all__)
def test_every_public_loss_has_a_row(name: str) -> None:
    assert any(line.startswith(f"| `{name}`") for line in ROWS)
