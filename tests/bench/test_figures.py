"""The tables come from the records: the right contenders are compared, links point to lines, losses are shown."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.figures import comparisons, figure, is_rival, outputs, read, table

ORIGIN = {"device": "A processor", "commit": "0123456789", "threads": 1}


def record(contender: str, ms: float, row: str = "op", **values: object) -> dict[str, object]:
    return {
        "row": row,
        "shape": {"name": "small"},
        "contender": contender,
        "ms": ms,
        "peak_gib": 0.5,
        **ORIGIN,
        **values,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    lines = [
        record("eager", 30.0),
        record("eager, compiled", 12.0, peak_gib=None),
        record("torch", 10.0),
        record("torch, no cache", 1.0),
        {key: value for key, value in record("CCE", 0).items() if key != "ms"} | {"cannot_run": "absent"},
        record("with fastrl", 20.0, row="host"),
        record("without", 10.0, row="host"),
        record("native", 1.0, row="alone"),
        {"task": "another program's record"},
    ]
    (folder / "op.cpu.quick.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    blocks = "".join(f"<!-- results:{kind} -->\nold\n<!-- /results:{kind} -->\n" for kind in ("cpu", "cuda"))
    page = f"before\n{blocks}after\n"
    (tmp_path / "README.md").write_text(page)
    (tmp_path / "docs" / "benchmarks.md").write_text(page)
    (tmp_path / "docs" / "plan.md").write_text(page)
    return tmp_path


def test_the_default_stands_against_the_fastest_other_and_losses_stay(root: Path) -> None:
    lost, won = comparisons(read(root), "cpu")
    assert (won.row, won.other.values["contender"], won.ratio) == ("op", "eager, compiled", 1.2)
    assert (lost.row, lost.other.values["contender"], lost.ratio) == ("host", "without", 0.5)
    text = table([lost, won], prefix="../")
    assert "[10.0](../bench/results/op.cpu.quick.jsonl#L3)" in text
    assert "**1.20** | 512 / -" in text
    assert "| 0.50 |" in text


def test_pages_are_rewritten_between_the_markers_alone(root: Path) -> None:
    found = outputs(root)
    page = found[root / "docs/benchmarks.md"]
    assert page.startswith("before\n<!-- results:cpu -->\nA processor; medians")
    assert "faster in 1 of 2 rows" in page
    assert "<!-- results:cuda -->\nNot measured.\n<!-- /results:cuda -->\nafter\n" in page
    assert "old" not in page
    assert "(../bench/results/" in page
    assert "Not measured" in found[root / "README.md"]  # none of its rows is in these results
    assert root / "docs/results_cuda.svg" not in found


def test_the_figure_is_well_formed_and_has_a_bar_for_each_comparison(root: Path) -> None:
    drawn = figure(comparisons(read(root), "cpu"), "a < b")
    bars = ElementTree.fromstring(drawn).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + 2  # the background


def test_predictions_and_curves_get_their_own_tables(root: Path) -> None:
    curve = {"axis": "rows", "contender": "fastrl", "sizes": [1.0, 2.0], "times_ms": [3.0, 6.0], "slope": 1.0}
    lines = [
        record("fastrl", 110.0, row="training_step", predicted_ms=100.0),
        record(
            "fastrl", 90.0, row="training_step", predicted_ms=100.0, predicted_peak_gib=0.25, peak_gib=0.2, dtype="f"
        ),
        {"row": "curve", **curve, "memory_slope": 0.25, **ORIGIN},
    ]
    folder = root / "bench" / "results"
    (folder / "more.cpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = "".join(f"<!-- results:{kind} -->\n<!-- /results:{kind} -->\n" for kind in ("prediction", "curves"))
    (root / "docs" / "plan.md").write_text(kinds)
    found = outputs(root)
    page = found[root / "docs" / "plan.md"]
    assert "| small | 100 | [110](../bench/results/more.cpu.jsonl#L1) | 1.10 | - | - | - |" in page
    assert "| small | 100 | [90.0](../bench/results/more.cpu.jsonl#L2) | 0.90 | 256.0 | 204.8 | 0.80 |" in page
    assert "| rows | fastrl | 1 | 2 | [size^1.00](../bench/results/more.cpu.jsonl#L3) | size^0.25 |" in page
    drawn = ElementTree.fromstring(found[root / "docs" / "curves.svg"])
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 1


def test_forms_of_ours_are_no_rivals() -> None:
    assert is_rival("torch's own", "cpu")
    assert is_rival("torch.rms_norm", "cpu")
    assert is_rival("trl (dynamic)", "cpu")
    ours = ("torch", "torch, compiled", "linear_logprob", "no packing", "trl, patched", "fastrl's trainer, packed")
    assert not any(is_rival(name, "cpu") for name in ours)
    assert is_rival("trl", "cpu")


def test_the_committed_tables_are_those_of_the_committed_records() -> None:
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run `python -m bench.figures`"
