"""Tiny random models with attention heads of 32 numbers, the narrowest that vLLM's CPU kernels have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.rollout.tiny import CONTEXT, V, made

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}


def qwen3() -> PreTrainedModel:
    return made(Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True), "sdpa")


def llama() -> PreTrainedModel:
    return made(LlamaForCausalLM, LlamaConfig(**SIZES), "eager")


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=V, n_embd=64, n_head=2, n_layer=2, n_positions=CONTEXT)
    return made(GPT2LMHeadModel, config, "sdpa")


def mistral_window() -> PreTrainedModel:
    return made(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5), "sdpa")


def gemma2_softcap() -> PreTrainedModel:
    config = Gemma2Config(
        **SIZES,
        query_pre_attn_scalar=32,
        sliding_window=5,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"],
    )
    return made(Gemma2ForCausalLM, config, "eager")


MODELS: tuple[Callable[[], PreTrainedModel], ...] = (qwen3, llama, gpt2, mistral_window, gemma2_softcap)
