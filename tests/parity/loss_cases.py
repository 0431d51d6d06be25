"""The losses that TRL or Liger has too, each with one setting of its numbers, and the names of the stored results."""

from __future__ import annotations

from typing import Any

BETA = 0.5

# loss_type of TRL's DPOTrainer; Liger has all but LIGER_LACKS. Numbers under the names of DPOConfig.
DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_norm": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.4},
    "sft": {},
}
LIGER_LACKS = ("sigmoid_norm", "ipo", "sft")
# loss_type of TRL's CPOTrainer.
CPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "simpo": {"label_smoothing": 0.1, "simpo_gamma": 0.6},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.8},
    "apo_zero_unpaired": {"desirable_weight": 1.3, "undesirable_weight": 0.8},
}
REWARD: dict[str, dict[str, Any]] = {
    "plain": {"margin": False, "center": None},
    "margin": {"margin": True, "center": None},
    "centred": {"margin": True, "center": 0.05},
}
# beta and temperature of the divergence between two heads.
DIVERGENCE: dict[str, tuple[float, float]] = {
    "forward": (0.0, 1.0),
    "reverse": (1.0, 1.0),
    "jsd": (0.5, 1.0),
    "jsd_near_teacher": (0.1, 0.7),
    "jsd_near_student": (0.9, 1.6),
}
SMOOTHING = 0.1  # of the labels
HARD_SHARE = 0.3  # of the labels in Liger's distillation
POLICY = {"low": 0.2, "high": 0.28, "delta": 1.5, "kl": 0.04, "cap": 1.2}  # of clipped; of cispo
POLICY_LOSSES = ("clipped", "sapo", "cispo")
