"""Reward models by name: the values are the model's own, and every recipe that judges can ask for one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from fastrl.losses.reward_model import product
from fastrl.recipes import sorting
from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import resolve_reward, resolve_rewards
from fastrl.rewards.score import score
from fastrl.train.config import EvalConfig
from fastrl.train.contents import contents_of
from fastrl.train.learned_rewards import TOKEN_BUDGET, loaded
from fastrl.train.model import load_tokenizer
from fastrl.train.model_reward import ModelReward
from fastrl.train.score_model import load_score_model, save_score_model, token_scores
from fastrl.train.stepwise import StepReward
from fastrl.train.validate_rewards import reward_problem

PROMPTS = [[{"role": "user", "content": "123456"}]] * 3
IDS = [[4, 5, 6, 1], [7, 7, 1], [9]]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("01|2", "33", "5|6|7")]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sorting.make_base_model(folder / "base", seed=0)
    tokenizer = load_tokenizer(str(folder / "base"), chat_template=None, trust_remote_code=False)
    model = load_score_model(folder / "base", dtype=torch.float32, device="cpu", new_head=1.0)
    return save_score_model(model, tokenizer, folder / "scorer", card="a test")


def config(scorer: Path) -> EvalConfig:
    return EvalConfig(model_name_or_path=str(scorer), eval_dataset="", reward_funcs=(), device="cpu")


def test_a_named_reward_model_gives_the_models_scores_in_units_of_its_scale(scorer: Path) -> None:
    tokenizer = load_tokenizer(str(scorer), chat_template=None, trust_remote_code=False)
    rewards = resolve_rewards([f"reward_model(path='{scorer}', scale=4.0)", "length"], [0.5, 1.0])
    ready = loaded(config(scorer), tokenizer, rewards)
    assert [(reward.name, reward.weight) for reward in ready] == [("reward_model", 0.5), ("length", 1.0)]
    assert ready[0].spec == ""  # no worker loads the model again
    assert ready[1] is rewards[1]
    model = load_score_model(scorer, dtype=torch.float32, device="cpu")
    own = ModelReward(partial(token_scores, model), tokenizer, token_budget=TOKEN_BUDGET, device=torch.device("cpu"))(
        PROMPTS, IDS
    )
    assert score(ready[:1], PROMPTS, COMPLETIONS, IDS, {}).values[0] == pytest.approx([each / 4 for each in own])
    assert len(set(own)) == 3


def test_a_named_process_reward_model_gives_the_aggregate_of_its_steps(scorer: Path) -> None:
    tokenizer = load_tokenizer(str(scorer), chat_template=None, trust_remote_code=False)
    spec = f"process_reward_model(path='{scorer}', separator='<|end|>', aggregate='product')"
    ready = loaded(config(scorer), tokenizer, [Reward(resolve_reward(spec))])
    model = load_score_model(scorer, dtype=torch.float32, device="cpu")
    own = StepReward(model, tokenizer, separator="<|end|>", aggregate=product)(PROMPTS, COMPLETIONS)
    assert score(ready, PROMPTS, COMPLETIONS, IDS, {}).values[0] == pytest.approx(own)


def test_a_model_that_is_not_loaded_is_a_failure_and_no_score(scorer: Path) -> None:
    found = score([Reward(resolve_reward(f"reward_model(path='{scorer}')"))], PROMPTS, COMPLETIONS, IDS, {})
    assert found.total == (None,) * 3
    assert "is not loaded" in found.errors["reward_model"].first


def test_wrong_options_and_paths_are_found_before_torch_is_imported(scorer: Path) -> None:
    assert list(reward_problem(f"reward_model(path='{scorer}')")) == []
    assert list(reward_problem("reward_model(path='tiny:reward_model')")) == []
    assert list(reward_problem("reward_model(path='${reward}/model')")) == []
    (problem,) = reward_problem("reward_model(path='no/such')")
    assert problem.startswith("reward_funcs: reward_model: no/such is not a directory")
    (problem,) = reward_problem("reward_model(path='x', scale=0)", key="verify")
    assert problem == "verify: reward_model: scale must be above 0, got 0"
    (problem,) = reward_problem("process_reward_model(path='x', aggregate='mean')")
    assert "must be one of min, product, last, got 'mean'" in problem
    (problem,) = reward_problem("judge(config='no.yaml')")
    assert problem.startswith("reward_funcs: the judge file no.yaml does not exist")


def test_another_vocabulary_is_refused(scorer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(scorer), chat_template=None, trust_remote_code=False)
    tokenizer.add_tokens(["x"])
    with pytest.raises(ValueError, match=r"reward_model: .* has another vocabulary"):
        loaded(config(scorer), tokenizer, resolve_rewards([f"reward_model(path='{scorer}')"]))


def test_a_resumed_run_notices_another_reward_model_and_another_judge(scorer: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.yaml"
    judge.write_text(json.dumps({"model": "m"}))
    specs = [f"reward_model(path='{scorer}')", f'judge(config="{judge}")', "length(limit=200)"]
    found = contents_of(data=[], model="no/model", rewards=specs)
    assert found.keys() == {str(scorer / "config.json"), str(scorer / "model.safetensors"), str(judge)}
