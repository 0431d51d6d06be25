"""What a preference configuration must satisfy before torch is imported: one line each, with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import CPOConfig, DPOConfig, KTOConfig, OnlineDPOConfig, ORPOConfig, PackingBlock, RRHFConfig
from fastrl.train.validate import problems


def problems_of(config_type: type[Any], folder: Path, **changes: Any) -> list[str]:
    is_online = config_type is OnlineDPOConfig
    options: dict[str, Any] = {
        "model_name_or_path": "tiny:base",
        "train_dataset": "tiny:prompts" if is_online else "tiny:preference",
        "output_dir": str(folder / "run"),
    }
    if is_online:
        options |= {"reward_funcs": ("exact_match",)}
    return problems(config_type(**options | changes))


@pytest.mark.parametrize("config_type", [DPOConfig, CPOConfig, ORPOConfig, KTOConfig, RRHFConfig, OnlineDPOConfig])
def test_the_defaults_are_valid(config_type: type[Any], tmp_path: Path) -> None:
    assert problems_of(config_type, tmp_path) == []


VALID: list[tuple[type[Any], dict[str, Any]]] = [
    (DPOConfig, {"loss_type": ("ipo",), "length_averaged": False}),
    (DPOConfig, {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.2), "label_smoothing": 0.1}),
    (DPOConfig, {"sync_ref_model": True, "precompute_ref_log_probs": False, "ref_model_sync_steps": 64}),
    (DPOConfig, {"ref_model_name_or_path": "tiny:warm"}),
    (CPOConfig, {"loss_type": "simpo", "simpo_gamma": 1.4, "cpo_alpha": 0.0}),
    (OnlineDPOConfig, {"num_generations": 4}),
]


@pytest.mark.parametrize(("config_type", "changes"), VALID)
def test_what_has_an_effect_is_accepted(config_type: type[Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert problems_of(config_type, tmp_path, **changes) == []


WRONG: list[tuple[type[Any], dict[str, Any], str]] = [
    (DPOConfig, {"truncate": True, "max_length": None}, "truncate: has no effect without max_length"),
    (DPOConfig, {"ref_model_name_or_path": "nowhere"}, "ref_model_name_or_path: nowhere is not a directory"),
    (DPOConfig, {"beta": 0.0}, "beta: 0 leaves nothing to learn"),
    (DPOConfig, {"sync_ref_model": True}, "sync_ref_model: the reference moves"),
    (DPOConfig, {"ref_model_sync_steps": 8}, "ref_model_sync_steps: has no effect while sync_ref_model is false"),
    (DPOConfig, {"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha: has no effect while sync_ref_model is false"),
    (DPOConfig, {"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha: must be in (0, 1]"),
    (DPOConfig, {"loss_type": ()}, "loss_type: is empty"),
    (DPOConfig, {"loss_type": ("sft",)}, "loss_type: sft alone learns nothing from the rejected"),
    (DPOConfig, {"loss_weights": (1.0, 2.0)}, "loss_weights: needs one number for each of the 1 losses, got 2"),
    (DPOConfig, {"loss_type": ("hinge",), "label_smoothing": 0.1}, "label_smoothing: has no place in hinge"),
    (DPOConfig, {"loss_type": ("robust",), "label_smoothing": 0.5}, "label_smoothing: robust needs less than 0.5"),
    (DPOConfig, {"loss_type": ("exo_pair",)}, "label_smoothing: exo_pair needs one above 0"),
    (DPOConfig, {"length_averaged": False}, "length_averaged: only ipo reads it"),
    (DPOConfig, {"discopop_tau": 0.1}, "discopop_tau: only discopop reads it"),
    (DPOConfig, {"loss_weights": (0.0,)}, "loss_weights: all 0 leaves nothing to learn; set one above 0"),
    (DPOConfig, {"reference_free": True, "precompute_ref_log_probs": False}, "precompute_ref_log_probs: has no effect"),
    (KTOConfig, {"desirable_weight": 0.0, "undesirable_weight": 0.0}, "desirable_weight: 0 beside undesirable_weight"),
    (DPOConfig, {"reference_free": True, "ref_model_name_or_path": "tiny:warm"}, "reference_free: leaves no reference"),
    (DPOConfig, {"packing": PackingBlock(token_budget=2000)}, "packing.token_budget: 2000 cannot hold a pair"),
    (KTOConfig, {"per_device_train_batch_size": 1}, "per_device_train_batch_size: kto's baseline"),
    (KTOConfig, {"packing": PackingBlock(token_budget=1000)}, "packing.token_budget: 1000 cannot hold one sequence"),
    (CPOConfig, {"simpo_gamma": 1.0}, "simpo_gamma: only simpo reads it"),
    (CPOConfig, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing: has no place in ipo"),
    (CPOConfig, {"beta": 0.0}, "beta: 0 leaves nothing to learn from the rejected"),
    (ORPOConfig, {"packing": PackingBlock(token_budget=2000)}, "packing.token_budget: 2000 cannot hold a pair"),
    (OnlineDPOConfig, {"reward_funcs": ()}, "reward_funcs: is empty"),
    (OnlineDPOConfig, {"num_generations": 1}, "num_generations: a pair needs at least 2"),
    (OnlineDPOConfig, {"num_generations": 3}, "num_generations: per_device_train_batch_size x gradient_accum"),
    (OnlineDPOConfig, {"temperature": 0.0}, "temperature: 0 is greedy"),
    (OnlineDPOConfig, {"packing": PackingBlock(token_budget=300)}, "packing.token_budget: 300 cannot hold a pair"),
]


@pytest.mark.parametrize(("config_type", "changes", "sentence"), WRONG)
def test_what_cannot_work_or_has_no_effect_is_one_line(
    config_type: type[Any], changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (problem,) = problems_of(config_type, tmp_path, **changes)
    assert problem.startswith(sentence)
