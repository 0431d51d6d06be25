"""The forward pass of one decoding step: ours where a model is known and was seen to agree, transformers' elsewhere.

The rule: a model whose structure `llama_decode.is_known` accepts takes its first decoding step both ways. When the
logits agree, later steps are ours; when they do not, one warning is given and the model stays with transformers. A
model that is not known, and every model under an attention that makes its own masks, stays there without a word.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fastrl.rollout.llama_decode import LlamaDecode, is_known
from fastrl.rollout.masks import is_mask_made_by_model


class Stepper:
    """Owner of what decodes one model: nothing between calls of `generate`, a layout of its weights inside one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.has_agreed: bool | None = None  # None until a step was taken both ways
        self._lean: LlamaDecode | None = None

    def prepare(self, context: int) -> None:
        """Read the weights of now; `context` is past the last position that will be fed."""
        if self.has_agreed is not False and is_known(self.model) and not is_mask_made_by_model(self.model):
            self._lean = LlamaDecode(self.model, context=context)

    def release(self) -> None:
        """Forget the weights: they are about to change."""
        self._lean = None

    def __call__(self, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Feed one token per row and append it to the cache.

        Args:
            token, position: [B] int64.
            mask: over what the cache holds, the new token included; None without padding.

        Returns:
            [B, V] f32 logits.
        """
        if self._lean is None:
            return self._by_transformers(token, position, mask, cache)
        if self.has_agreed:
            return self._lean(token, position, mask, cache).float()
        expected = self._by_transformers(token, position, mask, cache)
        _step_back(cache)
        got = self._lean(token, position, mask, cache).float()
        self._compare(got, expected)
        if self.has_agreed:
            return got  # so that a call's first step rounds as that of every later call
        _step_back(cache)
        return self._by_transformers(token, position, mask, cache)

    def _by_transformers(self, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        output = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        """Judge by the rows whose logits are finite; without one, the next step is taken both ways again."""
        is_finite = expected.isfinite().all(dim=-1)
        if not bool(is_finite.any()):
            return
        got, expected = got[is_finite], expected[is_finite]
        gap = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
        self.has_agreed = gap <= (1e-4 if self.model.dtype in (torch.float32, torch.float64) else 0.03)
        if not self.has_agreed:
            self._lean = None
            warnings.warn(
                f"fastrl's own decoding step gives {type(self.model).__name__} logits that differ from transformers' "
                f"by {gap:.1e} (relative); decoding stays with transformers",
                stacklevel=2,
            )


def _step_back(cache: Cache) -> None:
    """Let the next step write over the last one's keys and values."""
    for layer in cache.layers:
        layer.used -= 1
