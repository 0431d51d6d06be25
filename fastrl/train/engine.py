"""The engine that a recipe samples with, open from here to the end of its block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Engine
from fastrl.train.config import GKDConfig, InferenceConfig, OnPolicyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def opened_engine(
    config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Engine]:
    """The engine that `config.rollout` names, sampling from `policy`; what it holds is given back on every way out.

    Recipes that end in the middle (an error, an interrupt) leave the block like those that finish, so an engine's
    processes and memory never outlive its run.
    """
    yield BuiltinEngine(policy, tokenizer, batch_size=config.rollout.batch_size)
