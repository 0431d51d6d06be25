"""Copying one module's weights into another of the same architecture, with every disagreement refused by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Write every parameter and persistent buffer of `source` into `target`, cast to the target's dtype and device.

    Tied tensors (an embedding that is also the head) are written once. All is checked before anything is written.

    Raises:
        ValueError: names that differ, a shape that differs, or tensors that are one in the target and two unequal
            ones in the source.
    """
    new, old = source.state_dict(), target.state_dict()
    if new.keys() != old.keys():
        missing, unknown = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        raise ValueError(f"the weights do not fit the engine's model: missing {missing[:4]}, unknown {unknown[:4]}")
    written: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in old.items():
        if new[name].shape != tensor.shape:
            raise ValueError(f"{name} must be {list(tensor.shape)} for the engine's model, got {list(new[name].shape)}")
        first = written.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if tensor.numel() and not _are_same(new[first], new[name]):
            raise ValueError(f"{first} and {name} are one tensor in the engine's model, but differ in the new weights")
    with torch.no_grad():
        for name in written.values():
            old[name].copy_(new[name])


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
