"""The runner's report: nothing that failed or could not run is missing from it, and a missing checkout is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hosts import run

RECORD = """<testsuites><testsuite>
<testcase classname="test.a" name="test_one[1-2]"/>
<testcase classname="test.a" name="test_one[2-2]"><failure message="off"/></testcase>
<testcase classname="test.a" name="test_two[x]"><skipped message="no GPU"/></testcase>
<testcase classname="test.a" name="test_two[y]"><skipped message="no GPU"/></testcase>
<testcase classname="test.b" name="test_three"><error message="import"/></testcase>
</testsuite></testsuites>"""


def test_the_report_counts_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "result.xml"
    record.write_text(RECORD)
    assert run._report(record) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "cannot run  test.a::test_two x 2: no GPU",
        "failed      test.a::test_one x 1",
        "failed      test.b::test_three x 1",
        "1 passed, 2 failed, 2 cannot run",
    ]


@pytest.mark.parametrize("host", run.HOSTS)
def test_without_a_checkout_our_own_vectors_exist_and_are_run(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def pytest_of(python: Path, folder: Path, tests: tuple[str, ...], *others: object) -> int:
        asked.append(tests)
        return 0

    monkeypatch.setattr(run, "_pytest", pytest_of)
    monkeypatch.setattr("sys.argv", ["run.py", host, "--env", "somewhere"])
    assert run.main() == 0
    assert asked == [run.HOSTS[host].vectors]
    assert all((run.ROOT / test).exists() for test in asked[0])
    assert f"no --checkout of {host} was given" in capsys.readouterr().out


@pytest.mark.parametrize("host", run.HOSTS)
@pytest.mark.parametrize("is_empty_checkout", [False, True])
def test_an_environment_is_made_only_where_the_peer_is_run(
    host: str, is_empty_checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's takes minutes to install, and nothing of verl runs without a GPU."""
    made: list[str] = []
    used: list[Path] = []

    def environment(name: str, host: run.Host) -> Path:
        made.append(name)
        return tmp_path

    def pytest_of(python: Path, *others: object) -> int:
        used.append(python)
        return 0

    monkeypatch.setattr(run, "_environment", environment)
    monkeypatch.setattr(run, "_pytest", pytest_of)
    checkout = ["--checkout", str(tmp_path)] if is_empty_checkout else []
    monkeypatch.setattr("sys.argv", ["run.py", host, *checkout])
    assert run.main() == 0
    assert made == (["trl"] if host == "trl" else [])
    assert used == [tmp_path / "bin" / "python" if host == "trl" else Path(sys.executable)]


def test_files_that_a_checkout_lacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_pytest", lambda *arguments: 0)
    monkeypatch.setattr("sys.argv", ["run.py", "prime_rl", "--env", "somewhere", "--checkout", str(tmp_path)])
    assert run.main() == 0
    out = capsys.readouterr().out
    assert "cannot run  tests/unit/train/rl/test_fused_lm_head.py: not in this checkout" in out
    assert "running our own vectors instead" in out
