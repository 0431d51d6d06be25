from __future__ import annotations

import pickle

import pytest

from fastrl.rewards import Reward, score, verl_reward


def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "crash":
        raise KeyError("no such key")
    return float(solution_str == ground_truth) + extra_info["bonus"]


def detailed(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "odd":
        return {"acc": 1}
    return {"score": len(solution_str), "acc": solution_str == ground_truth, "source": data_source}


COLUMNS = {
    "data_source": ["gsm8k"] * 3,
    "reward_model": [{"style": "rule", "ground_truth": "18"}] * 3,
    "extra_info": [{"bonus": 0.5}] * 3,
    "ability": ["math"] * 3,
}


def test_verl_columns_reach_compute_score_and_a_crash_counts_for_its_item_alone():
    scores = score([Reward(verl_reward(compute_score))], ["p"] * 3, ["18", "crash", "17"], [[1]] * 3, COLUMNS)
    assert scores.values == ((1.5, None, 0.5),)
    assert scores.total == (1.5, None, 0.5)
    assert scores.errors["compute_score"].count == 1
    assert "KeyError: 'no such key'" in scores.errors["compute_score"].first
    assert "compute_score(" in scores.errors["compute_score"].first


def test_a_mapping_gives_its_score_and_logs_the_rest():
    completions = [[{"role": "assistant", "content": "18"}], "odd", "1"]
    scores = score([Reward(verl_reward(detailed), name="verl")], ["p"] * 3, completions, [[1]] * 3, COLUMNS)
    assert scores.total == (2.0, None, 1.0)
    assert scores.extra == {"acc": [True, None, False], "source": ["gsm8k", None, "gsm8k"]}
    assert "without 'score': ['acc']" in scores.errors["verl"].first


def test_a_flat_ground_truth_is_read_too_and_none_at_all_is_an_error():
    reward = verl_reward(detailed)
    assert reward(["ab"], ground_truth=["ab"]) == [2]
    with pytest.raises(ValueError, match="needs the column reward_model"):
        reward(["ab"])


def test_it_can_travel_to_another_process():
    assert pickle.loads(pickle.dumps(verl_reward(detailed)))(["ab"], ground_truth=["ab"]) == [2]


def test_an_async_compute_score_is_refused():
    async def later(data_source, solution_str, ground_truth, extra_info):
        return 1.0

    with pytest.raises(ValueError, match="later is async"):
        verl_reward(later)
