"""Rollouts as a flat map of tensors, for checkpoints: exact, small and without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, get_args

import torch
from torch import Tensor

from fastrl.types import FinishReason, Rollout

_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


def rollouts_as_tensors(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Every field of every rollout; columns of tokens lie end to end.

    Returns:
        `length` [S, 2] of prompt and completion, `fact` [S, 4] (reason, version, whether there are token versions,
        whether there are flags of sampled tokens), and one flat tensor for each column of tokens.
    """
    return {
        "length": _integers([(len(each.prompt_ids), len(each.completion_ids)) for each in rollouts]).view(-1, 2),
        "fact": _integers(
            [
                (
                    _REASONS.index(each.finish_reason),
                    each.policy_version,
                    each.token_version is not None,
                    each.is_sampled is not None,
                )
                for each in rollouts
            ]
        ).view(-1, 4),
        "prompt": _integers(list(chain.from_iterable(each.prompt_ids for each in rollouts))),
        "completion": _integers(list(chain.from_iterable(each.completion_ids for each in rollouts))),
        "logprob": torch.tensor(list(chain.from_iterable(each.logprob for each in rollouts)), dtype=torch.float64),
        "token_version": _integers(list(chain.from_iterable(each.token_version or () for each in rollouts))),
        "is_sampled": _integers(list(chain.from_iterable(each.is_sampled or () for each in rollouts))),
    }


def rollouts_from_tensors(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """The rollouts of `rollouts_as_tensors`, equal to the last bit."""
    columns = {
        name: iter(tensors[name].tolist())
        for name in ("prompt", "completion", "logprob", "token_version", "is_sampled")
    }
    found = []
    for (prompt, completion), (reason, version, has_versions, has_flags) in zip(
        tensors["length"].tolist(), tensors["fact"].tolist(), strict=True
    ):
        found.append(
            Rollout(
                prompt_ids=_next(columns["prompt"], prompt),
                completion_ids=_next(columns["completion"], completion),
                logprob=_next(columns["logprob"], completion),
                finish_reason=_REASONS[reason],
                policy_version=version,
                is_sampled=tuple(map(bool, _next(columns["is_sampled"], completion))) if has_flags else None,
                token_version=_next(columns["token_version"], completion) if has_versions else None,
            )
        )
    return found


def _next(column: Iterator[Any], n: int) -> tuple[Any, ...]:
    return tuple(islice(column, n))


def _integers(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
