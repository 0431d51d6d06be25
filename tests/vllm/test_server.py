"""Real vLLM servers over HTTP: the contract, weights and adapters, the guard, what is killed and what hangs.

One server serves most tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.recipes import grpo
from fastrl.rollout.engine import Sampling
from fastrl.rollout.server_engine import Limits, ServerEngine
from fastrl.rollout.server_http import Client, ServerError, ServerLostError
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_process import Launch, ServerProcess, StartError
from fastrl.rollout.server_weights import Files
from fastrl.train.config import RolloutBlock, ServerBlock
from tests.recipes.runs import Base, grpo_config, metrics_of
from tests.rollout import contract
from tests.rollout.tiny import CONTEXT, tiny_tokenizer
from tests.vllm.models import qwen3

# A start takes 20 seconds on two idle cores, and ten times that on busy ones.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
OPTIONS = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", str(2**27))
TO_THE_LAST_BIT = (
    contract.same_seeds_reproduce_and_other_seeds_differ,
    contract.segments_are_reproduced_and_end_where_they_should,
)
PROMPTS = [prompt for prompt in contract.some_prompts() for _ in range(2)]


def launch_of(folder: Path, *options: str, **changes: Any) -> Launch:
    return replace(Launch(str(folder / "model"), folder / "server.log", arguments=(*OPTIONS, *options)), **changes)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Client]]:
    """A server of a random model, whose tokenizer has no EOS of its own; each test brings its weights."""
    folder = tmp_path_factory.mktemp("server")
    qwen3().save_pretrained(folder / "model")
    tiny_tokenizer("<eos>").save_pretrained(folder / "model")
    process = ServerProcess(launch_of(folder))
    client = process.start(retries=2)
    yield process, client
    process.stop()


def engine_of(
    client: Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> ServerEngine:
    member = Server(client, retries=2, seconds=60.0, patience_seconds=1.0)
    return ServerEngine(model, tokenizer, servers=[member], transport=Files(), limits=Limits(**limits))


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda f: f.__name__)
def test_a_server_meets_the_contract(
    check: contract.Check, running: tuple[ServerProcess, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for vLLM in the trainer's process: min-p and top-p together are refused, segments are no uncut completion."""
    monkeypatch.setitem(contract.SAMPLINGS, "all", replace(contract.SAMPLINGS["all"], min_p=0.0))
    # What is together in a batch depends on the moment a request arrives, and the last bits on what is together.
    concurrency = 1 if check in TO_THE_LAST_BIT else 64
    engines: list[ServerEngine] = []

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ServerEngine:
        engines.append(engine_of(running[1], model, tokenizer, concurrency=concurrency))
        return engines[-1]

    try:
        check(make, qwen3)
    finally:
        for engine in engines:
            engine.close()


def test_every_route_asks_for_the_key(running: tuple[ServerProcess, Client]) -> None:
    """vLLM's own key covers /v1 and few others; these pause it, change its weights, or run a method of a worker."""
    client = running[1]
    for path in ("/health", "/version", "/is_paused", "/weight_info", "/metrics", "/docs", "/openapi.json", "/ping"):
        assert client.status(path, with_key=False, seconds=5.0) == 401
        assert client.status(path, with_key=True, seconds=5.0) == 200
    stranger = Client(client.url, retries=0)
    for path in ("/pause", "/update_weights", "/collective_rpc", "/sleep", "/invocations", "/v1/load_lora_adapter"):
        with pytest.raises(ServerError, match="refuses the API key"):
            stranger.post(path, {}, seconds=5.0)


def test_nothing_listens_beyond_the_loopback_and_the_key_is_in_no_command_line(
    running: tuple[ServerProcess, Client],
) -> None:
    process, client = running
    pids = group_of(process)
    assert len(pids) >= 3
    inodes = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                assert fields[1].partition(":")[0] == loopback, line
    for pid in pids:
        assert client._key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_server_of_another_model_is_named_before_training(running: tuple[ServerProcess, Client]) -> None:
    tokenizer = tiny_tokenizer("<eos>")
    tokenizer.add_tokens(["Hello"])
    with pytest.raises(ServerError, match="another tokenizer"):
        engine_of(running[1], qwen3(), tokenizer)
    other = qwen3()
    other.resize_token_embeddings(41)
    with pytest.raises(ServerError, match="fewer than the policy's 41 tokens"):
        engine_of(running[1], other, tiny_tokenizer("<eos>"))
    other = qwen3()
    other.config.max_position_embeddings = CONTEXT + 1
    with pytest.raises(ServerError, match=f"--max-model-len {CONTEXT + 1}"):
        engine_of(running[1], other, tiny_tokenizer("<eos>"))


def test_a_generation_that_hangs_is_aborted_at_its_deadline(running: tuple[ServerProcess, Client]) -> None:
    """A paused server holds requests for ever; when it goes on it has forgotten them."""
    client = running[1]
    engine = engine_of(client, qwen3(), tiny_tokenizer("<eos>"), request_seconds=1.0)
    sampling = Sampling(max_completion_length=8)
    client.post("/pause?mode=keep", seconds=10.0)
    started = time.monotonic()
    rollouts = engine.generate(PROMPTS, sampling, seeds=range(len(PROMPTS)))
    assert time.monotonic() - started < 10.0
    assert {rollout.finish_reason for rollout in rollouts} == {"error"}
    client.post("/resume", seconds=10.0)
    rollouts = engine.generate(PROMPTS, sampling, seeds=range(len(PROMPTS)))
    assert "error" not in {rollout.finish_reason for rollout in rollouts}
    engine.close()


def test_a_port_in_use_is_named(running: tuple[ServerProcess, Client]) -> None:
    process, client = running
    port = int(client.url.rpartition(":")[2])
    second = ServerProcess(replace(process.launch, port=port, log=process.launch.log.with_name("second.log")))
    with pytest.raises(StartError, match="the port is in use; choose another rollout"):
        second.start(retries=0)
    second.stop()


def test_a_run_survives_the_kill_of_its_server_and_trains_each_prompt_once(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` of vLLM's API server while it samples round 3; the same run without it gives the same numbers.

    The killed server's engine and workers are gone too, and so is everything when the run has ended.
    """
    block = ServerBlock(kv_cache_gib=0.1)
    killed: list[int] = []
    generate, calls = ServerEngine.generate, [0]

    def generated(self: ServerEngine, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        process = self._servers[0]._process
        assert process is not None
        if calls[0] == 3:
            killed.extend(group_of(process))
            api = next(pid for pid in killed if parent_of(pid) == process._process.pid)
            os.kill(api, signal.SIGKILL)
        found = generate(self, *args, **kwargs)
        killed.extend(group_of(process) if calls[0] == 6 else [])
        return found

    monkeypatch.setattr(ServerEngine, "generate", generated)
    config = grpo_config(
        base, tmp_path / "killed", rollout=RolloutBlock(engine="vllm_server", server=block), max_steps=6
    )
    assert grpo.run(config) == 0
    lines = [line for line in metrics_of(tmp_path / "killed") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len({line["num_tokens"] for line in lines}) == 6
    assert all(line["sampling/sampling_logp_difference/mean"] <= 1e-4 for line in lines)
    assert all(line["trained_sequences"] > 0 for line in lines)
    assert len(killed) >= 6
    assert [pid for pid in killed if is_alive(pid)] == []


def test_an_adapter_is_pushed_as_one(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's names of adapters change with every version, and its own model stays what it was."""
    seen: list[list[str]] = []
    load = ServerEngine.load_weights

    def loaded(self: ServerEngine, model: Any, version: int) -> None:
        load(self, model, version)
        models = self._servers[0].client.get("/v1/models", seconds=10.0)["data"]
        seen.append([each["id"] for each in models if each["parent"] is not None])

    monkeypatch.setattr(ServerEngine, "load_weights", loaded)
    rollout = RolloutBlock(engine="vllm_server", server=ServerBlock(kv_cache_gib=0.1))
    config = grpo_config(
        base, tmp_path / "run", rollout=rollout, max_steps=5, use_peft=True, lora_r=4, lora_alpha=8, learning_rate=1e-2
    )
    assert grpo.run(config) == 0
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert all(line["sampling/sampling_logp_difference/mean"] <= 1e-4 for line in lines)
    assert lines[-1]["entropy"] != pytest.approx(lines[0]["entropy"], rel=1e-3)
    assert [len(names) for names in seen] == [1] * len(seen)  # the version before it is forgotten
    assert len({names[0] for names in seen}) == len(seen) >= 5


def test_a_dead_server_of_the_users_is_an_error_and_not_a_hang(running: tuple[ServerProcess, Client]) -> None:
    process, client = running
    engine = engine_of(client, qwen3(), tiny_tokenizer("<eos>"))
    process.stop()
    rollouts = engine.generate(PROMPTS, Sampling(max_completion_length=4), seeds=range(len(PROMPTS)))
    assert {rollout.finish_reason for rollout in rollouts} == {"error"}
    with pytest.raises(ServerLostError):
        client.get("/health", seconds=5.0)
    engine.close()


def group_of(process: ServerProcess) -> list[int]:
    return [] if process._process is None else pids_of(process._process.pid)


def pids_of(group: int) -> list[int]:
    """Processes of a group that run; a zombie does not."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.getpgid(int(name)) == group and is_alive(int(name)):
                found.append(int(name))
    return found


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
