"""Which tokens keep a policy gradient when only the uncertain ones are trained."""

from __future__ import annotations

import math

from torch import Tensor


def entropy_keep(entropy: Tensor, trained: Tensor, quantile: float) -> Tensor:
    """The trained tokens whose entropy is among the highest `quantile` of the step's.

    The recipe sets the advantage of the others to 0: their KL and the normaliser stay, only the push goes.

    Args:
        entropy: [T] of the policy at each position, nats, over the whole optimizer step and all ranks; constant.
        trained: [T] bool.
        quantile: share to keep, in (0, 1]; 0.2 keeps the highest fifth. Ties with the threshold are kept.

    Returns:
        [T] bool; False where not trained.

    Raises:
        ValueError: quantile outside (0, 1].

    Source: Wang 2025, arXiv:2506.01939 ("beyond the 80/20 rule"), sec. 4; TRL `top_entropy_quantile`.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is the share of tokens to keep, in (0, 1]; got {quantile}")
    candidates = entropy[trained]
    if quantile == 1 or candidates.numel() == 0:
        return trained.clone()
    # The interpolated (1 - quantile) quantile lies between two order statistics: keeping what reaches it is keeping
    # what reaches the upper one. torch.quantile refuses more than 16M tokens. 1e-9 absorbs (1 - 0.7) 10 > 3.
    rank = math.ceil((1 - quantile) * (candidates.numel() - 1) - 1e-9)
    threshold = candidates.kthvalue(rank + 1).values
    return trained & (entropy >= threshold)
