"""Writes `vectors/losses.npz`: values and gradients of TRL's and Liger's losses on tensors that it stores beside them.

    make parity-vectors PEERS=path/to/python        an environment with fastrl, trl==1.16.0 and liger-kernel==0.8.5

TRL's losses are methods of its trainers: they are called on a stand-in for the trainer and for the model, whose
log-probabilities are the stored ones. TRL computes in float64, except ORPO; Liger in float32, as it casts.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
from liger_kernel import chunked_loss as liger
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.parity import loss_cases as cases
from tests.parity.setting import VECTORS

P, L, D, E, V = 6, 7, 8, 5, 19  # pairs, completion tokens at most, widths of student and teacher, vocabulary
Results = dict[str, Any]


def main() -> None:
    """Draw the tensors, ask TRL and Liger, and store everything."""
    torch.set_num_threads(1)
    given = inputs()
    stored: Results = {f"given/{name}": value.numpy() for name, value in given.items()}
    trl = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    for part in (trl_pairs, trl_singles, trl_rewards, trl_heads):
        stored |= part(trl)
    for part in (liger_pairs, liger_singles, liger_heads, liger_policy):
        stored |= part(given)
    packages = ("trl", "liger-kernel", "transformers", "torch")
    stored["made_by"] = np.array(" ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    np.savez_compressed(VECTORS / "losses.npz", **stored)


def inputs() -> dict[str, Tensor]:
    """Float32 tensors; sequences 0 .. P - 1 are the chosen ones, P .. 2P - 1 the rejected, padded with -100."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    length = torch.randint(1, L + 1, (2 * P,), generator=generator)
    mask = torch.arange(L) < length[:, None]
    logprob = -normal(2 * P, L).exp() * mask
    target = torch.randint(0, V, (2 * P, L), generator=generator).masked_fill(~mask, -100)
    return {
        "mask": mask,
        "logprob": logprob,
        "ref_logprob": (logprob + 2 * normal(2 * P, L)).clamp(max=-1e-3) * mask,
        "label": torch.arange(2 * P) % 3 != 1,
        "kl_logprob": -normal(2 * P).exp() - 3,
        "ref_kl_logprob": -normal(2 * P).exp() - 4,
        "score": normal(2 * P) * 2,
        "margin": normal(P).abs(),
        "hidden": normal(2 * P, L, D),
        "weight": normal(V, D),
        "ref_hidden": normal(2 * P, L, D),
        "ref_weight": normal(V, D),
        "target": target,
        "teacher_hidden": normal(2 * P, L, E),
        "teacher_weight": normal(V, E),
        "advantage": normal(2 * P),
        "old_logprob": (logprob + 0.3 * normal(2 * P, L)) * mask,
    }


def record(name: str, loss: Callable[..., Tensor], *leaves: Tensor) -> Results:
    """The value of a loss and its gradients with respect to copies of some tensors."""
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(*copies)
    gradients = torch.autograd.grad(value, copies)
    found = {f"{name}/grad{i}": gradient.detach().numpy() for i, gradient in enumerate(gradients)}
    return found | {f"{name}/loss": value.detach().numpy()}


def trainer(**fields: Any) -> Any:
    """What the loss methods read of `self`."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "beta": cases.BETA,
        "label_smoothing": 0.0,
    }
    return SimpleNamespace(**(common | fields))


def model_of(logprob: Tensor) -> Any:
    """A model that gives every sequence, after one prompt token, these log-probabilities."""
    zeros = torch.zeros_like(logprob)
    return lambda **_: SimpleNamespace(log_probs=logprob, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def batch_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    completion = torch.cat([torch.zeros(2 * P, 1, dtype=torch.long), given["mask"].long()], dim=1)
    return {"input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
            "completion_mask": completion}  # fmt: skip


def trl_pairs(given: dict[str, Tensor]) -> Results:
    """DPO's family, CPO's, ORPO."""
    found: Results = {}
    ref_chosen, ref_rejected = given["ref_logprob"].sum(1).chunk(2)
    batch = batch_of(given) | {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    for name, numbers in cases.DPO.items():
        me = trainer(
            loss_types=[name],
            loss_weights=[1.0],
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            label_smoothing=numbers.get("label_smoothing", 0.0),
            args=SimpleNamespace(discopop_tau=numbers.get("discopop_tau")),
        )

        def dpo(logprob: Tensor, me: Any = me) -> Tensor:
            return DPOTrainer._compute_loss(me, model_of(logprob), dict(batch), return_outputs=False)

        found |= record(f"trl/dpo/{name}", dpo, given["logprob"])
    for name, numbers in cases.CPO.items():
        me = trainer(alpha=0.0, loss_type=name, **({"simpo_gamma": 0.0} | numbers))

        def cpo(logprob: Tensor, me: Any = me, is_mean: bool = name in ("ipo", "simpo")) -> Tensor:
            score = logprob.sum(1) / (given["mask"].sum(1) if is_mean else 1)
            return CPOTrainer.cpo_loss(me, *score.chunk(2))[0].mean()

        found |= record(f"trl/cpo/{name}", cpo, given["logprob"])

    def orpo(logprob: Tensor) -> Tensor:
        score = logprob.sum(1) / given["mask"].sum(1)
        return -ORPOTrainer.odds_ratio_loss(trainer(), *score.chunk(2))[0].mean()

    return found | record("trl/orpo", orpo, given["logprob"])


def trl_singles(given: dict[str, Tensor]) -> Results:
    found: Results = {}
    batch = batch_of(given) | {"label": given["label"], "ref_logps": given["ref_logprob"].sum(1)}
    batch["ref_KL_logps"] = given["ref_kl_logprob"]
    for name, numbers in cases.KTO.items():
        me = trainer(
            loss_type=name,
            calculate_KL=name == "kto",
            _compute_kl_logps=lambda model, batch: given["kl_logprob"],
            **numbers,
        )

        def kto(logprob: Tensor, me: Any = me) -> Tensor:
            return KTOTrainer._compute_loss(me, model_of(logprob), dict(batch), return_outputs=False)

        found |= record(f"trl/kto/{name}", kto, given["logprob"])
    return found


def trl_rewards(given: dict[str, Tensor]) -> Results:
    found: Results = {}
    for name, case in cases.REWARD.items():
        me = trainer(args=SimpleNamespace(center_rewards_coefficient=case["center"]))
        batch = batch_of(given) | ({"margin": given["margin"]} if case["margin"] else {})

        def reward(score: Tensor, me: Any = me, batch: Any = batch) -> Tensor:
            return RewardTrainer.compute_loss(me, lambda **_: SimpleNamespace(logits=score[:, None]), dict(batch))

        found |= record(f"trl/reward/{name}", reward, given["score"])
    return found


def trl_heads(given: dict[str, Tensor]) -> Results:
    """GKD's divergence, and transformers' label smoothing, which SFTTrainer uses."""
    found: Results = {}
    teacher = given["teacher_hidden"] @ given["teacher_weight"].T
    for name, (beta, temperature) in cases.DIVERGENCE.items():

        def gkd(hidden: Tensor, weight: Tensor, beta: float = beta, temperature: float = temperature) -> Tensor:
            return GKDTrainer.generalized_jsd_loss(
                hidden @ weight.T, teacher, labels=given["target"], beta=beta, temperature=temperature
            )

        found |= record(f"trl/gkd/{name}", gkd, given["hidden"], given["weight"])

    def smoothed(hidden: Tensor, weight: Tensor) -> Tensor:
        return LabelSmoother(epsilon=cases.SMOOTHING)({"logits": hidden @ weight.T}, given["target"].clone())

    return found | record("trl/smoothed", smoothed, given["hidden"], given["weight"])


def liger_pairs(given: dict[str, Tensor]) -> Results:
    found: Results = {}
    hidden, weight, target = given["hidden"], given["weight"], given["target"]
    for name, numbers in cases.DPO.items():
        if name in cases.LIGER_LACKS:
            continue
        dpo = liger.LigerFusedLinearDPOLoss(beta=cases.BETA, loss_type=name, compiled=False, **numbers)

        def with_reference(h: Tensor, w: Tensor, dpo: Any = dpo) -> Tensor:
            return dpo(w, h, target, None, given["ref_hidden"], given["ref_weight"])[0]

        found |= record(f"liger/dpo/{name}", with_reference, hidden, weight)
    alone = {
        "cpo": liger.LigerFusedLinearCPOLoss(beta=cases.BETA, alpha=0.7, label_smoothing=0.1, compiled=False),
        "simpo": liger.LigerFusedLinearSimPOLoss(
            beta=cases.BETA, gamma=0.6, label_smoothing=0.1, compute_nll_loss=False, compiled=False
        ),
        "orpo": liger.LigerFusedLinearORPOLoss(beta=cases.BETA, compiled=False),
    }
    for name, loss in alone.items():
        found |= record(f"liger/{name}", lambda h, w, loss=loss: loss(w, h, target)[0], hidden, weight)
    return found


def liger_singles(given: dict[str, Tensor]) -> Results:
    kto = liger.LigerFusedLinearKTOLoss(beta=cases.BETA, use_ref_model=True, compiled=False)
    kl = (given["kl_logprob"] - given["ref_kl_logprob"]).mean().clamp(min=0)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        reference = {"ref_input": given["ref_hidden"], "ref_weight": given["ref_weight"]}
        return kto(h, w, given["target"], preference_labels=given["label"], kl=kl, **reference)[0]

    return record("liger/kto", loss, given["hidden"], given["weight"])


def liger_heads(given: dict[str, Tensor]) -> Results:
    found: Results = {}
    target, rows = given["target"].flatten(), given["hidden"].flatten(0, 1)
    teacher = (given["teacher_hidden"].flatten(0, 1), given["teacher_weight"])
    for name, (beta, temperature) in cases.DIVERGENCE.items():
        hard = cases.HARD_SHARE if temperature == 1 else 0.0
        jsd = liger.LigerFusedLinearJSDLoss(
            weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=beta, temperature=temperature, compiled=False
        )
        found |= record(f"liger/jsd/{name}", lambda h, w, jsd=jsd: jsd(h, w, *teacher, target), rows, given["weight"])
    return found


def liger_policy(given: dict[str, Tensor]) -> Results:
    """PPO's clipped surrogate as GRPO has it, with a KL term; two others without."""
    numbers, mask = cases.POLICY, given["mask"].float()
    found: Results = {}
    for name, loss_type in zip(cases.POLICY_LOSSES, ("bnpo", "sapo", "cispo"), strict=True):
        is_clipped = name == "clipped"

        def loss(logprob: Tensor, loss_type: str = loss_type, is_clipped: bool = is_clipped) -> Tensor:
            return LigerFusedLinearGRPOFunction.ppo_loss_fn(
                logprob,
                mask,
                given["advantage"],
                mask,
                ref_per_token_logps=given["ref_logprob"],
                old_per_token_logps=given["old_logprob"],
                epsilon_low=numbers["low"],
                epsilon_high=numbers["cap" if loss_type == "cispo" else "high"],
                delta=numbers["delta"] if is_clipped else None,
                beta=numbers["kl"] if is_clipped else 0.0,
                loss_type=loss_type,
            )[0]

        found |= record(f"liger/policy/{name}", loss, given["logprob"])
    return found


if __name__ == "__main__":
    main()
