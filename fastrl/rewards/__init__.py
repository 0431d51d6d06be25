"""Judging completions: verifiers, their composition, and adapters to other projects' reward functions."""

from fastrl.rewards.code_reward import CodeReward, code_reward
from fastrl.rewards.constraints import constraints
from fastrl.rewards.exact_match import exact_match
from fastrl.rewards.format import think_format
from fastrl.rewards.items import sequence_equality, set_equality
from fastrl.rewards.json_schema import JsonSchema, json_schema
from fastrl.rewards.judge import Judge
from fastrl.rewards.language import Language
from fastrl.rewards.learned import ProcessRewardModel, RewardModel
from fastrl.rewards.length import Length
from fastrl.rewards.math_reward import math_reward
from fastrl.rewards.multiple_choice import multiple_choice
from fastrl.rewards.numeric import numeric
from fastrl.rewards.protocol import Reward, RewardFunction, Traits, promises
from fastrl.rewards.reasoning_gym import reasoning_gym, reasoning_gym_rows
from fastrl.rewards.regex import Regex, regex
from fastrl.rewards.repetition import Repetition
from fastrl.rewards.resolve import check_rewards, resolve_reward, resolve_rewards
from fastrl.rewards.score import RewardError, Scores, score
from fastrl.rewards.sudoku import sudoku
from fastrl.rewards.tags import TagCounts
from fastrl.rewards.text import completion_text, final_answer
from fastrl.rewards.verl import verl_reward
from fastrl.rewards.workers import RewardWorkers

__all__ = [
    "CodeReward",
    "JsonSchema",
    "Judge",
    "Language",
    "Length",
    "ProcessRewardModel",
    "Regex",
    "Repetition",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "RewardWorkers",
    "Scores",
    "TagCounts",
    "Traits",
    "check_rewards",
    "code_reward",
    "completion_text",
    "constraints",
    "exact_match",
    "final_answer",
    "json_schema",
    "math_reward",
    "multiple_choice",
    "numeric",
    "promises",
    "reasoning_gym",
    "reasoning_gym_rows",
    "regex",
    "resolve_reward",
    "resolve_rewards",
    "score",
    "sequence_equality",
    "set_equality",
    "sudoku",
    "think_format",
    "verl_reward",
]
