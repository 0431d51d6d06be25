"""What a step is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fastrl.plan.lengths import Lengths
from fastrl.plan.shape import ModelShape

LEAST_SAVED = 0.1  # of the positions, for sharing; a test compares it with fastrl.data.prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimizer step of a group-relative policy gradient on one processor.

    Attributes:
        shape: of the policy.
        lengths: of prompts and completions.
        prompts: groups of one processor's step.
        generations: completions of a group (G).
        without_signal: share of the completions whose advantage is zero; they never reach the backbone.
        micro_tokens: most tokens of a packed micro-batch.
        checkpointing: keep only each layer's input for the backward pass.
        has_reference: a KL to a frozen reference is computed.
        old_passes: forward passes for the sampling policy's log-probabilities; 0 with one update for each batch.
        lora_r: rank of adapters of all the layers' matrices over frozen weights; 0 trains all weights.
    """

    shape: ModelShape
    lengths: Lengths
    prompts: int
    generations: int
    without_signal: float = 0.0
    micro_tokens: int = 16_384
    checkpointing: bool = False
    has_reference: bool = False
    old_passes: int = 0
    lora_r: int = 0

    @property
    def adapter(self) -> int:
        """Numbers in the adapters' matrices."""
        return self.lora_r * self.shape.layers * sum(self.shape.layer_widths)

    @property
    def trainable(self) -> int:
        """Parameters with a gradient."""
        return self.adapter or self.shape.parameters

    @property
    def completions(self) -> int:
        """Sampled in a step, on one processor."""
        return self.prompts * self.generations

    @property
    def trained(self) -> float:
        """Completions that reach the backbone."""
        return self.completions * (1.0 - self.without_signal)

    @property
    def tokens(self) -> float:
        """Positions of the packed sequences: prompts and completions."""
        return self.trained * (self.lengths.prompt + self.lengths.mean())

    @property
    def fed_tokens(self) -> float:
        """Positions that go through the layers: a prompt once for the completions that share a micro-batch with it.

        Packing keeps runs of a group together up to a quarter of a micro-batch.
        """
        whole = self.lengths.prompt + self.lengths.mean()
        copies = min(self.generations, ceil(4 * self.generations * whole / self.micro_tokens))
        fed = self.trained * (self.lengths.mean() + self.lengths.prompt * copies / self.generations)
        return fed if fed <= (1 - LEAST_SAVED) * self.tokens else self.tokens

    @property
    def head_rows(self) -> float:
        """Fed to the head: completions only."""
        return self.trained * self.lengths.mean()

    @property
    def sampled_tokens(self) -> float:
        """Of all prompts and completions of the step: what `tokens_per_second` counts."""
        return self.completions * (self.lengths.prompt + self.lengths.mean())

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the step; packing fills them."""
        return max(1, -(-int(self.tokens) // self.micro_tokens))

    @property
    def attention_pairs(self) -> float:
        """Pairs of a query and a key it sees, summed over the trained sequences: half of each length's square."""
        return self.trained * self.lengths.mean_square() / 2
