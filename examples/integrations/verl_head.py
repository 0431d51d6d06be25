"""verl's fused head and prime-rl's per-token temperature on a few tokens: the numbers of the logits, without them.

python examples/integrations/verl_head.py
"""

from __future__ import annotations

import torch

from fastrl.integrations.prime_rl import FusedOutputLinear
from fastrl.integrations.verl import linear_cross_entropy


def main() -> float:
    """Print both; returns the largest difference to plain logits."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, 6, 16), torch.randint(0, 50, (1, 6))
    head = FusedOutputLinear(16, 50)
    logp = (hidden @ head.weight.T / 0.8).log_softmax(-1)
    expected = logp.gather(-1, labels[..., None])[0, :, 0]
    logprobs, entropy = linear_cross_entropy(hidden, head.weight, labels, 0.8, "none", None)
    out = head(hidden, labels, temperature=torch.full((1, 6), 0.8))
    print("verl     logprobs", logprobs.tolist())
    print("prime-rl logprobs", out["logprobs"][0].tolist())
    print("entropy", entropy.tolist())
    return max((x - expected).abs().max().item() for x in (logprobs, out["logprobs"][0]))


if __name__ == "__main__":
    print(f"largest difference {main():.1e}")
