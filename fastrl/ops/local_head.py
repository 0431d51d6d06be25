"""The head as this rank works on it: its shard of the vocabulary, without the padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fastrl.ops.head import HeadSetting, HeadTensors
from fastrl.ops.vocab_parallel import VocabShard, equal_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def found_shard(weight: Tensor, process_group: ProcessGroup | None) -> VocabShard | None:
    """Which tokens the rows of weight are; None when they are all."""
    return None if process_group is None else equal_shard(weight.shape[0], process_group)


def check_backend(chosen: str, shard: VocabShard | None) -> None:
    """Raise where the specification, which has one rank, was asked for a sharded vocabulary."""
    if chosen == "reference" and shard is not None:
        raise ValueError("backend 'reference' has one rank: gather weight and leave out process_group, or use 'torch'")


def local_head(
    weight: Tensor, bias: Tensor | None, setting: HeadSetting, valid_vocab: int | None
) -> tuple[HeadTensors, HeadSetting]:
    """This rank's rows of the valid vocabulary and the setting that counts them.

    A rank whose rows are all padding keeps one, with a bias of -inf: a token that is never there and has no gradient.
    """
    if valid_vocab is None:
        return HeadTensors(weight, bias), setting
    if setting.shard is None:
        return HeadTensors(weight[:valid_vocab], None if bias is None else bias[:valid_vocab]), setting
    shard = setting.shard.valid(valid_vocab)
    if shard.size == 0:
        bias = (weight.new_zeros(1) if bias is None else bias[:1]) - math.inf
    size = max(shard.size, 1)
    return HeadTensors(weight[:size], None if bias is None else bias[:size]), replace(setting, shard=shard)
