"""What a result needs beside its configuration."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import fastrl
from fastrl.report import log
from fastrl.train import provenance, run_directory

CPU = torch.device("cpu")


def test_versions_device_and_threads_are_recorded(tmp_path: Path) -> None:
    provenance.write_environment(tmp_path, CPU)
    found = json.loads((tmp_path / provenance.ENVIRONMENT_FILE).read_text())
    assert found == provenance.environment(CPU)
    assert found["fastrl"] == fastrl.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["device"]["type"] == "cpu"
    assert found["torch_threads"] == torch.get_num_threads()


def test_the_commit_of_a_checkout_says_when_files_differ_from_it(tmp_path: Path) -> None:
    assert provenance._commit(tmp_path) is None
    author = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, env=os.environ | author)
    clean = provenance._commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert provenance._commit(tmp_path) == f"{clean}-dirty"


def test_a_machine_without_git_knows_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert provenance._commit(tmp_path) is None


def test_nothing_of_the_users_environment_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-7f3a")
    assert "canary-7f3a" not in json.dumps(provenance.environment(CPU))


def test_the_report_reads_the_files_that_a_run_writes() -> None:
    """train and report may not import each other, so the names are written twice."""
    assert log.CONFIG_FILE == run_directory.CONFIG_FILE
    assert log.ENVIRONMENT_FILE == provenance.ENVIRONMENT_FILE
    assert {log.CONFIG_FILE, log.ENVIRONMENT_FILE} < set(run_directory.BEFORE_START)
