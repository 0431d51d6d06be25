"""Log-probabilities of logits under the names and arguments of OpenRLHF, slime and AReaL, over `logits_logprob`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from fastrl.ops import logits_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's: log-probability of labels [..] under logits [.., V] / temperature, as labels; leaves the logits."""
    stats = logits_logprob(logits.flatten(0, -2), labels.flatten(), temperature=temperature)
    return stats.logprob.reshape(labels.shape)


def compute_log_probs(logits: Tensor, tokens: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """slime's: log-probability [N, 1] of tokens [N] under logits [N, V].

    Raises:
        ValueError: process_group has several ranks.
    """
    _require_whole_vocabulary("process_group", process_group)
    return logits_logprob(logits, tokens).logprob[:, None]


def gather_logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """AReaL's: log-probability and entropy, as labels [..], of logits [.., V] / temperature.

    chunk_size is a bound on rows at a time, as AReaL's.

    Raises:
        ValueError: tp_group has several ranks.
    """
    _require_whole_vocabulary("tp_group", tp_group)
    stats = logits_logprob(
        logits.flatten(0, -2),
        labels.flatten(),
        temperature=temperature,
        chunk_rows=min(chunk_size, labels.numel()) or None,
    )
    return stats.logprob.reshape(labels.shape), stats.entropy.reshape(labels.shape)


def _require_whole_vocabulary(name: str, group: ProcessGroup | None) -> None:
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        raise ValueError(
            f"{name} has {ranks} ranks, so the logits are a part of the vocabulary and this function would normalize "
            "over that part alone: keep the host's own function under tensor parallelism"
        )
