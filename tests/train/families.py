"""Tiny random models of several families, built from configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging import version
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that a leak between sequences shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# A family is what it does differently: grouped queries, q/k norms, windows, caps, scaled logits, biases, experts.
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=3),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=8, sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=3),
    "granite": lambda: GraniteConfig(
        **SIZES, logits_scaling=4.0, attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=3),
    "phi3": lambda: Phi3Config(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, rotary_pct=0.5),
}
if version.parse(transformers.__version__).major >= 5:  # experts do not go through the attention interface before
    FAMILIES["olmoe"] = lambda: OlmoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    )


def family(name: str) -> PreTrainedModel:
    """A random float32 model of the family; the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
