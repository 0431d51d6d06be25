"""The sizes of a decoder-only transformer: all that its cost depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense Llama-like model: attention with grouped keys, a gated feed-forward layer, RMS norms.

    Attributes:
        hidden: width of the residual stream (D).
        layers: decoder layers (L).
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        intermediate: width of the feed-forward layer.
        vocab: rows of the head (V).
        tied: the head is the embedding.
        qk_norm: queries and keys are normalised (Qwen3), which keeps more for the backward pass.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer; each is one multiply and one add for each token."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_widths(self) -> tuple[int, int]:
        """Inputs and outputs of one layer's matrices, each added up: what an adapter of rank 1 has numbers for."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inputs = 3 * self.hidden + queries + 2 * self.hidden + self.intermediate
        return inputs, queries + 2 * keys + self.hidden + 2 * self.intermediate + self.hidden

    @property
    def backbone(self) -> int:
        """Numbers in all layers' matrices."""
        return self.layers * self.layer_weights

    @property
    def head(self) -> int:
        """Numbers in the head, V x D."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; norms are a few thousandths and left out."""
        return self.backbone + self.head * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers that the key-value cache keeps for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> ModelShape:
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocab=151_936,
        tied=tied,
        qk_norm=True,
    )


# From the configurations that the models are published with.
SHAPES: dict[str, ModelShape] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600, tied=False),
    "llama-3-8b": ModelShape(
        hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14_336, vocab=128_256
    ),
    "llama-3-70b": ModelShape(
        hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, intermediate=28_672, vocab=128_256
    ),
}


def shape_of(model: str) -> ModelShape:
    """The shape of a name in `SHAPES`, or of a directory or file with a Hugging Face config.json.

    Raises:
        ValueError: neither, or a model whose cost is not that of a dense decoder.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{model!r} is neither a directory with a config.json nor one of {', '.join(SHAPES)}; name one of them"
        )
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); give the model's config.json") from None
    config = found.get("text_config", found) if isinstance(found, dict) else found
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not an object of names and values; give the model's config.json")
    return _from_config(config, file)


def _from_config(config: Mapping[str, Any], file: Path) -> ModelShape:
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"{file} is a mixture of experts; the cost model covers dense models only")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; the cost model needs a Llama-like configuration")
    sizes = {name: config[name] for name in (*names, "num_key_value_heads", "head_dim") if config.get(name) is not None}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{file} has {name} {size!r}; sizes are at least 1")
    heads = config["num_attention_heads"]
    if config.get("head_dim") is None and config["hidden_size"] < heads:
        raise ValueError(
            f"{file} has {heads} heads in hidden_size {config['hidden_size']}; give head_dim or fewer heads"
        )
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=str(config.get("model_type", "")).startswith("qwen3"),
    )
