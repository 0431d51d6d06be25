"""Every preset and parity mode beside what the oracle should make of it: the numbers are written out again here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastrl.algorithms import PolicyGradient, parity, presets
from fastrl.losses import kl
from tests import oracle
from tests.oracle import Spec

PPO = partial(oracle.clipped, low=0.2, high=0.2)
NORMALIZED, CENTERED = oracle.group_normalized, oracle.group_centered

NAMED: dict[str, tuple[PolicyGradient, Spec]] = {
    "grpo": (presets.grpo(), Spec(NORMALIZED, PPO, "sequence_mean")),
    "grpo_with_kl": (
        presets.grpo(beta=0.04),
        Spec(NORMALIZED, PPO, "sequence_mean", kl=oracle.k3, kl_coef=0.04),
    ),
    "dr_grpo": (presets.dr_grpo(length=9), Spec(CENTERED, PPO, "fixed_length", constant=9)),
    "dapo": (presets.dapo(), Spec(NORMALIZED, partial(oracle.clipped, low=0.2, high=0.28), "token_mean")),
    "rloo": (presets.rloo(), Spec(oracle.leave_one_out, oracle.reinforce, "sequence_sum")),
    "rloo_with_kl": (
        presets.rloo(beta=0.05),
        Spec(oracle.leave_one_out, oracle.reinforce, "sequence_sum", kl=oracle.k1, kl_coef=0.05, in_reward=True),
    ),
    "reinforce_pp": (
        presets.reinforce_pp(),
        Spec(oracle.raw, PPO, "token_mean", kl=oracle.k1, kl_coef=0.01, in_reward=True, whiten=True),
    ),
    "gspo": (
        presets.gspo(),
        Spec(NORMALIZED, partial(oracle.clipped, low=3e-4, high=4e-4), "sequence_mean", level="mean"),
    ),
    "gspo_wide": (
        presets.gspo(low=0.1, high=0.1),
        Spec(NORMALIZED, partial(oracle.clipped, low=0.1, high=0.1), "sequence_mean", level="mean"),
    ),
    "cispo": (presets.cispo(), Spec(NORMALIZED, partial(oracle.cispo, high=5.0), "token_mean")),
    "sapo": (presets.sapo(), Spec(NORMALIZED, oracle.sapo, "sequence_mean")),
    "ppo": (
        presets.ppo(),
        Spec(oracle.raw, PPO, "token_mean", kl=oracle.k1, kl_coef=0.05, in_reward=True, whiten=True),
    ),
    "gpg": (presets.gpg(), Spec(oracle.gpg, oracle.reinforce, "token_mean")),
    "luspo": (
        presets.luspo(),
        Spec(NORMALIZED, partial(oracle.clipped, low=2e-3, high=2.5e-3), "sequence_sum", level="mean"),
    ),
    "vespo": (presets.vespo(), Spec(NORMALIZED, oracle.vespo, "token_mean", level="sum")),
    "dppo": (
        presets.dppo(low=0.02, high=0.02),
        Spec(
            CENTERED,
            partial(oracle.cispo, high=20.0),
            "token_mean",
            inside=partial(oracle.inside_tv, low=0.02, high=0.02),
        ),
    ),
    "trl": (parity.trl(), Spec(NORMALIZED, PPO, "token_mean", correction="sequence_mask", cap=3.0)),
    "verl": (
        parity.verl(),
        Spec(
            partial(NORMALIZED, eps=1e-6),
            partial(oracle.clipped, low=0.2, high=0.2, dual=3.0),
            "token_mean",
            limit=20.0,
        ),
    ),
    "openrlhf": (
        parity.openrlhf(),
        Spec(partial(NORMALIZED, eps=1e-9), PPO, "token_mean", limit=20.0, kl=oracle.k1, kl_coef=0.01, in_reward=True),
    ),
    "open_instruct": (
        parity.open_instruct(),
        Spec(
            CENTERED,
            partial(oracle.clipped, low=0.2, high=0.272),
            "token_mean",
            kl=oracle.k3,
            kl_coef=0.05,
            correction="truncate",
            cap=2.0,
        ),
    ),
    "everything": (
        replace(parity.trl(), kl=kl.KL(kl.k3, 0.1), entropy_coef=0.03, ratio=presets.gspo().ratio),
        Spec(
            NORMALIZED,
            PPO,
            "token_mean",
            level="mean",
            kl=oracle.k3,
            kl_coef=0.1,
            correction="sequence_mask",
            cap=3.0,
            entropy_coef=0.03,
        ),
    ),
}
