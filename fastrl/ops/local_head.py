"""The head as this rank works on it: plain tensors, its shard of the vocabulary, without the padding."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from fastrl.ops.head import HeadSetting, HeadTensors
from fastrl.ops.lora import Lora
from fastrl.ops.main_grad import main_grad_of
from fastrl.ops.vocab_parallel import VocabShard, cut_shard, equal_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def on_this_rank(
    weight: Tensor, bias: Tensor | None, lora: Lora | None, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, Lora | None, VocabShard | None]:
    """Plain tensors in place of a distributed head, and which tokens their rows are; None when they are all.

    A replicated DTensor is its local tensor. One sharded by tokens needs process_group: it looks the same whether
    tensor parallelism cut it, with equal hidden states on every rank, or FSDP, with other hidden states on each.

    Raises:
        ValueError: a weight that is elsewhere, with the way to get it here.
    """
    _refuse_gathered_elsewhere(weight)
    bias = None if bias is None else _unwrapped("bias", bias, process_group)
    if lora is not None:
        lora = replace(lora, a=_unwrapped("lora.a", lora.a, None), b=_unwrapped("lora.b", lora.b, process_group))
    shard = None
    if process_group is not None:
        shard = (cut_shard if _is_dtensor(weight) else equal_shard)(weight.shape[0], process_group)
    return _unwrapped("weight", weight, process_group), bias, lora, shard


def _refuse_gathered_elsewhere(weight: Tensor) -> None:
    """Raise for parameters that their owner has emptied until the module's forward."""
    if getattr(weight, "ds_status", None) is not None and weight.numel() == 0:
        raise ValueError(
            "weight is a DeepSpeed ZeRO-3 parameter that is not gathered: call the op inside the module's forward, "
            "or inside `with deepspeed.zero.GatheredParameters([weight]):`"
        )
    if weight.dim() == 1:
        raise ValueError(
            f"weight must be [V,D], got shape {tuple(weight.shape)}; an FSDP parameter is flat outside its module's "
            "forward: call the op inside that forward, or inside FullyShardedDataParallel.summon_full_params"
        )


def _is_dtensor(x: Tensor) -> bool:
    # Nobody has a DTensor before somebody imported it; the import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _unwrapped(name: str, x: Any, group: ProcessGroup | None) -> Tensor:
    """A plain tensor itself, or a DTensor's local one; its gradient becomes a DTensor again."""
    if not _is_dtensor(x):
        return x  # type: ignore[no-any-return]
    cut = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not cut and group is None:
        return x.to_local()  # type: ignore[no-any-return]
    if group is None:
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}: for an FSDP parameter call the op inside its "
            "module's forward or after unshard(); for a vocabulary that tensor parallelism cut, with the same hidden "
            "states on every rank, pass process_group=weight.device_mesh.get_group(); else pass full_tensor()"
        )
    by_tokens = len(cut) == 1 and x.placements[cut[0]].is_shard(0)
    ranks = dist.get_process_group_ranks(group)
    if not by_tokens or dist.get_process_group_ranks(x.device_mesh.get_group(cut[0])) != ranks:
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}: with process_group it must be cut along dimension 0 "
            "by exactly that group's mesh dimension; redistribute() it"
        )
    return x.to_local()  # type: ignore[no-any-return]


def check_backend(chosen: str, shard: VocabShard | None) -> None:
    """Raise where the specification, which has one rank, was asked for a sharded vocabulary."""
    if chosen == "reference" and shard is not None:
        raise ValueError("backend 'reference' has one rank: gather weight and leave out process_group, or use 'torch'")


def local_head(
    weight: Tensor, bias: Tensor | None, lora: Lora | None, setting: HeadSetting, valid_vocab: int | None
) -> tuple[HeadTensors, HeadSetting]:
    """This rank's rows of the valid vocabulary and the setting that counts them.

    A rank whose rows are all padding keeps one, with a bias of -inf: a token that is never there and has no gradient.
    """
    size = valid_vocab
    if valid_vocab is not None and setting.shard is not None:
        shard = setting.shard.valid(valid_vocab)
        setting, size = replace(setting, shard=shard), max(shard.size, 1)
        if shard.size == 0:
            bias = (weight.new_zeros(1) if bias is None else bias[:1]) - math.inf
    setting = replace(setting, main_grad=main_grad_of(weight, size))
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    if lora is not None:
        setting = replace(setting, lora_scale=lora.scale)
    if size is not None:
        weight, bias, b = weight[:size], None if bias is None else bias[:size], None if b is None else b[:size]
    return HeadTensors(weight, bias, a, b), setting
