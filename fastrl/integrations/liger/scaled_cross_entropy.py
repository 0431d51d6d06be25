"""Liger's scaled cross entropy: the waist's log-probability and entropy under another name and sign."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.ops import linear_logprob


class LigerFusedLinearScaledCrossEntropyFunction:
    """`apply(_input, weight, target, temperature, ignore_index, m_tiles_per_cluster, return_entropy)`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Negative log-likelihood at a temperature, and the entropy.

        Args:
            _input: [M, H]; differentiable.
            weight: [V, H]; differentiable.
            target: [M] int64.
            temperature: divides the logits, finite and > 0.
            ignore_index: rows with this target have both numbers 0, without gradient.
            m_tiles_per_cluster: a tile size of Liger's sm_90 kernel; checked, and changes nothing here.
            return_entropy: return a pair.

        Returns:
            [M] float32 nll; with return_entropy also [M] entropy in _input's dtype. Differentiable both.

        Raises:
            TypeError, ValueError: as Liger's.
        """
        if not isinstance(m_tiles_per_cluster, int) or isinstance(m_tiles_per_cluster, bool):
            raise TypeError("m_tiles_per_cluster must be an int")
        if m_tiles_per_cluster < 1:
            raise ValueError("m_tiles_per_cluster must be >= 1")
        if not isinstance(return_entropy, bool):
            raise TypeError("return_entropy must be a bool")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError("temperature must be a real number")
        if not math.isfinite(temperature) or temperature <= 0:
            raise ValueError("temperature must be finite and > 0")
        if target.dtype != torch.int64:
            raise TypeError("target must be an int64 tensor")
        is_read = target != ignore_index
        if bool((is_read & ((target < 0) | (target >= len(weight)))).any()):
            raise ValueError(
                f"target contains values outside [0, {len(weight)}) that are not ignore_index={ignore_index}"
            )
        stats = linear_logprob(_input, weight, target.masked_fill(~is_read, -1), temperature=temperature)
        nll = -stats.logprob
        if not return_entropy:
            return nll
        return nll, stats.entropy.where(is_read, 0.0).to(_input.dtype)
