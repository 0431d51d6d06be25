"""Tiny random models of several architectures and a byte-level tokenizer, made on the spot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
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
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIALS = ("<pad>", "<eos>", "<turn>")  # ids 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz.ĠÃ©"  # as byte-level vocabularies write them: Ġ is the space, Ã© the bytes of é
CONTEXT = 48
V = 40


def tiny_tokenizer(eos: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that é is two tokens. Ids above the letters' are unused, as in padded vocabularies."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *LETTERS])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def qwen3() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return made(Qwen3ForCausalLM, config, "sdpa")


def llama_eager() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return made(LlamaForCausalLM, config, "eager")


def gpt2() -> PreTrainedModel:
    """Absolute positions: a position past the context would be an index error; and dropout, which must be off."""
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
    return made(GPT2LMHeadModel, config, "sdpa")


def mistral_window() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=5,
    )
    return made(MistralForCausalLM, config, "sdpa")


def gemma2_softcap() -> PreTrainedModel:
    """Soft caps on attention and on the final logits; layers alternate between a window and the whole context."""
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        sliding_window=5,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"],
    )
    return made(Gemma2ForCausalLM, config, "eager")


def made(kind: type[PreTrainedModel], config: object, attention: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose distributions are neither flat nor certain, without EOS unless a test sets one."""
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0  # type: ignore[attr-defined]
    config._attn_implementation = attention  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    model.generation_config.eos_token_id = None
    return model


MODELS: tuple[Callable[[], PreTrainedModel], ...] = (qwen3, llama_eager, gpt2, mistral_window, gemma2_softcap)
