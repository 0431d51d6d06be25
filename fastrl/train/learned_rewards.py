"""Rewards that are models, loaded: from `fastrl.rewards.learned`'s descriptions to functions on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastrl.rewards.learned import ProcessRewardModel, RewardModel
from fastrl.rewards.protocol import Reward, RewardFunction
from fastrl.train.config import InferenceConfig, TrainConfig
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.model_reward import ModelReward
from fastrl.train.score_model import load_score_model, token_scores
from fastrl.train.stepwise import AGGREGATIONS, StepReward
from fastrl.train.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_BUDGET = 16384  # positions of one packed batch; nothing is differentiated, so this is little memory


def loaded(
    config: TrainConfig | InferenceConfig, tokenizer: PreTrainedTokenizerBase, rewards: Sequence[Reward]
) -> list[Reward]:
    """The rewards with a loaded, frozen model in place of each description of one; the others as they are.

    Args:
        config: of the run: device, precision of the weights (heads stay in float32), trust in remote code.
        tokenizer: the policy's. A reward model reads the ids the policy sampled, so its tokens must be the same.

    Raises:
        ValueError: no reward model there, or one with other tokens.
    """
    functions: list[RewardFunction] = []
    for reward in rewards:
        found = reward.function
        if not isinstance(found, RewardModel | ProcessRewardModel):
            functions.append(found)
            continue
        check_same_vocabulary(config, tokenizer, found.path, option=reward.name)
        device = pick_device(config.device)
        model = load_score_model(
            found.path, dtype=compute_dtype(config.dtype), device=device, trust_remote_code=config.trust_remote_code
        )
        functions.append(_function(found, model.requires_grad_(False), tokenizer, device))
    return [
        reward if function is reward.function else replace(reward, function=function, spec="")  # it stays in here
        for reward, function in zip(rewards, functions, strict=True)
    ]


def _function(
    found: RewardModel | ProcessRewardModel, model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> RewardFunction:
    if isinstance(found, ProcessRewardModel):
        aggregate = AGGREGATIONS[found.aggregate]
        return StepReward(model, tokenizer, separator=found.separator, aggregate=aggregate, token_budget=TOKEN_BUDGET)
    scores = partial(token_scores, model)
    return Scaled(ModelReward(scores, tokenizer, token_budget=TOKEN_BUDGET, device=device), found.scale)


@dataclass(frozen=True)
class Scaled:
    """A reward model's scores divided by a constant."""

    judge: ModelReward
    scale: float

    def __call__(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], tools: Sequence[Any] | None = None
    ) -> list[float]:
        """[S] prompts and sampled ids -> [S] scores."""
        return [score / self.scale for score in self.judge(prompts, completion_ids, tools)]
