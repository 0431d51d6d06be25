"""A Qwen3 of any size with random weights: for the demo, the tests and first experiments on a laptop."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastrl.train.attention import use_packed_attention
from fastrl.train.native_layers import use_native_layers


def make_tiny_qwen3(
    vocab_size: int,
    *,
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int | None = None,
    context: int = 1024,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    tie_embeddings: bool = True,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A float32 Qwen3 on the CPU whose weights depend on the arguments alone; the global generators stay untouched.

    Matrices are normal with deviation 0.5 / sqrt(hidden_size), which is the usual 0.02 at width 625 and lets narrow
    models learn, and 1 / sqrt(2 layers) of that where they write into the residual stream (Radford et al. 2019,
    sec. 2.3); norms are 1.

    Args:
        intermediate_size: width of the feed-forward layers; None is three times the hidden size.
        context: longest sequence the configuration announces.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size if intermediate_size is not None else 3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=context,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws its own initial values from the global generator
        model = Qwen3ForCausalLM(config)
    deviation = 0.5 * hidden_size**-0.5
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(
                0.0, deviation / (2 * layers) ** 0.5 if is_residual_output else deviation, generator=generator
            )
    use_packed_attention(model, "sdpa")
    use_native_layers(model)
    return model.eval()  # type: ignore[no-any-return]
