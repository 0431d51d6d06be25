"""A real vLLM server over HTTP: the contract, the guard, what does not fit, what hangs."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.engine import Sampling
from fastrl.rollout.server_engine import Limits, ServerEngine
from fastrl.rollout.server_http import Client, ServerError
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_process import ServerProcess, StartError
from fastrl.rollout.server_weights import Files
from tests.rollout import contract
from tests.rollout.tiny import CONTEXT, tiny_tokenizer
from tests.vllm.models import qwen3
from tests.vllm.processes import Running, group_of

# A start takes 20 seconds on two idle cores, and ten times that on busy ones.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
TO_THE_LAST_BIT = (
    contract.same_seeds_reproduce_and_other_seeds_differ,
    contract.segments_are_reproduced_and_end_where_they_should,
)
PROMPTS = [prompt for prompt in contract.some_prompts() for _ in range(2)]


def engine_of(
    client: Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> ServerEngine:
    member = Server(client, retries=2, seconds=60.0, patience_seconds=1.0)
    return ServerEngine(model, tokenizer, servers=[member], transport=Files(), limits=Limits(**limits))


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda f: f.__name__)
def test_a_server_meets_the_contract(check: contract.Check, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for vLLM in the trainer's process: min-p and top-p together are refused, segments are no uncut completion."""
    monkeypatch.setitem(contract.SAMPLINGS, "all", replace(contract.SAMPLINGS["all"], min_p=0.0))
    # What is together in a batch depends on the moment a request arrives, and the last bits on what is together.
    concurrency = 1 if check in TO_THE_LAST_BIT else 64
    engines: list[ServerEngine] = []

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ServerEngine:
        engines.append(engine_of(running.client, model, tokenizer, concurrency=concurrency))
        return engines[-1]

    try:
        check(make, qwen3)
    finally:
        for engine in engines:
            engine.close()


def test_every_route_asks_for_the_key(running: Running) -> None:
    """vLLM's own key covers /v1 and few others; these pause it, change its weights, or run a method of a worker."""
    client = running.client
    for path in ("/health", "/version", "/is_paused", "/weight_info", "/metrics", "/docs", "/openapi.json", "/ping"):
        assert client.status(path, with_key=False, seconds=5.0) == 401
        assert client.status(path, with_key=True, seconds=5.0) == 200
    stranger = Client(client.url, retries=0)
    for path in ("/pause", "/update_weights", "/collective_rpc", "/sleep", "/invocations", "/v1/load_lora_adapter"):
        with pytest.raises(ServerError, match="refuses the API key"):
            stranger.post(path, {}, seconds=5.0)


def test_nothing_listens_beyond_the_loopback_and_the_key_is_in_no_command_line(
    running: Running,
) -> None:
    process, client = running.process, running.client
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


def test_a_server_that_does_not_fit_is_named_before_training(running: Running) -> None:
    with pytest.raises(ServerError, match="refuses the API key"):
        engine_of(Client(running.client.url, api_key="wrong"), qwen3(), tiny_tokenizer("<eos>"))
    tokenizer = tiny_tokenizer("<eos>")
    tokenizer.add_tokens(["Hello"])
    with pytest.raises(ServerError, match="another tokenizer"):
        engine_of(running.client, qwen3(), tokenizer)
    other = qwen3()
    other.resize_token_embeddings(41)
    with pytest.raises(ServerError, match="fewer than the policy's 41 tokens"):
        engine_of(running.client, other, tiny_tokenizer("<eos>"))
    other = qwen3()
    other.config.max_position_embeddings = CONTEXT + 1
    with pytest.raises(ServerError, match=f"--max-model-len {CONTEXT + 1}"):
        engine_of(running.client, other, tiny_tokenizer("<eos>"))


def test_a_generation_that_hangs_is_aborted_at_its_deadline(running: Running) -> None:
    """A paused server holds requests for ever; when it goes on it has forgotten them."""
    client = running.client
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


def test_a_port_in_use_is_named(running: Running) -> None:
    process, client = running.process, running.client
    port = int(client.url.rpartition(":")[2])
    second = ServerProcess(replace(process.launch, port=port, log=process.launch.log.with_name("second.log")))
    with pytest.raises(StartError, match="the port is in use; choose another rollout"):
        second.start(retries=0)
    second.stop()
