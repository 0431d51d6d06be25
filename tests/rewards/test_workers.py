from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastrl.rewards import Reward, RewardWorkers, exact_match, score
from fastrl.rewards.protocol import Traits, import_spec, traits_of
from tests.rewards import judges

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class State:
    global_step: int


@pytest.fixture(scope="module")
def pool():
    with RewardWorkers(workers=2, timeout_seconds=0.5) as workers:
        yield workers


def judge(pool, function, completions, *, prompts=None, state=None, **columns):
    size = len(completions)
    prompts = prompts or [f"p{i}" for i in range(size)]
    ids = [[1]] * size
    return score([Reward(function)], prompts, completions, ids, columns, trainer_state=state, workers=pool)


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # nobody may be there to reap it, but it runs no more


def wait_until_gone(pids):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(is_gone(pid) for pid in pids):
            return
        time.sleep(0.02)
    pytest.fail(f"still there: {[pid for pid in pids if not is_gone(pid)]}")


@pytest.mark.parametrize("function", [judges.each, judges.one_call_per_group])
def test_each_kind_of_fault_costs_its_own_item_and_has_a_message(pool, function):
    completions = ["ok", "hang", "crash", "kill", "segfault", "raise", "type", "nan", "fine"]
    scores = judge(pool, function, completions, prompts=["p"] * 4 + ["q"] * 5)
    assert scores.total == (2.0, *[None] * 7, 4.0)
    assert scores.errors[function.__name__].count == 7
    assert scores.metrics[f"rewards/{function.__name__}/error_rate"] == pytest.approx(7 / 9)


@pytest.mark.parametrize(
    ("completion", "sentence"),
    [
        ("hang", "reward 'each' took longer than 0.5 seconds on one completion"),
        ("spin", "reward 'each' took longer than 0.5 seconds on one completion"),
        ("crash", "reward 'each' ended its worker (exit code 0; closed) on one completion"),
        ("kill", "reward 'each' ended its worker (killed by SIGKILL; "),
        ("segfault", "(killed by SIGSEGV; "),
        ("raise", "KeyError: 'raise'"),
        ("type", "must return numbers or None, got dict"),
        ("nan", "returned nan, which is not a finite float32"),
    ],
)
def test_a_fault_says_what_happened(pool, completion, sentence):
    assert sentence in judge(pool, judges.each, [completion]).errors["each"].first


def test_a_list_that_is_too_short_costs_the_items_it_forgets(pool):
    scores = judge(pool, judges.short_list, ["a", "forget", "b"], prompts=["p"] * 3)
    assert scores.total == (1.0, None, 1.0)
    assert "one value per completion: 1, got 0" in scores.errors["short_list"].first


def test_the_completions_of_a_prompt_are_judged_in_one_call_and_logs_are_put_together(pool):
    scores = judge(pool, judges.group_size, ["a", "bb", "ccc", "d"], prompts=["p", "p", "p", "q"])
    assert scores.total == (3.0, 3.0, 3.0, 1.0)
    assert scores.extra == {"first": ["a", "b", "c", "d"]}
    assert scores.metrics["length"] == (2.0 * 3 + 1.0) / 4  # the mean over items, as one call would log


def test_a_function_that_needs_the_whole_batch_gets_it_and_fails_as_one(pool):
    assert judge(pool, judges.rank, ["b", "a", "c"]).total == (1.0, 0.0, 2.0)
    scores = judge(pool, judges.rank, ["b", "raise", "c"])
    assert scores.total == (None,) * 3
    assert "ValueError: no rank" in scores.errors["rank"].first


def test_async_functions_and_the_trainers_state_reach_a_worker(pool):
    assert judge(pool, judges.patient, ["a", "bb"]).total == (1.0, 2.0)
    assert judge(pool, judges.step_of, ["a", "bb"], state=State(7)).total == (7.0, 7.0)


def test_what_json_cannot_hold_is_a_fault_with_a_remedy(pool):
    scores = judge(pool, judges.one_call_per_group, ["a"], image=[b"\x00"])
    assert scores.total == (None,)
    assert "bytes is not JSON serializable; set rewards.workers to 0" in scores.errors["one_call_per_group"].first


def test_a_pure_function_judges_equal_items_once_and_failures_again(pool, tmp_path):
    notes = tmp_path / "calls"
    answer = [str(notes)] * 4
    for _ in range(2):
        assert judge(pool, judges.counted, ["a", "bb", "a", "a"], answer=answer).total == (1.0, 2.0, 1.0, 1.0)
    assert notes.read_text() == "xx"
    for _ in range(2):
        assert judge(pool, judges.counted, ["raise", "raise"], answer=answer[:2]).total == (None, None)
    assert notes.read_text() == "xxxx"


def test_the_cache_forgets_what_was_not_used_longest(tmp_path):
    notes = tmp_path / "calls"
    with RewardWorkers(workers=1, cache_size=2) as pool:
        for completion in ("a", "b", "a", "c", "a", "b"):  # c drives out b, not a
            judge(pool, judges.counted, [completion], answer=[str(notes)])
    assert notes.read_text() == "xxxx"


def test_calls_that_wait_run_beside_each_other_and_keep_their_order():
    with RewardWorkers(workers=1, spare_workers=16) as pool:
        judge(pool, judges.waits, ["warm"])
        start = time.monotonic()
        assert judge(pool, judges.waits, ["a"] * 12).total == (1.0,) * 12
        assert time.monotonic() - start < 1.5  # 12 x 0.2 s, one after another, are 2.4


def test_trusted_functions_and_closures_judge_in_this_process():
    with RewardWorkers(workers=1) as pool:
        here = os.getpid()

        def process(completions, **_):
            return [float(os.getpid() == here)] * len(completions)

        rewards = [Reward(exact_match), Reward(process)]
        scores = score(rewards, ["p"], ["a"], [[1]], {"answer": ["a"]}, workers=pool)
        assert scores.values == ((1.0,), (1.0,))
        assert pool._nursery is None


def test_what_a_function_promises_is_read_through_its_class_and_its_spec_is_found():
    assert traits_of(exact_match) == Traits(in_process=True, pure=True)
    assert Reward(judges.each).spec == "tests.rewards.judges:each"
    assert import_spec(lambda completions: 0) == ""
    with pytest.raises(ValueError, match="cannot promise per_item or pure"):
        Traits(pure=True, whole_batch=True)


def test_a_pool_outlives_the_thread_that_started_it():
    with RewardWorkers(workers=1) as pool:
        thread = threading.Thread(target=judge, args=(pool, judges.each, ["a"]))
        thread.start()
        thread.join()
        first = pool._nursery
        time.sleep(0.1)
        assert judge(pool, judges.each, ["bb"]).total == (2.0,)
        assert pool._nursery is first


def test_what_a_killed_worker_leaves_behind_is_killed_too(tmp_path):
    notes = tmp_path / "pids"
    with RewardWorkers(workers=1, timeout_seconds=1.0) as pool:
        assert judge(pool, judges.leaves_children, ["a"], answer=[str(notes)]).total == (None,)
        *dead, _ = map(int, notes.read_text().split())
        wait_until_gone(dead)


def test_the_loss_of_the_process_that_forks_workers_is_repaired(tmp_path):
    with RewardWorkers(workers=2, timeout_seconds=20.0) as pool:
        answer = [str(tmp_path / "once")] * 3
        assert judge(pool, judges.kills_its_nursery, ["a", "b", "c"], answer=answer).total == (1.0, 1.0, 1.0)


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path):
    notes = tmp_path / "pids"
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from fastrl.rewards import Reward, RewardWorkers, score
from tests.rewards import judges
workers = RewardWorkers(workers=1, timeout_seconds=600)
score([Reward(judges.leaves_children)], ["p"], ["a"], [[1]], {{"answer": [{str(notes)!r}]}}, workers=workers)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program])
    while not (notes.exists() and len(notes.read_text().split()) == 4):
        assert trainer.poll() is None
        time.sleep(0.01)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until_gone(map(int, notes.read_text().split()))


def test_a_reward_that_cannot_be_imported_elsewhere_is_an_error_at_once():
    with RewardWorkers(workers=1) as pool, pytest.raises(RuntimeError, match=r"cannot import no\.such:thing"):
        score([Reward(judges.each, spec="no.such:thing")], ["p"], ["a"], [[1]], {}, workers=pool)


def test_an_interrupt_leaves_no_worker_with_half_a_call(pool):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            judge(pool, judges.each, ["hang"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert judge(pool, judges.each, ["a"]).total == (1.0,)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_seconds": 0}, {"spare_workers": -1}])
def test_sizes_that_make_no_pool_are_refused(options):
    with pytest.raises(ValueError, match="RewardWorkers needs"):
        RewardWorkers(**options)


def faulty_batch(size):
    """5 % each of hangs, crashes, exceptions and wrong types, spread evenly."""
    kinds = ("hang", "crash", "raise", "type")
    return [f"{kinds[i // 5 % 4]} {i}" if i % 5 == 0 else f"ok {i}" for i in range(size)]


def throughput(pool, completions):
    """Items per second; every faulty item must be None and every other its length."""
    start = time.perf_counter()
    scores = judge(pool, judges.costly, completions)
    seconds = time.perf_counter() - start
    assert scores.total == tuple(float(len(c)) if c.startswith("ok") else None for c in completions)
    return len(completions) / seconds


def test_in_a_batch_with_every_fault_exactly_the_faulty_items_are_none(pool):
    throughput(pool, faulty_batch(100))


@pytest.mark.slow
def test_ten_thousand_calls_with_a_fifth_of_faults_keep_half_of_the_throughput():
    with RewardWorkers(timeout_seconds=1.0) as pool:
        clean = throughput(pool, [f"ok {i}" for i in range(10_000)])
        faulty = throughput(pool, faulty_batch(10_000))
    print(f"{clean:.0f} items/s without faults, {faulty:.0f} with: {faulty / clean:.2f}")
    assert faulty >= clean / 2
