"""What one decoder layer reads, writes, keeps and launches beside its matrix products, for one token.

The numbers were counted, not estimated: every operator of transformers' Qwen3 and Llama layers was watched, forward
and backward, its inputs and outputs added up, and the sum fitted to D, I and (heads + kv_heads) head_dim, in which it
is linear (`python -m bench.layer_traffic` counts them again). Products and attention are left out: `cost` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.plan.shape import ModelShape

FORWARD_SHARE = 0.3  # of a layer's traffic, counted likewise; what activation checkpointing repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Bytes for one token and layer, per unit of width; launches for one layer and micro-batch.

    Attributes:
        element: bytes of a weight in the products.
        hidden, intermediate, heads: bytes read and written, forward and backward.
        heads_qk_norm: the same as `heads` where queries and keys are normalised.
        kept_hidden, kept_intermediate, kept_heads, kept_heads_qk_norm: bytes kept for the backward pass.
        launches, launches_qk_norm: kernels, forward and backward.
    """

    element: int
    hidden: float
    intermediate: float
    heads: float
    heads_qk_norm: float
    kept_hidden: float
    kept_intermediate: float
    kept_heads: float
    kept_heads_qk_norm: float
    launches: int
    launches_qk_norm: int

    def traffic(self, shape: ModelShape) -> float:
        """Bytes that elementwise kernels read and write for one token in one layer, forward and backward."""
        width = (shape.heads + shape.kv_heads) * shape.head_dim
        heads = self.heads_qk_norm if shape.qk_norm else self.heads
        return self.hidden * shape.hidden + self.intermediate * shape.intermediate + heads * width

    def kept(self, shape: ModelShape) -> float:
        """Bytes kept for the backward pass for one token in one layer."""
        width = (shape.heads + shape.kv_heads) * shape.head_dim
        heads = self.kept_heads_qk_norm if shape.qk_norm else self.kept_heads
        return self.kept_hidden * shape.hidden + self.kept_intermediate * shape.intermediate + heads * width

    def kernels(self, shape: ModelShape) -> int:
        """Kernels of one layer and micro-batch, forward and backward."""
        return self.launches_qk_norm if shape.qk_norm else self.launches


# transformers' modules in bfloat16: norms go through float32, five to ten kernels each.
BFLOAT16 = LayerCost(
    element=2,
    hidden=306.0,
    intermediate=28.0,
    heads=88.7,
    heads_qk_norm=222.6,
    kept_hidden=16.0,
    kept_intermediate=8.0,
    kept_heads=5.4,
    kept_heads_qk_norm=11.5,
    launches=125,
    launches_qk_norm=173,
)
# `kernels.layers: triton` in bfloat16: one kernel each for norm, rotation and the feed-forward's product.
TRITON_BFLOAT16 = LayerCost(
    element=2,
    hidden=63.0,
    intermediate=16.0,
    heads=54.7,
    heads_qk_norm=64.9,
    kept_hidden=8.0,
    kept_intermediate=6.0,
    kept_heads=5.4,
    kept_heads_qk_norm=7.5,
    launches=62,
    launches_qk_norm=68,
)
LAYERS = {"transformers": BFLOAT16, "triton": TRITON_BFLOAT16}  # on a GPU, by `kernels.layers`
# `fastrl.train.native_layers` in float32 on a CPU.
NATIVE_FLOAT32 = LayerCost(
    element=4,
    hidden=124.0,
    intermediate=32.0,
    heads=37.3,
    heads_qk_norm=57.5,
    kept_hidden=16.0,
    kept_intermediate=12.0,
    kept_heads=8.1,
    kept_heads_qk_norm=12.2,
    launches=47,
    launches_qk_norm=51,
)
