from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrl.cli import main


def written(folder: Path, *, kl: float) -> Path:
    lines = [{"step": step, "time": float(step), "kl": kl, "reward": 0.5} for step in range(1, 13)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_with_a_fault_is_told_with_causes_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, kl=3.0)
    (tmp_path / "run.json").write_text(json.dumps({"signals": {"kl_blowup": 2.5, "ratio_tail": None}}))
    signal = {"step": 10, "name": "kl_blowup", "action": "lower_lr"}
    (tmp_path / "signals.jsonl").write_text(json.dumps(signal) + "\n")
    assert main(["report", "signals", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "kl_blowup (threshold 2.5)\n  step 10: KL to the reference, nats per token (kl) is 3 over 10 steps" in said
    assert "the learning rate is too high" in said
    assert "step 10: the run answered kl_blowup with lower_lr" in said
    assert "cannot judge: entropy_collapse (no entropy)" in said
    assert "ratio_tail" not in said


def test_silence_is_no_proof_and_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "signals", str(written(tmp_path, kl=0.1))]) == 0
    assert "no proof of health" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "signals", str(tmp_path)]) == 2
    assert "has no metrics.jsonl; name the output_dir of a run" in capsys.readouterr().err
    assert main(["report", "singals", str(tmp_path)]) == 2
    assert "usage: fastrl report signals RUN" in capsys.readouterr().err
