"""A model with a scalar head as a reward: its score of a prompt and its completion, read at the last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.data.pack import pack
from fastrl.data.tokenize import render_prompt
from fastrl.train.score_model import last_scores, scored_sequence
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelReward:
    """A reward function (`fastrl.rewards.protocol`) that asks a model; it reads the token ids the engine sampled.

    Args:
        scores: batch -> [T] score of the prefix that ends at each fed position.
        tokenizer: of the policy and of the model alike.
        token_budget: most positions of a packed batch.
        device: of the model.
    """

    def __init__(
        self,
        scores: Callable[[TokenBatch], Tensor],
        tokenizer: PreTrainedTokenizerBase,
        *,
        token_budget: int,
        device: torch.device,
    ) -> None:
        self._scores = scores
        self._tokenizer = tokenizer
        self._token_budget = token_budget
        self._device = device

    def __call__(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], tools: Sequence[Any] | None = None
    ) -> list[float]:
        """[S] prompts as the data has them, [S] sampled ids, [S] a column of tools -> [S] scores."""
        rendered: dict[str, tuple[int, ...]] = {}
        texts = []
        for index, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
            tool = None if tools is None else tools[index]
            key = repr((prompt, tool))
            if key not in rendered:
                rendered[key] = render_prompt(self._tokenizer, prompt, tools=tool)
            texts.append((*rendered[key], *ids))
        found: list[float] = sequence_scores(
            self._scores, texts, token_budget=self._token_budget, device=self._device
        ).tolist()
        return found


@torch.no_grad()
def sequence_scores(
    scores: Callable[[TokenBatch], Tensor],
    texts: Sequence[Sequence[int]],
    *,
    token_budget: int,
    device: torch.device,
) -> Tensor:
    """[S] f32 on the CPU: the score of each text at its last token.

    Args:
        scores: batch -> [T] score of the prefix that ends at each fed position.
        texts: [S] token ids.
        token_budget: most positions of a packed batch; a text of n tokens takes n.
    """
    sequences = [scored_sequence(ids, [0.0] * (len(ids) - 1) + [1.0]) for ids in texts]
    result = torch.zeros(len(texts))
    for batch in pack(sequences, token_budget=token_budget, device=device):
        result[batch.sequence.cpu()] = last_scores(scores(batch), batch).cpu()
    return result
