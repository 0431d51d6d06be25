from __future__ import annotations

import asyncio
import math
from functools import partial

import numpy as np
import pytest
import torch

from fastrl.rewards import Reward, score

PROMPTS, COMPLETIONS, IDS = ["p"] * 3, ["a", "bb", "ccc"], [[1], [1, 2], [1, 2, 3]]


def judge(*rewards, columns=None, **options):
    return score(rewards, PROMPTS, COMPLETIONS, IDS, columns or {}, **options)


def characters(completions, **_):
    return [len(completion) for completion in completions]


def returns(values):
    def function(completions, **_):
        return values

    return function


def test_the_total_is_the_weighted_sum_of_what_was_judged():
    scores = judge(Reward(characters, 2.0), Reward(returns([None, 10, None]), 0.5, "bonus"))
    assert scores.values == ((1.0, 2.0, 3.0), (None, 10.0, None))
    assert scores.total == (2.0, 9.0, 6.0)
    assert not scores.errors


def test_an_item_that_no_reward_judges_is_excluded_not_zero():
    scores = judge(Reward(returns([None, 1, None]), 1.0, "a"), Reward(returns([None, None, 2]), 1.0, "b"))
    assert scores.total == (None, 1.0, 2.0)
    assert not scores.errors


def test_metrics_have_trls_names_and_values():
    metrics = judge(Reward(characters), Reward(returns([0.0, None, 4.0]), 1.0, "half")).metrics
    assert {name: value for name, value in metrics.items() if "correlation" not in name} == {
        "rewards/characters/mean": 2.0,
        "rewards/characters/std": 1.0,  # of 1, 2, 3 with n - 1
        "rewards/characters/error_rate": 0.0,
        "rewards/half/mean": 2.0,
        "rewards/half/std": math.sqrt(8),
        "rewards/half/error_rate": 0.0,
        "reward": 10 / 3,  # totals 1, 2, 7
        "reward_std": pytest.approx(math.sqrt(31 / 3)),
    }


def test_statistics_of_too_few_values_are_absent():
    metrics = judge(Reward(returns([None, 5, None]), 1.0, "one"), Reward(returns([None] * 3), 1.0, "none")).metrics
    assert metrics == {
        "rewards/one/mean": 5.0,
        "rewards/one/error_rate": 0.0,
        "rewards/none/error_rate": 0.0,
        "reward": 5.0,
    }


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ([1.0, 2.0], "one value per completion: 3, got 2"),
        (None, "must return a list with one value per completion, got NoneType"),
        ({"a": 1, "b": 2, "c": 3}, "got dict"),
        ({1, 2, 3}, "got set"),
        ("abc", "got str"),
        (5, "is not iterable"),
    ],
)
def test_an_output_of_the_wrong_shape_is_a_counted_error_for_every_item(output, sentence):
    scores = judge(Reward(characters), Reward(returns(output), 1.0, "broken"))
    assert scores.total == (None, None, None)
    assert scores.errors["broken"].count == 3
    assert sentence in scores.errors["broken"].first
    assert scores.metrics["rewards/broken/error_rate"] == 1.0
    assert scores.metrics["rewards/characters/mean"] == 2.0
    assert "reward" not in scores.metrics


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (float("nan"), "returned nan, which is not a finite float32"),
        (float("-inf"), "returned -inf"),
        (1e39, "returned 1e"),
        (10**400, "got int"),
        ("1", "must return numbers or None, got '1'"),
        ([1.0], "got list"),
        (torch.ones(2), "got Tensor"),
        (ValueError("no such row"), "ValueError: no such row"),
    ],
)
def test_a_wrong_value_is_a_counted_error_for_its_item_alone(value, sentence):
    scores = judge(Reward(characters), Reward(returns([1.0, value, 3.0]), 1.0, "broken"))
    assert scores.values[1] == (1.0, None, 3.0)
    assert scores.total == (2.0, None, 6.0)
    assert scores.errors["broken"].count == 1
    assert sentence in scores.errors["broken"].first
    assert scores.metrics["rewards/broken/error_rate"] == pytest.approx(1 / 3)
    assert scores.metrics["reward"] == 4.0


def test_an_exception_is_a_counted_error_with_its_traceback():
    def crash(completions, **_):
        raise KeyError("answr")

    scores = judge(Reward(characters), Reward(crash))
    assert scores.total == (None, None, None)
    assert scores.errors["crash"].count == 3
    assert scores.errors["crash"].first.startswith("Traceback")
    assert "in crash" in scores.errors["crash"].first
    assert "KeyError: 'answr'" in scores.errors["crash"].first


def test_a_lazy_output_that_fails_while_read_is_an_error():
    scores = judge(Reward(lambda completions, **_: (1 / len(c[1:]) for c in completions), name="lazy"))
    assert scores.errors["lazy"].count == 3
    assert "ZeroDivisionError" in scores.errors["lazy"].first


def test_interrupts_are_not_swallowed():
    def interrupted(completions, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(Reward(interrupted))


def test_array_and_scalar_types_are_numbers():
    assert judge(Reward(returns(np.array([1, 2, 3], dtype=np.float32)), name="a")).total == (1.0, 2.0, 3.0)
    assert judge(Reward(returns(torch.tensor([1.0, 2.0, 3.0])), name="a")).total == (1.0, 2.0, 3.0)
    assert judge(Reward(returns((True, np.int64(2), torch.tensor(3.0))), name="a")).total == (1.0, 2.0, 3.0)


def test_columns_arrive_by_name_and_only_where_they_are_asked_for():
    def exact(completions, answer):
        return [completion == gold for completion, gold in zip(completions, answer, strict=True)]

    def everything(**given):
        assert sorted(given) == [
            *("answer", "completion_ids", "completions", "level", "log_extra", "log_metric", "prompts"),
            "trainer_state",
        ]
        assert (given["prompts"], given["completion_ids"], given["trainer_state"]) == (PROMPTS, IDS, "step 3")
        return given["level"]

    columns = {"answer": ["a", "b", "ccc"], "level": [1, 2, 3], "prompt": PROMPTS, "completion": COMPLETIONS}
    scores = judge(Reward(exact), Reward(everything), columns=columns, trainer_state="step 3")
    assert not scores.errors
    assert scores.values == ((1.0, 0.0, 1.0), (1.0, 2.0, 3.0))


def test_async_functions_run_together():
    arrived = asyncio.Barrier(2)

    async def first(completions, **_):
        await arrived.wait()
        return [1, 1, 1]

    async def second(answer, completions):
        await arrived.wait()
        return answer

    async def crash(completions, **_):
        raise OSError("503")

    class Judge:
        async def __call__(self, completions, scale):
            return [scale] * len(completions)

    rewards = [
        Reward(first),
        Reward(crash),
        Reward(partial(second, answer=[1, 2, 3])),
        Reward(partial(Judge(), scale=5)),
    ]
    scores = judge(*rewards)
    assert [reward.name for reward in rewards] == ["first", "crash", "second", "Judge"]
    assert scores.values == ((1.0,) * 3, (None,) * 3, (1.0, 2.0, 3.0), (5.0,) * 3)
    assert list(scores.errors) == ["crash"]
    assert "OSError: 503" in scores.errors["crash"].first


def test_async_functions_work_where_a_loop_already_runs():
    async def one(completions, **_):
        return [1, 1, 1]

    async def notebook():
        return judge(Reward(one))

    assert asyncio.run(notebook()).total == (1.0, 1.0, 1.0)


def test_a_function_that_changes_its_arguments_changes_nothing_else():
    def vandal(prompts, completions, completion_ids, tags):
        completions.reverse()
        prompts.clear()
        completion_ids[0].append(9)
        tags[0].append("x")
        return [0, 0, 0]

    columns = {"tags": [[], [], []]}
    scores = judge(Reward(vandal), Reward(characters), columns=columns)
    assert scores.values[1] == (1.0, 2.0, 3.0)
    assert (PROMPTS, COMPLETIONS, IDS) == (["p"] * 3, ["a", "bb", "ccc"], [[1], [1, 2], [1, 2, 3]])
    assert columns == {"tags": [[], [], []]}


def test_functions_log_columns_and_metrics():
    def logging(completions, log_extra, log_metric):
        log_extra("first", [completion[0] for completion in completions])
        log_metric("longest", 3)
        log_metric("longest", 4)
        return [0, 0, 0]

    scores = judge(Reward(logging))
    assert scores.extra == {"first": ["a", "b", "c"]}
    assert scores.metrics["longest"] == 3.5

    def short(completions, log_extra):
        log_extra("first", ["a"])
        return [0, 0, 0]

    assert "needs one value per completion: 3, got 1" in judge(Reward(short)).errors["short"].first


def test_conversational_batches_pass_through_unchanged():
    def check(prompts, completions, **_):
        assert prompts[0] == [{"role": "user", "content": "q"}]
        return [len(completion[0]["content"]) for completion in completions]

    completions = [[{"role": "assistant", "content": "abc"}]]
    assert score([Reward(check)], [[{"role": "user", "content": "q"}]], completions, [[1]], {}).total == (3.0,)


def test_an_empty_batch_has_no_scores_and_no_metrics():
    scores = score([Reward(characters)], [], [], [], {"answer": []})
    assert (scores.values, scores.total, scores.metrics) == (((),), (), {})


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"answer": ["a"]}, "answer must have one value per completion: 3, got 1"),
        ({"prompts": [1, 2, 3]}, "cannot be called 'prompts'"),
        ({"log_extra": [1, 2, 3]}, "cannot be called 'log_extra'"),
    ],
)
def test_columns_that_cannot_be_passed_are_refused(columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        judge(Reward(characters), columns=columns)


def test_rewards_without_a_name_of_their_own_are_refused():
    with pytest.raises(ValueError, match="different names"):
        judge(Reward(characters), Reward(characters))
    with pytest.raises(ValueError, match="at least one reward"):
        judge()
    with pytest.raises(ValueError, match="must be finite, got nan"):
        Reward(characters, float("nan"))


def test_the_total_matches_trls_weighted_nansum():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(2, 3))
    values[generator.random((2, 3)) < 0.4] = np.nan
    rewards = [
        Reward(returns([None if np.isnan(v) else v for v in row]), weight, name)
        for row, weight, name in zip(values, (0.7, -2.0), "ab", strict=True)
    ]
    expected = np.nansum(values * np.array([[0.7], [-2.0]]), axis=0)
    expected[np.isnan(values).all(axis=0)] = np.nan
    got = [np.nan if total is None else total for total in judge(*rewards).total]
    np.testing.assert_allclose(got, expected, rtol=1e-15)
