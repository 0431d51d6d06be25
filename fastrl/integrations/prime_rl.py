"""prime-rl's output layer over our waist: per-token temperature, log-probability and entropy instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.integrations.liger.head import operands
from fastrl.ops import linear_logprob


class FusedOutputLinear(torch.nn.Linear):
    """A bias-free head that answers `{"logprobs": [b, s], "entropy": [b, s]}`, in place of prime-rl's of this name.

    Assign it to `prime_rl.trainer.models.layers.lm_head.FusedOutputLinear` before `inject_prime_lm_head`. Entropy has
    a gradient here, and rows of label -100 are ignored.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int | None = None) -> None:
        """Rows are worked on `chunk_size` at a time; None fits a memory budget."""
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """[b, s, h] hidden states, [b, s] integer labels that are shifted already, [b, s] temperatures.

        Returns:
            logprobs and entropy [b, s] float32, nats; differentiable by hidden_states and the weight.
        """
        assert labels is not None, "FusedOutputLinear requires labels for chunked logprob computation"
        assert temperature is not None, "FusedOutputLinear requires per-token temperatures"
        head = operands(hidden_states, self.weight, None)
        stats = linear_logprob(
            head.hidden,
            head.weight,
            labels.flatten().to(torch.int64),
            temperature=temperature.flatten().float(),
            chunk_rows=self.chunk_size,
        )
        return {"logprobs": stats.logprob.reshape(labels.shape), "entropy": stats.entropy.reshape(labels.shape)}
