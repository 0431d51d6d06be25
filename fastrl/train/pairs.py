"""Preference pairs through the model: packed together, scored by sequence, and what is logged about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.report.preview import print_table
from fastrl.train.config import KernelsBlock, PreferenceConfig
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head
from fastrl.train.preference_rows import Pair, load_pairs
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PairScores:
    """The pairs of one packed batch under the policy.

    Attributes:
        chosen, rejected: [P] summed log-probability of the completions, nats; differentiable.
        chosen_length, rejected_length: [P] their trained tokens.
        sequence: [2P] places of chosen and rejected, in turn, in the step's list of sequences.
        entropy: [T] detached.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    sequence: Tensor
    entropy: Tensor


def pack_pairs(pairs: Sequence[Pair], *, token_budget: int, device: torch.device) -> list[TokenBatch]:
    """Pack chosen and rejected of each pair into one batch: sequences 2p and 2p + 1 of the step; weights are 1."""
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    sequences = [supervised_sequence(example.ids, example.is_trained, weight=1.0) for example in examples]
    pair_of = [i // 2 for i in range(len(sequences))]
    return packed_for_ranks(sequences, token_budget=token_budget, group=pair_of, device=device)


def pair_scores(
    model: PreTrainedModel, batch: TokenBatch, kernels: KernelsBlock, *, temperature: float = 1.0
) -> PairScores:
    """Score a batch of `pack_pairs`; prompt tokens, whose weight is 0, never reach the head."""
    logprob, entropy = trained_logprob(model, model_head(model, temperature=temperature), batch, kernels)
    chosen, rejected = halves(sequence_sum(logprob, batch))
    lengths = sequence_sum((batch.weight != 0).to(logprob.dtype), batch)
    return PairScores(chosen, rejected, *halves(lengths), batch.sequence, entropy.detach())


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """[2P] values of chosen and rejected sequences in turn -> [P] of chosen, [P] of rejected."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def pair_metrics(chosen_reward: Tensor, rejected_reward: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Item metrics under TRL's names.

    Args:
        chosen_reward, rejected_reward: [P] implicit rewards.
        chosen, rejected: [P] log-probabilities as the loss compares them, summed or averaged, nats.
    """
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": (chosen_reward > rejected_reward).to(chosen.dtype),
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {name: value.detach() for name, value in metrics.items()}


def n_tokens(pairs: Sequence[Pair]) -> int:
    """Tokens of all sequences, the prompt in both of a pair."""
    return sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs)


def n_chosen_tokens(pairs: Sequence[Pair]) -> int:
    """Trained tokens of the chosen completions."""
    return sum(sum(pair.chosen.is_trained) for pair in pairs)


def print_pairs(config: PreferenceConfig, tokenizer: Any) -> None:
    """Print how two rows are tokenised: the prompt, and what is learned of chosen and rejected."""
    pairs = load_pairs(config.train_dataset, tokenizer, config, output_dir=None)
    rows = []
    for pair in pairs.rows[:2]:
        start = pair.chosen.is_trained.index(True)
        texts = [pair.chosen.ids[:start], pair.chosen.ids[start:], pair.rejected.ids[start:]]
        rows.append([*(repr(tokenizer.decode(ids)) for ids in texts), f"{len(texts[1])} / {len(texts[2])}"])
    header = ("prompt", "chosen", "rejected", "completion tokens")
    print_table(f"{len(pairs.rows)} pairs; two of them", header, rows)
