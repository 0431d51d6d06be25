"""The engine over servers that fail in every way they can: nothing is trained twice, and nothing is made up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastrl.rollout import server_member
from fastrl.rollout.engine import Sampling
from fastrl.rollout.server_engine import EngineLostError, Limits, ServerEngine
from fastrl.rollout.server_http import Client, ServerError, ServerLostError
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_weights import Files
from fastrl.rollout.vllm_probe import SamplerWeightsError, probe_ids, trainer_logprob
from fastrl.types import Rollout
from tests.rollout.fake_server import KEY, FakeServer, Fault, State, aborted, dropped, hung, status
from tests.rollout.tiny import CONTEXT, V, qwen3, tiny_tokenizer

PROMPTS = [[5, 6]] * 4 + [[7, 8, 9]] * 4
SAMPLING = Sampling(max_completion_length=5)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return qwen3()


@pytest.fixture
def servers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeServer]]:
    """Makes servers that hold the model, as far as the probe can tell."""
    monkeypatch.setattr(server_member, "SECONDS_BETWEEN_LOOKS", 0.02)
    tokenizer = tiny_tokenizer("<eos>")
    made: list[FakeServer] = []

    def make(port: int = 0, **changes: Any) -> FakeServer:
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        probe = trainer_logprob(model, probe_ids(tokenizer, V, CONTEXT)).tolist()
        made.append(FakeServer(replace(State(tokens=encode, probe=probe), **changes), port))
        return made[-1]

    yield make
    for server in made:
        with suppress(OSError):
            server.shut()


@pytest.fixture
def opened(model: PreTrainedModel) -> Iterator[Callable[..., ServerEngine]]:
    engines: list[ServerEngine] = []

    def make(*servers: FakeServer, patience: float = 0.3, key: str = KEY, **limits: Any) -> ServerEngine:
        members = [
            Server(
                Client(each.url, api_key=key, retries=2, backoff=0.01),
                retries=2,
                seconds=5.0,
                patience_seconds=patience,
            )
            for each in servers
        ]
        engines.append(
            ServerEngine(model, tiny_tokenizer("<eos>"), servers=members, transport=Files(), limits=Limits(**limits))
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_whole(rollouts: list[Rollout], seeds: range = range(8)) -> None:
    """Each has the tokens of its own seed, once."""
    for rollout, prompt, seed in zip(rollouts, PROMPTS, seeds, strict=True):
        assert rollout.prompt_ids == tuple(prompt)
        assert rollout.completion_ids == tuple(3 + (seed + t) % (V - 3) for t in range(5))
        assert rollout.finish_reason == "length"


def test_each_request_carries_its_seed_and_each_rollout_its_version(servers: Any, opened: Any, model: Any) -> None:
    server = servers()
    engine = opened(server)
    rollouts = engine.generate(PROMPTS, SAMPLING, seeds=range(8))
    assert_whole(rollouts)
    assert {rollout.policy_version for rollout in rollouts} == {0}
    assert sorted(server.state.seeds) == list(range(8))
    engine.load_weights(model, 7)
    assert engine.generate(PROMPTS[:1], SAMPLING, seeds=[0])[0].policy_version == 7
    assert server.state.tag.startswith("policy-7-")


def test_a_group_goes_to_one_server_and_groups_are_spread(servers: Any, opened: Any) -> None:
    one, two = servers(), servers()
    assert_whole(opened(one, two).generate(PROMPTS, SAMPLING, seeds=range(8)))
    assert one.state.prompts == [(5, 6)] * 4
    assert two.state.prompts == [(7, 8, 9)] * 4


@pytest.mark.parametrize(
    "fault", [status(429), status(500), dropped, aborted], ids=["429", "500", "dropped", "aborted"]
)
def test_a_fault_that_passes_costs_nothing(servers: Any, opened: Any, fault: Fault) -> None:
    server = servers()
    engine = opened(server)
    server.state.faults = [fault] * 2
    assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))
    assert sorted(server.state.seeds) == list(range(8))


def test_a_completion_that_hangs_is_aborted_and_lost_alone(servers: Any, opened: Any) -> None:
    server = servers()
    engine = opened(server, request_seconds=0.6)
    server.state.faults = [hung]
    started = time.monotonic()
    rollouts = engine.generate(PROMPTS, SAMPLING, seeds=range(8))
    assert time.monotonic() - started < 3.0
    lost = [rollout for rollout in rollouts if rollout.finish_reason == "error"]
    assert len(lost) == 1
    assert lost[0].completion_ids == ()
    assert {rollout.finish_reason for rollout in rollouts} == {"error", "length"}


def test_a_dead_servers_share_goes_to_the_others_and_it_comes_back_with_the_next_weights(
    servers: Any, opened: Any, model: Any
) -> None:
    one, two = servers(), servers()
    engine = opened(one, two)
    port = two.server_address[1]
    two.shut()
    assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))
    assert len(one.state.prompts) == 8
    again = servers(port)
    engine.load_weights(model, 1)
    assert again.state.tag.startswith("policy-1-")
    assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))
    assert again.state.prompts == [(7, 8, 9)] * 4


def test_a_network_cut_is_waited_out_and_the_server_gets_the_weights_again(servers: Any, opened: Any) -> None:
    server = servers()
    engine = opened(server, patience=10.0)
    port = server.server_address[1]
    server.shut()
    again: list[FakeServer] = []
    timer = threading.Timer(1.0, lambda: again.append(servers(port)))
    timer.start()
    try:
        assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))
    finally:
        timer.join()
    assert again[0].state.tag.startswith("policy-0-")
    assert sorted(again[0].state.seeds) == list(range(8))


def test_lost_rollouts_are_errors_and_too_many_lost_calls_stop_the_run(servers: Any, opened: Any, model: Any) -> None:
    server = servers()
    engine = opened(server, patience=0.1, lost_calls=3)
    port = server.server_address[1]
    server.shut()
    for version in (1, 2):
        engine.load_weights(model, version)
        rollouts = engine.generate(PROMPTS, SAMPLING, seeds=range(8))
        assert {(rollout.finish_reason, rollout.completion_ids) for rollout in rollouts} == {("error", ())}
        assert {rollout.policy_version for rollout in rollouts} == {version}
    with pytest.raises(EngineLostError, match=r"3 times in a row.*no vLLM server at"):
        engine.generate(PROMPTS, SAMPLING, seeds=range(8))
    servers(port)
    engine.load_weights(model, 3)
    assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))


def test_a_server_that_was_updated_by_another_run_is_given_the_weights_again(servers: Any, opened: Any) -> None:
    """Nobody could say which weights its completions came from."""
    server = servers()
    engine = opened(server)
    server.state.tag = "policy-0-other"
    assert_whole(engine.generate(PROMPTS, SAMPLING, seeds=range(8)))
    assert sorted(server.state.seeds) == sorted([*range(8), *range(8)])
    assert server.state.tag != "policy-0-other"


def test_a_server_without_the_new_weights_stops_the_run(servers: Any, opened: Any, model: Any) -> None:
    server = servers()
    engine = opened(server)
    changed = qwen3()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    with pytest.raises(SamplerWeightsError, match="version 1"):
        engine.load_weights(changed, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.19.1"}, "runs vLLM 0.19.1; we know 0.20 to 0.33"),
        ({"version": "0.34.0"}, "runs vLLM 0.34.0"),
        ({"version": "nginx"}, "names no version"),
        ({"context": CONTEXT - 1}, f"--max-model-len {CONTEXT}"),
        ({"vocab_size": V - 1}, f"fewer than the policy's {V} tokens"),
        ({"vocab_size": V + 1}, f"more than the policy's {V} tokens"),
        ({"tokens": lambda text: [1, 2, 3]}, "another tokenizer"),
        ({"processed": False}, "--logprobs-mode processed_logprobs"),
        ({"missing": ("/is_paused",)}, "VLLM_SERVER_DEV_MODE=1"),
        ({"missing": ("/v1/models",)}, "status 404"),
    ],
)
def test_a_server_that_does_not_fit_is_one_sentence_before_training(
    servers: Any, opened: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        opened(servers(**changes))


def test_a_wrong_key_an_unreachable_url_and_an_open_server_are_named(servers: Any, opened: Any) -> None:
    server = servers()
    with pytest.raises(ServerError, match="refuses the API key"):
        opened(server, key="wrong")
    closed = servers()
    closed.shut()
    with pytest.raises(ServerError, match=r"no vLLM server at .* is it running"):
        opened(closed, patience=0.1)
    with pytest.warns(UserWarning, match="change its weights without a key"):
        opened(servers(is_guarded=False))


def test_a_failed_start_leaves_no_files_of_weights(servers: Any, opened: Any, tmp_path: Path, model: Any) -> None:
    server = servers(missing=("/start_weight_update",))
    member = Server(Client(server.url, api_key=KEY), retries=0, seconds=5.0, patience_seconds=0.1)
    with pytest.raises(ServerError, match="start_weight_update"):
        ServerEngine(model, tiny_tokenizer("<eos>"), servers=[member], transport=Files(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_files_of_weights_are_private_and_replaced(servers: Any, model: Any, tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files.take(model, 1)
    first = {path.name for path in tmp_path.rglob("*.safetensors")}
    files.take(model, 2)
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    second = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert len(second) == 1
    assert first.isdisjoint(second)
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stop_string_across_the_border_of_a_prefix_is_found(servers: Any, opened: Any) -> None:
    """The server sees the prefix as a part of the prompt and goes on; the engine cuts."""
    tokenizer = tiny_tokenizer("<eos>")
    engine = opened(servers())
    (free,) = engine.generate([[5, 6]], SAMPLING, seeds=[0], prefixes=[[4]])
    word = tokenizer.decode([4, free.completion_ids[0]])
    (cut,) = engine.generate([[5, 6]], replace(SAMPLING, stop=(word,)), seeds=[0], prefixes=[[4]])
    assert (cut.completion_ids, cut.finish_reason) == (free.completion_ids[:1], "stop")
    assert len(free.completion_ids) == 4


def test_a_prefix_of_another_vocabulary_is_refused_before_anything_is_sent(servers: Any, opened: Any) -> None:
    server = servers()
    engine = opened(server)
    with pytest.raises(ValueError, match=f"holds token {V}"):
        engine.generate([[5, 6]], SAMPLING, seeds=[0], prefixes=[[V]])
    assert server.state.prompts == []


def test_a_request_that_is_refused_stops_the_run_at_once(servers: Any, opened: Any) -> None:
    server = servers()
    engine = opened(server)
    server.state.faults = [status(400)] * 20
    with pytest.raises(ServerError, match="status 400") as caught:
        engine.generate(PROMPTS, SAMPLING, seeds=range(8))
    assert not isinstance(caught.value, ServerLostError)
