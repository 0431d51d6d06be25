"""Judging completions: verifiers, their composition, and adapters to other projects' reward functions."""

from fastrl.rewards.exact_match import exact_match
from fastrl.rewards.format import think_format
from fastrl.rewards.length import Length
from fastrl.rewards.numeric import numeric
from fastrl.rewards.protocol import Reward, RewardFunction
from fastrl.rewards.reasoning_gym import reasoning_gym, reasoning_gym_rows
from fastrl.rewards.resolve import check_rewards, resolve_reward, resolve_rewards
from fastrl.rewards.score import RewardError, Scores, score
from fastrl.rewards.text import completion_text, final_answer
from fastrl.rewards.verl import verl_reward

__all__ = [
    "Length",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Scores",
    "check_rewards",
    "completion_text",
    "exact_match",
    "final_answer",
    "numeric",
    "reasoning_gym",
    "reasoning_gym_rows",
    "resolve_reward",
    "resolve_rewards",
    "score",
    "think_format",
    "verl_reward",
]
