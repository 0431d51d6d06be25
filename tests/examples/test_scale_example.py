"""examples/scale: the scripts are valid, say what they would run, keep the key to themselves; two CPU ranks run it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl.cli import main
from fastrl.report import read_log

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "scale"
PATHS = {"MODEL": "/shared/a model", "DATA": "/shared/train.jsonl", "DRY_RUN": "1"}
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def said(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(FOLDER / script), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_configuration_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(FOLDER / "grpo.yaml")]) == 0
    assert capsys.readouterr().out.endswith("valid (grpo)\n")


@needs_bash
@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.sh")))
def test_a_script_is_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / script)], capture_output=True).returncode == 0


@needs_bash
def test_one_machine_is_one_torchrun() -> None:
    found = said("run.sh", "--device", "cpu", RANKS="3", DRY_RUN="1")
    assert found.stdout.split() == [
        *("torchrun", "--standalone", "--nproc_per_node", "3", "--shutdown-timeout", "280"),
        *("-m", "fastrl", "run", "examples/scale/grpo.yaml", "--device", "cpu"),
    ]


@needs_bash
def test_slurm_starts_servers_on_the_last_nodes_and_trainers_on_the_first() -> None:
    found = said("slurm.sh", "--seed", "7", NODES="n1 n2 n3 n4", SERVERS="2", **PATHS)
    assert found.returncode == 0, found.stderr
    server, trainer = found.stdout.splitlines()
    assert "--nodelist=n3\\,n4 bash" in server
    assert "fastrl.rollout.server_main" in server
    assert "/shared/a\\ model --port 8000" in server
    assert "--nodes=2 --ntasks=2 --nodelist=n1\\,n2 torchrun --nnodes 2 --nproc_per_node 8" in trainer
    assert "--rdzv_endpoint n1:29500" in trainer
    assert "--rollout.server.urls \\[http://n3:8000\\,http://n4:8000\\]" in trainer
    assert trainer.endswith("--seed 7 ")
    refused = said("slurm.sh", NODES="n1", **PATHS)
    assert refused.returncode == 2
    assert "leave 0 to train" in refused.stderr


@needs_bash
def test_ssh_starts_every_host_with_its_number() -> None:
    found = said("ssh.sh", TRAINERS="a b", SERVERS="c d", KEY_FILE="/shared/key", **PATHS)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["ssh", "-tt", host] for host in "cdab"]
    assert all("VLLM_API_KEY=$(cat /shared/key) exec" in line for line in lines)
    assert "--host d --port 8000" in lines[1]
    assert "--node_rank 1 --nproc_per_node 8 --master_addr a" in lines[3]


@needs_bash
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_key_is_made_once_and_must_be_its_owners_alone(tmp_path: Path) -> None:
    key = tmp_path / "folder" / "key"
    key.parent.mkdir()
    key.touch(mode=0o600)  # what is left where openssl failed
    make = ["bash", "-c", f"source {FOLDER / 'key.sh'} && make_key {key}"]
    assert subprocess.run(make).returncode == 0
    text = key.read_text()
    assert len(text.strip()) == 48
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert subprocess.run(make).returncode == 0
    assert key.read_text() == text
    key.chmod(0o640)
    refused = subprocess.run(make, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "has mode 640" in refused.stderr


@pytest.mark.slow
@needs_bash
def test_two_ranks_of_torchrun_run_it(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RANKS": "2"}
    flags = ["--device", "cpu", "--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "32"]
    flags += ["--warmup_steps", "0"]
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), *flags],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3/3") == 1, "rank 0 alone has the terminal"
    lines = read_log(tmp_path / "runs" / "scale" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "runs" / "scale" / "model" / "model.safetensors").is_file()
