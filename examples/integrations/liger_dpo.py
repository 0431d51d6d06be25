"""DPO with Liger's class name and no Liger: a preference learned by a head alone.

python examples/integrations/liger_dpo.py
"""

from __future__ import annotations

import torch

from fastrl.integrations.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import ...


def main() -> tuple[float, float]:
    """Twenty steps; returns the first and the last loss."""
    torch.manual_seed(0)
    hidden, ref_weight = torch.randn(8, 12, 16), torch.randn(64, 16) * 0.1  # 4 chosen, then 4 rejected sequences
    target = torch.randint(0, 64, (8, 12))
    target[:, :3] = -100
    weight = torch.nn.Parameter(ref_weight.clone())
    optimizer, loss_of = torch.optim.Adam([weight], lr=1e-2), LigerFusedLinearDPOLoss(beta=0.1)
    values = []
    for _ in range(20):
        loss, metrics = loss_of(weight, hidden, target, ref_input=hidden, ref_weight=ref_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    chosen, rejected = metrics[5].mean().item(), metrics[6].mean().item()
    print(
        f"loss {values[0]:.4f} -> {values[-1]:.4f}, reward of the chosen {chosen:+.3f}, of the rejected {rejected:+.3f}"
    )
    return values[0], values[-1]


if __name__ == "__main__":
    main()
