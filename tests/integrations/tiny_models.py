"""Tiny causal models of transformers, and their loss and gradients with and without fastrl."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from fastrl.integrations.transformers import apply_fastrl

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What lies between the head's product and the loss: nothing, a cap, a factor, a divisor, a product with both.
MODELS: dict[str, Any] = {
    "Qwen3": {},
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 0.5, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
}


def make_model(kind: str = "Qwen3", spread: float = 3.0, **changes: Any) -> Any:
    transformers.set_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS.get(kind, {}) | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # logits far from 0: a cap or a scale that was left out would show
        for parameter in model.parameters():
            parameter.mul_(spread)
    return model


def make_batch(rows: int = 3, tokens: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [x.grad.clone() for x in model.parameters() if x.grad is not None]


def assert_same_with_and_without(model: Any, **inputs: Any) -> None:
    expected = loss_and_gradients(model, **inputs)
    with apply_fastrl(model):
        got = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
