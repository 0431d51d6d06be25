"""Who may look at whom when prompts of different lengths share a batch, aligned right.

    key slot k is visible from query slot q of a row  <=>  pad <= k <= q,  or k = q

The last case keeps padding rows finite: a softmax over nothing would be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

DECODABLE = {"full_attention", "sliding_attention", "chunked_attention"}


def is_mask_made_by_model(model: PreTrainedModel) -> bool:
    """Whether the model must build its masks itself, at every step, from a [B, length] padding mask.

    It must when layers see a window only, or when its attention takes no dense mask. Otherwise one additive mask,
    made once and sliced, serves every step.

    Raises:
        ValueError: layers that keep something else than keys and values, or windows under an attention
            implementation that has no masks.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"}
    if kinds - DECODABLE:
        raise ValueError(
            f"the built-in engine decodes layers of type {sorted(DECODABLE)}, but {type(model).__name__} has "
            f"{sorted(kinds - DECODABLE)}; use the vLLM engine"
        )
    attention: str = config._attn_implementation
    if kinds == {"full_attention"}:
        return attention.startswith(("flash", "flex"))
    if attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"{type(model).__name__} has sliding windows, and attention {attention!r} is not registered in "
            "transformers.AttentionMaskInterface; load the model with attn_implementation='sdpa'"
        )
    return True


def prompt_mask(pad: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[U, 1, width, width] additive mask for feeding `width` slots of prompts at once.

    Args:
        pad: [U] number of padding slots on the left.
    """
    slot = torch.arange(width, device=pad.device)
    query, key = slot[:, None], slot[None, :]
    visible = (key >= pad[:, None, None]) & (key <= query)
    return _additive(visible | (key == query), dtype)[:, None]


def decoding_mask(pad: Tensor, limit: int, dtype: torch.dtype, made_by_model: bool) -> Tensor:
    """Mask for all decoding steps: [B, limit] int64 or [B, 1, 1, limit] additive; step t takes `[..., : used + 1]`."""
    visible = torch.arange(limit, device=pad.device) >= pad[:, None]
    return visible.long() if made_by_model else _additive(visible, dtype)[:, None, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # The smallest number rather than -inf: eager attention would turn an all -inf row into NaN.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
