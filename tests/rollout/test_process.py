"""The engine in a child process: the contract, and what happens when the child or its parent ends or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.process import EngineProcessError, ProcessEngine
from tests.rollout.contract import (
    CHECKS,
    Check,
    assert_fresh_forward_agrees,
    completions_in_segments_are_those_in_one_piece,
    segments_are_reproduced_and_end_where_they_should,
    some_prompts,
)
from tests.rollout.tiny import gpt2, qwen3, tiny_tokenizer

SAMPLING = Sampling(max_completion_length=6)


@pytest.fixture
def engines() -> Iterator[list[ProcessEngine]]:
    """Engines that the test opens; closed afterwards."""
    opened: list[ProcessEngine] = []
    yield opened
    for engine in opened:
        engine.close()


def child_of(engine: ProcessEngine) -> int:
    assert engine._child is not None
    return engine._child.process.pid


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def check_all(checks: Sequence[Check], engines: list[ProcessEngine]) -> None:
    def make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        for engine in engines:
            engine.close()
        engines.append(ProcessEngine(model, tokenizer, batch_size=64))
        return engines[-1]

    for check in checks:
        check(make_engine, qwen3)


def test_the_engine_in_a_process_samples_continues_and_refuses_as_the_contract_says(
    engines: list[ProcessEngine],
) -> None:
    check_all([segments_are_reproduced_and_end_where_they_should], engines)


@pytest.mark.slow  # each check starts processes, which import torch
def test_the_engine_in_a_process_meets_the_whole_contract(engines: list[ProcessEngine]) -> None:
    check_all([*CHECKS, completions_in_segments_are_those_in_one_piece], engines)


def test_completions_and_versions_are_those_of_the_builtin_engine(engines: list[ProcessEngine]) -> None:
    model, tokenizer = gpt2(), tiny_tokenizer()
    here = BuiltinEngine(model, tokenizer)
    engines.append(ProcessEngine(model, tokenizer))
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        for engine in (here, engines[0]):
            engine.load_weights(model, version)
        prompts = some_prompts()
        found = [engine.generate(prompts, SAMPLING, seeds=range(6)) for engine in (here, engines[0])]
        assert [r.completion_ids for r in found[1]] == [r.completion_ids for r in found[0]]
        assert {r.policy_version for r in found[1]} == {version}
        for a, b in zip(*found, strict=True):
            assert b.logprob == pytest.approx(a.logprob, abs=1e-5)


def test_a_killed_child_costs_one_call_and_the_next_has_the_weights(engines: list[ProcessEngine]) -> None:
    model = qwen3()
    engine = ProcessEngine(model, tiny_tokenizer())
    engines.append(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    engine.load_weights(model, 5)
    prompts = [prompt for prompt in some_prompts() for _ in range(2)]
    threading.Timer(0.05, os.kill, (child_of(engine), signal.SIGKILL)).start()
    lost = engine.generate(prompts * 400, Sampling(30), seeds=range(len(prompts) * 400))
    assert {(r.finish_reason, r.completion_ids, r.policy_version) for r in lost} == {("error", (), 5)}
    assert [r.prompt_ids for r in lost[:12]] == [tuple(prompt) for prompt in prompts]
    found = engine.generate(prompts, SAMPLING, seeds=range(12))
    for rollout in found:
        assert rollout.policy_version == 5
        assert_fresh_forward_agrees(model, rollout, SAMPLING)
    assert engine.lost_calls == 1


def test_a_hung_child_is_ended_at_the_deadline(engines: list[ProcessEngine], capfd: pytest.CaptureFixture[str]) -> None:
    engine = ProcessEngine(qwen3(), tiny_tokenizer(), timeout_seconds=1.0)
    engines.append(engine)
    pid = child_of(engine)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    lost = engine.generate([[5, 6]], SAMPLING, seeds=[0])
    assert lost[0].finish_reason == "error"
    assert time.monotonic() - started >= 1.0
    assert not is_alive(pid)
    assert "gave no answer within 1 seconds" in capfd.readouterr().err
    engine._timeout = 60.0
    assert engine.generate([[5, 6]], SAMPLING, seeds=[0])[0].finish_reason == "length"


@pytest.mark.slow  # starts three
def test_a_child_lost_three_times_in_a_row_is_a_named_error(engines: list[ProcessEngine]) -> None:
    engine = ProcessEngine(qwen3(), tiny_tokenizer())
    engines.append(engine)
    for _ in range(2):
        os.kill(child_of(engine), signal.SIGKILL)
        assert engine.generate([[5, 6]], SAMPLING, seeds=[0])[0].finish_reason == "error"
    os.kill(child_of(engine), signal.SIGKILL)
    with pytest.raises(EngineProcessError, match=r"lost 3 times in a row, at last it was killed by SIGKILL"):
        engine.generate([[5, 6]], SAMPLING, seeds=[0])


def test_weights_that_do_not_fit_are_refused_and_the_child_lives_on(engines: list[ProcessEngine]) -> None:
    engine = ProcessEngine(qwen3(), tiny_tokenizer())
    engines.append(engine)
    pid = child_of(engine)
    with pytest.raises(ValueError, match="do not fit"):
        engine.load_weights(gpt2(), 1)
    assert engine.generate([[5, 6]], SAMPLING, seeds=[0])[0].policy_version == 0
    assert child_of(engine) == pid


def test_a_module_that_cannot_be_imported_is_a_named_error() -> None:
    with pytest.raises(EngineProcessError, match="does not start: it ended with exit code 1"):
        ProcessEngine(qwen3(), tiny_tokenizer(), modules=["fastrl.no_such_module"])


def test_the_child_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import time
            from fastrl.rollout.process import ProcessEngine
            from tests.rollout.tiny import qwen3, tiny_tokenizer
            engine = ProcessEngine(qwen3(), tiny_tokenizer())
            print(engine._child.process.pid, flush=True)
            time.sleep(600)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
