"""GRPO over real vLLM servers: killed, cut off, ahead of training, in segments, with adapters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.rollout.server_engine import ServerEngine
from fastrl.train.config import RolloutBlock, ServerBlock
from tests.recipes.runs import Base, column, grpo_config, metrics_of
from tests.vllm.cable import Cable, Cut
from tests.vllm.processes import Running, api_server_of, group_of, is_alive

# A start takes 20 seconds on two idle cores, and ten times that on busy ones.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
STEPS = 6


def run_over(
    base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, running: Running, *, url: str = "", **rollout: Any
) -> list[dict[str, Any]]:
    """The optimizer steps of a run that samples from the server that runs already."""
    monkeypatch.setenv("VLLM_API_KEY", running.client._key)
    server = ServerBlock(urls=(url or running.client.url,))
    block = RolloutBlock(engine="vllm_server", server=server, **rollout)
    return steps_of(grpo_config(base, folder, rollout=block, max_steps=STEPS))


def steps_of(config: Any) -> list[dict[str, Any]]:
    assert grpo.run(config) == 0
    lines = [line for line in metrics_of(Path(config.output_dir)) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, config.max_steps + 1))
    return lines


@pytest.fixture(scope="session")
def undisturbed(running: Running, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run to which nothing happens."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        lines = run_over(running.base, tmp_path_factory.mktemp("undisturbed"), monkeypatch, running)
    assert lines[-1]["entropy"] != pytest.approx(lines[0]["entropy"], rel=1e-2)  # it learns, so its course says much
    return lines


def assert_same_course(lines: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    """The same prompts, each trained once, from the same completions: they have the same seeds.

    `epoch` counts prompts, `num_tokens` the tokens trained so far. Numbers agree to rounding, which Adam enlarges.
    """
    for line, other in zip(lines, undisturbed, strict=True):
        for name in ("step", "epoch", "num_tokens", "trained_sequences", "reward"):
            assert line[name] == other[name], (line["step"], name)
        for name in ("entropy", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), (line["step"], name)
        assert line["sampling/sampling_logp_difference/mean"] <= 1e-4


def test_a_run_survives_the_kill_of_its_server_and_trains_each_prompt_once(
    running: Running, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` of vLLM's API server while it samples round 3.

    The killed server's engine and workers are gone too, and so is everything when the run has ended.
    """
    killed: list[int] = []
    calls = 0

    def at_call(process: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            killed.extend(group_of(process))
            os.kill(api_server_of(process), signal.SIGKILL)
        if calls == STEPS:
            killed.extend(group_of(process))

    generate = ServerEngine.generate

    def generated(self: ServerEngine, *args: Any, **kwargs: Any) -> Any:
        at_call(self._servers[0]._process)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(ServerEngine, "generate", generated)
    rollout = RolloutBlock(engine="vllm_server", server=ServerBlock(kv_cache_gib=0.1))
    lines = steps_of(grpo_config(running.base, tmp_path, rollout=rollout, max_steps=STEPS))
    assert_same_course(lines, undisturbed)
    assert len(killed) >= 6
    assert [pid for pid in killed if is_alive(pid)] == []


def test_a_run_survives_cuts_of_the_network_and_trains_each_prompt_once(
    running: Running, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets lost while it samples; connections lost while it samples; and in the middle of a weight update.

    The last leaves vLLM paused, with an update that was begun: both must be mended before it serves again.
    """
    cable = Cable(
        running.client.url,
        cuts_at(
            (2, b"/v1/completions", 4, "hold"),
            (3, b"/v1/completions", 4, "tear"),
            (5, b"/start_weight_update", 1, "tear"),
        ),
        seconds=2.0,
    )
    lines = run_over(running.base, tmp_path, monkeypatch, running, url=cable.url)
    cable.close()
    assert cable.cuts == ["hold", "tear", "tear"]
    assert_same_course(lines, undisturbed)


def cuts_at(*plan: tuple[int, bytes, int, Cut]) -> Callable[[bytes], Cut | None]:
    """Cuts by the number of weight updates so far, a request, and how many of it there were since the update."""
    todo, updates, seen = list(plan), 0, dict[bytes, int]()

    def cut_at(chunk: bytes) -> Cut | None:
        nonlocal updates, seen
        path = chunk.split(b" ", 2)[1] if chunk.startswith(b"POST ") else b""
        if path == b"/start_weight_update":
            updates, seen = updates + 1, {}
        seen[path] = seen.get(path, 0) + 1
        if todo and todo[0][:3] == (updates, path, seen[path]):
            return todo.pop(0)[3]
        return None

    return cut_at


def test_a_server_samples_the_next_round_while_this_one_is_learned(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth 1: round r + 1 is begun before round r has been learned, by weights that are one version old."""
    sampled, learned = spans(monkeypatch, ServerEngine, "generate"), spans(monkeypatch, grpo, "learn")
    lines = run_over(running.base, tmp_path, monkeypatch, running, max_staleness=1)
    assert column(lines, "sampling/staleness/max") == [0, 1, 1, 1, 1, 1]
    assert len(sampled) == len(learned) == STEPS
    for (begun, _), (_, ended) in zip(sampled[1:], learned, strict=False):
        assert begun < ended
    hidden = [min(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(sampled[1:], learned, strict=False)]
    assert all(seconds > 0 for seconds in hidden)


def test_completions_in_segments_are_trained_once_and_stale_within_the_bound(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, learn, groups = spans(monkeypatch, ServerEngine, "generate"), grpo.learn, list[int]()

    def learned(config: Any, setup: Any, journal: Any, experience: Any, progress: Any) -> Any:
        groups.extend(set(experience.group.tolist()))
        for rollout in experience.rollouts:
            versions = rollout.token_version or (rollout.policy_version,)
            assert len(rollout.completion_ids) == len(rollout.logprob) <= 6
            assert progress.step - 2 <= min(versions) <= max(versions) <= progress.step
        return learn(config, setup, journal, experience, progress)

    monkeypatch.setattr(grpo, "learn", learned)
    lines = run_over(running.base, tmp_path, monkeypatch, running, max_staleness=2, segment_tokens=2)
    assert len(sampled) > STEPS  # a completion of 6 tokens takes 3 calls
    assert len(groups) == len(set(groups)) == 2 * STEPS
    assert all(line["trained_sequences"] > 0 for line in lines)


def spans(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[float, float]]:
    """When each call of a function begins and ends, in seconds."""
    found: list[tuple[float, float]] = []
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic()
        result = original(*args, **kwargs)
        found.append((begun, time.monotonic()))
        return result

    monkeypatch.setattr(owner, name, timed)
    return found


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
