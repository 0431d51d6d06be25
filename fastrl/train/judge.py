"""A language model as a judge: the probability it gives to a verdict, through the waist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.data.judgements import VERDICTS
from fastrl.data.pack import TokenSequence, pack
from fastrl.data.tokenize import render_prompt
from fastrl.train.config import KernelsBlock
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def verdict_probability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    verdicts: tuple[str, str] = VERDICTS,
    token_budget: int = 8192,
) -> Tensor:
    """P(first verdict), of the two: how sure a generative reward model is that an answer is right.

        p[s] = exp(l(yes)) / (exp(l(yes)) + exp(l(no))),    l = log-probability of the verdict's tokens after the prompt

    Args:
        prompts: [S] as `fastrl.data.judgements` makes them: texts or messages.
        verdicts: of right and wrong answers, as in training; what the model might say instead is left out.
        token_budget: most positions of a packed batch.

    Returns:
        [S] f32 on the CPU, in [0, 1]: usable as a reward.

    Source: Zhang 2024, arXiv:2408.15240, sec. 3.1; theirs is p(Yes), not divided by the sum of the two.
    """
    if not prompts:
        return torch.zeros(0)
    endings = [tokenizer(verdict, add_special_tokens=False)["input_ids"] for verdict in verdicts]
    if not all(endings) or endings[0] == endings[1]:
        raise ValueError(f"verdicts must make different tokens, got {verdicts} as {endings}")
    sequences = []
    for prompt in prompts:
        ids = render_prompt(tokenizer, prompt)
        for ending in endings:
            sequences.append(TokenSequence([*ids, *ending], [0.0] * len(ids) + [1.0] * len(ending)))
    logprob = torch.zeros(len(sequences))
    for batch in pack(sequences, token_budget=token_budget, device=model.device):
        found, _ = trained_logprob(model, model_head(model), batch, KernelsBlock())
        logprob[batch.sequence.cpu()] = sequence_sum(found, batch).cpu()
    return logprob.view(-1, 2).softmax(-1)[:, 0]
