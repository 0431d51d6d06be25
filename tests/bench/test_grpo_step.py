"""The step benchmark: what it times, what it refuses, and that both contenders compute the same step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import grpo_step
from bench.grpo_step import FastRLRun, StepTime, check_agreement, main
from bench.grpo_step_task import CASES, Case, vowel_share, write_task
from bench.grpo_step_trl import TRLRun

STEP = {"ms", "ms_p10", "ms_p90", "ms_rollout", "ms_rest", "ms_cpu", "repeats", "completion_tokens_per_step"}
ORIGIN = {"device", "threads", "versions", "commit", "tree_has_changes", "seed"}


def test_the_reward_weighs_vowels_by_their_place():
    assert vowel_share(["aei", "xxa", ""], answer=[1, 2, 3]) == [6 / 528, 3 / 528, 0.0]


def test_without_trl_the_script_says_so_and_measures_fastrl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(grpo_step, "find_spec", lambda name: None)
    case = "D=64, 2 layers, all 32 tokens"
    main(["--case", case, "--steps", "3", "--threads", "1", "--results", str(tmp_path)])
    assert "TRL is not installed" in capsys.readouterr().out
    (record,) = map(json.loads, (tmp_path / "grpo_step.cpu.jsonl").read_text().splitlines())
    assert {"row", "shape", "contender", "dtype"} | STEP | ORIGIN <= record.keys()
    assert (record["row"], record["contender"], record["dtype"]) == ("grpo_step", "fastrl", "float32")
    assert record["shape"]["name"] == case
    sizes = {"hidden": 64, "layers": 2, "stops": False, "groups": 8, "generations": 8, "length": 32, "is_demo": False}
    assert record["shape"]["sizes"] == sizes
    assert record["repeats"] == 4  # 3, rounded up to a whole turn
    assert record["completion_tokens_per_step"] == 64 * 32
    assert 0 < record["ms_p10"] <= record["ms"] <= record["ms_p90"]
    assert 0 < record["ms_rollout"] < record["ms"]


def test_lengths_vary_only_where_the_model_may_stop(tmp_path: Path):
    lengths = {}
    for stops in (False, True):
        folder = tmp_path / str(stops)
        case = Case(64, 2, stops=stops)
        write_task(folder, case, steps=1)
        run = FastRLRun(folder, folder / "run", case, steps=1)
        run.step()
        run.close()
        lengths[stops] = run.lengths
    assert set(lengths[False]) == {32}
    assert len(set(lengths[True])) > 5
    assert max(lengths[True]) == 32


def test_a_completion_that_stops_early_where_none_may_is_refused():
    times = [StepTime(1.0, 0.5, 1.0)] * 6
    with pytest.raises(RuntimeError, match=r"fastrl: completions have 31 \.\. 32 tokens, not 32 each"):
        grpo_step._record("fastrl", Case(64, 2, stops=False), times, [32, 31, 32])


def test_the_record_holds_medians_of_the_timed_steps():
    times = [StepTime(1000.0, 1000.0, 1000.0)] * 2 + [StepTime(float(ms), 1.0, 3.0) for ms in range(1, 12)]
    record = grpo_step._record("fastrl", Case(64, 2, stops=False), times, [32] * 13)
    assert [record[name] for name in grpo_step.COLUMNS] == [6.0, 2.0, 10.0, 1.0, 5.0, 3.0]
    assert record["repeats"] == 11


def test_the_other_contenders_turns_are_not_on_trls_clock():
    turns: list[int] = []

    def turn() -> None:
        turns.append(len(trl.times))
        time.sleep(0.2)

    trl = TRLRun("dynamic", turn=turn, block=2, untimed=1)
    for step in range(5):
        trl.on_step_begin(None, None, None)
        trl.on_step_end(None, SimpleNamespace(global_step=step + 1, max_steps=5), None)
    assert turns == [1, 3]
    assert len(trl.times) == 5
    assert max(ms for ms, _, _ in trl.times) < 100


def test_the_demo_case_is_the_demos_own_stage_on_a_model_that_knows_some_of_the_task(tmp_path: Path):
    case = CASES["demo"]
    write_task(tmp_path, case, steps=1)
    run = FastRLRun(tmp_path, tmp_path / "run", case, steps=1)
    run.step()
    run.close()
    config = run.config
    assert (config.per_device_train_batch_size, config.num_generations, config.max_completion_length) == (512, 8, 8)
    assert (config.reward_funcs, config.algorithm, config.learning_rate) == (("exact_match",), "grpo", 5e-4)
    assert len(run.lengths) == 512
    assert max(run.lengths) <= 8
    assert len(set(run.lengths)) > 1  # EOS is the model's own
    assert 0.2 < json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward"] < 0.8
    row = run.rows()[0]
    assert row["answer"] == "".join(sorted(row["prompt"][0]["content"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [Case(64, 2, stops=True), CASES["demo"]], ids=["vowels", "demo"])
def test_fastrl_and_trl_log_the_same_step_on_the_same_completions(tmp_path: Path, case: Case):
    pytest.importorskip("trl")
    write_task(tmp_path, case, steps=2)
    assert max(check_agreement(tmp_path, case).values()) < 1e-4
