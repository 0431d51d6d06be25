"""Liger's names over fastrl's losses: the same arguments, defaults, returns and gradients.

    from fastrl.integrations.liger import LigerFusedLinearGRPOLoss     # instead of liger_kernel.chunked_loss

Liger itself need not be installed.
"""

from fastrl.integrations.liger.cross_entropy import CrossEntropyOutput as CrossEntropyOutput
from fastrl.integrations.liger.cross_entropy import LigerFusedLinearCrossEntropyLoss as LigerFusedLinearCrossEntropyLoss
from fastrl.integrations.liger.grpo import LigerFusedLinearGRPOLoss as LigerFusedLinearGRPOLoss
from fastrl.integrations.liger.grpo_logits import fused_selective_log_softmax as fused_selective_log_softmax
from fastrl.integrations.liger.grpo_logits import triton_grpo_loss as triton_grpo_loss
from fastrl.integrations.liger.jsd import LigerFusedLinearJSDLoss as LigerFusedLinearJSDLoss
from fastrl.integrations.liger.kto import LigerFusedLinearKTOLoss as LigerFusedLinearKTOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearCPOLoss as LigerFusedLinearCPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearDPOLoss as LigerFusedLinearDPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearORPOLoss as LigerFusedLinearORPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearSimPOLoss as LigerFusedLinearSimPOLoss
from fastrl.integrations.liger.scaled_cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction as LigerFusedLinearScaledCrossEntropyFunction,
)
