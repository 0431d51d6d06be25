"""Two trainer ranks and one vLLM server, each side in a network namespace of its own, with one cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipes import judges
from tests.recipes.runs import Base
from tests.vllm.test_vllm_grpo import assert_sampler_and_trainer_agree, steps_of

pytestmark = pytest.mark.vllm
ADDRESSES = {"server": "10.77.0.1", "trainers": "10.77.0.2"}
KEY = "a-key-for-this-test-alone"


@dataclass(frozen=True)
class Side:
    """One end of the cable: processes that see this end, their own loopback, and nothing else."""

    namespace: str
    address: str

    def start(self, *command: str, log: Path, cwd: Path, **environment: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_API_KEY": KEY, **environment},
                start_new_session=True,
            )


@pytest.fixture
def sides() -> Iterator[dict[str, Side]]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and iproute2")
    ends = {name: Side(f"fastrl-{name}-{os.getpid()}", address) for name, address in ADDRESSES.items()}
    try:
        for side in ends.values():
            made = subprocess.run(["ip", "netns", "add", side.namespace], capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
            _ip(side, "link", "set", "lo", "up")
        a, b = ends.values()
        _ip(a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b.namespace)
        for side in ends.values():
            _ip(side, "addr", "add", f"{side.address}/24", "dev", "cable")
            _ip(side, "link", "set", "cable", "up")
        yield ends
    finally:
        for side in ends.values():
            subprocess.run(["ip", "netns", "del", side.namespace], capture_output=True)


def _ip(side: Side, *arguments: str) -> None:
    subprocess.run(["ip", "-n", side.namespace, *arguments], check=True, capture_output=True)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, with those it started."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def test_two_trainers_learn_from_a_server_on_the_other_end_of_a_cable(
    base: Base, tmp_path: Path, sides: dict[str, Side]
) -> None:
    server, trainers = sides["server"], sides["trainers"]
    url = f"http://{server.address}:8000"
    options = ["--host", server.address, "--port", "8000", "--dtype", "float32", "--max-model-len", "64"]
    options += ["--kv-cache-memory-bytes", str(2**27)]
    # vLLM's own processes meet on this side's loopback.
    here = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    shutil.copyfile(judges.__file__, tmp_path / "judge.py")
    python, run = sys.executable, tmp_path / "run"
    grpo = ["grpo", "--model_name_or_path", str(base.model), "--output_dir", str(run)]
    grpo += ["--train_dataset", str(base.files.prompts), "--reward_funcs", "judge:digit_sum"]
    grpo += ["--max_steps", "4", "--per_device_train_batch_size", "8", "--num_generations", "4"]
    grpo += ["--max_completion_length", "6", "--learning_rate", "1e-2", "--device", "cpu", "--report.panel", "false"]
    grpo += ["--rollout.engine", "vllm_server", "--rollout.server.urls", f"[{url}]", "--distributed.shard", "optimizer"]
    grpo += ["--rollout.server.patience_seconds", "240", "--distributed.timeout_seconds", "280"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    torchrun += ["--master_port", "29511", "-m", "fastrl"]
    serve = [python, "-m", "fastrl.rollout.server_main", str(base.model), *options]
    with (
        ended(server.start(*serve, log=tmp_path / "server.log", cwd=tmp_path, **here)),
        ended(
            trainers.start(
                python, *torchrun, *grpo, log=tmp_path / "trainers.log", cwd=tmp_path, GLOO_SOCKET_IFNAME="lo"
            )
        ) as training,
    ):
        code = training.wait(290)
        assert code == 0, (tmp_path / "trainers.log").read_text()[:4000] + (tmp_path / "server.log").read_text()[-2000:]
    lines = steps_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 for line in lines)
    # 16 completions of at most 6 tokens a step, half of them sampled by each rank
    assert_sampler_and_trainer_agree(lines, most_tokens=16 * 6)
    assert lines[0]["sampling/error_rate"] == 0
