"""What the agents learned: a table and a figure of records, and the committed ones meet what was promised."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from xml.etree import ElementTree

from bench.agents import NAMES, Result, figure, recorded, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def result(seed: int, *, after: float, has_tools: bool = True) -> Result:
    return Result("agent", seed, has_tools, before=0.1, after=after, curve=[0.1, after], seconds=60.0)


def test_the_median_of_the_seeds_is_the_last_line_of_a_task():
    lines = list(table([result(2, after=0.9), result(1, after=0.7), result(3, after=0.8)]))
    assert lines[2] == "| calculator | 1 | 10.0% | 70.0% | 60 |"
    assert lines[5:] == ["| **calculator** | median | **10.0%** | **80.0%** | **60** |"]


def test_a_run_without_tools_is_a_row_of_its_own_after_the_others():
    lines = list(table([result(1, after=0.1, has_tools=False), result(1, after=0.7)]))
    assert lines[2:] == [
        "| calculator | 1 | 10.0% | 70.0% | 60 |",
        "| calculator, without the tool | 1 | 10.0% | 10.0% | 60 |",
    ]


def test_the_figure_has_a_line_for_each_seed_and_one_for_the_median():
    drawn = ElementTree.fromstring(figure([result(1, after=0.7), result(2, after=0.9), result(3, after=0.8)]))
    lines = [each for each in drawn.iter() if each.tag.endswith("polyline") and each.get("stroke") == "#1b7f79"]
    assert [line.get("stroke-width") for line in lines] == ["0.7", "0.7", "0.7", "2.5"]
    ends = [line.get("points", "").split()[-1] for line in lines]
    assert ends[3] == ends[2]  # 0.8 is the median


def test_the_documents_show_what_was_measured():
    assert (DOCS / "agents.svg").read_text() == figure(recorded())
    assert "\n".join(table(recorded())) in (DOCS / "agents.md").read_text()


def test_agents_learn_from_below_a_fifth_to_above_seven_tenths_in_ten_minutes_and_only_with_tools():
    for task in NAMES:
        runs = [each for each in recorded() if each.task == task and each.has_tools]
        assert len(runs) == 5
        assert max(each.before for each in runs) < 0.2
        assert median(each.after for each in runs) > 0.7
        assert max(each.seconds for each in runs) < 600
        without = [each for each in recorded() if each.task == task and not each.has_tools]
        assert without
        assert max(max(each.after, *each.curve) for each in without) < 0.2
