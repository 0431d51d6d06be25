"""QLoRA's base: linear layers in 4-bit NormalFloat with doubly quantised scales, by bitsandbytes; never trained.

    W = scale[block] * codebook[index],    64 weights a block, 16 quantiles of N(0, 1) in the codebook

About 4.1 bits a weight. Embeddings, norms and the head keep their precision. Products dequantise a layer's matrix and
compute in the model's dtype.

Source: Dettmers et al. 2023, arXiv:2305.14314, sec. 3.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def four_bit(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantise a model while it is read, on `device`.

    Args:
        dtype: of the computation.

    Raises:
        RuntimeError: bitsandbytes is not installed.
    """
    silence_bitsandbytes()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        remedy = "pip install bitsandbytes, or leave load_in_4bit out"
        raise RuntimeError(f"load_in_4bit needs bitsandbytes, which does not load ({error}); {remedy}") from error
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": device},
    }


def silence_bitsandbytes() -> None:
    """Let its import not warn, on CPUs with bfloat16 instructions, of a download it would like; peft imports it too."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def keep_differentiable(model: nn.Module) -> None:
    """Leave every 4-bit layer in the layout it was read in.

    In eval mode on CPUs with AVX512-BF16, bitsandbytes (0.49 and later) moves a layer to a layout whose product has no
    backward pass, and fastrl's models are in eval mode while they train.
    """
    for _, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every linear layer whose weight is in 4 bits."""
    return ((path, module) for path, module in model.named_modules() if is_four_bit(module))


def is_four_bit(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' 4-bit layers; without its import there are none."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def dequantized(layer: Any) -> Tensor:
    """[out, in] weight of a 4-bit layer in the precision it was read in."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight
