"""The record that a configuration describes: presets, parity modes, each override, and what has no place."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, get_args, get_type_hints

import pytest

from fastrl.algorithms import PolicyGradient, parity, presets
from fastrl.train.algorithm import algorithm_from
from fastrl.train.config import GRPOConfig, RolloutBlock, SamplerCorrectionBlock

PRESETS = {
    "grpo": presets.grpo(),
    "dr_grpo": presets.dr_grpo(length=32),
    "dapo": presets.dapo(),
    "rloo": presets.rloo(),
    "reinforce_pp": presets.reinforce_pp(),
    "gspo": presets.gspo(),
    "cispo": presets.cispo(),
    "sapo": presets.sapo(),
}
PARITY = {
    "trl": parity.trl(),
    "verl": parity.verl(),
    "openrlhf": parity.openrlhf(),
    "open_instruct": parity.open_instruct(),
}


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig(model_name_or_path="", output_dir="", train_dataset="", max_completion_length=32, **changes)


def record(**changes: Any) -> str:
    return repr(algorithm_from(config(**changes)))


def choices(**changes: Any) -> dict[str, str]:
    """Choice -> what the record prints for it, on one line."""
    fields = re.split(r"\n    (?=\w)", record(**changes).removesuffix("\n)"))[1:]
    pairs = (field.split("=", 1) for field in fields)
    return {name: "".join(text.split()).removesuffix(",").replace(",)", ")").replace(",", ", ") for name, text in pairs}


def test_every_name_of_the_configuration_is_tested_here() -> None:
    hints = get_type_hints(GRPOConfig)
    assert set(get_args(hints["algorithm"])) == PRESETS.keys()
    assert {name for part in get_args(hints["parity"]) for name in get_args(part)} == PARITY.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_overrides_is_the_preset(name: str) -> None:
    assert record(algorithm=name) == repr(PRESETS[name])


@pytest.mark.parametrize("name", PARITY)
def test_a_parity_mode_without_overrides_is_the_other_systems_constants(name: str) -> None:
    assert record(parity=name) == repr(PARITY[name])


def test_the_default_prints_every_choice_with_its_numbers() -> None:
    assert record().splitlines() == [
        "PolicyGradient(",
        "    advantage=group_normalized(ddof=1, eps=0.0001),",
        "    surrogate=clipped(low=0.2, high=0.2, dual_clip=None, delta=None),",
        "    weighting=sequence_mean,",
        "    ratio=token_ratio(limit=None),",
        "    kl=None,",
        "    correction=None,",
        "    trust_region=None,",
        "    entropy_coef=0.0,",
        "    entropy_quantile=1.0,",
        "    whiten=False,",
        "    gamma=1.0,",
        ")",
    ]


@pytest.mark.parametrize(
    ("name", "expected", "changes"),
    [
        ("surrogate", "clipped(low=0.1, high=0.1, dual_clip=None, delta=None)", {"epsilon": 0.1}),
        ("surrogate", "clipped(low=0.2, high=0.3, dual_clip=None, delta=None)", {"epsilon_high": 0.3}),
        (
            "surrogate",
            "clipped(low=0.1, high=0.3, dual_clip=None, delta=2.0)",
            {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0},
        ),
        ("surrogate", "clipped(low=0.2, high=0.28, dual_clip=None, delta=4.0)", {"algorithm": "dapo", "delta": 4.0}),
        ("surrogate", "clipped(low=0.2, high=0.4, dual_clip=3.0, delta=None)", {"parity": "verl", "epsilon_high": 0.4}),
        ("surrogate", "cispo(high=3.0)", {"algorithm": "cispo", "epsilon_high": 3.0}),
        ("weighting", "token_mean", {"loss_type": "dapo"}),
        ("weighting", "token_mean", {"loss_type": "bnpo"}),
        ("weighting", "sequence_mean", {"loss_type": "grpo", "algorithm": "dapo"}),
        ("weighting", "fixed_length(length=32)", {"loss_type": "dr_grpo"}),
        ("advantage", "group_normalized(ddof=1, eps=0.0001)", {"scale_rewards": "group", "algorithm": "rloo"}),
        ("advantage", "batch_normalized(ddof=1, eps=0.0001)", {"scale_rewards": "batch"}),
        ("advantage", "group_centered", {"scale_rewards": "none"}),
        ("ratio", "sequence_ratio", {"importance_sampling_level": "sequence"}),
        ("ratio", "token_ratio(limit=None)", {"importance_sampling_level": "token", "algorithm": "gspo"}),
        ("kl", "KL(estimator=k3(limit=None), coef=0.04, placement='loss', gradient=None)", {"beta": 0.04}),
        ("kl", "KL(estimator=k2, coef=0.04, placement='loss', gradient=None)", {"beta": 0.04, "kl_estimator": "k2"}),
        (
            "kl",
            "KL(estimator=k3(limit=None), coef=0.04, placement='reward', gradient=None)",
            {"beta": 0.04, "kl_placement": "reward"},
        ),
        (
            "kl",
            "KL(estimator=k1, coef=0.5, placement='reward', gradient=None)",
            {"algorithm": "reinforce_pp", "beta": 0.5},
        ),
        (
            "kl",
            "KL(estimator=k3(limit=40.0), coef=0.2, placement='loss', gradient=None)",
            {"parity": "open_instruct", "beta": 0.2},
        ),
        ("kl", "None", {"algorithm": "reinforce_pp", "beta": 0.0}),
        ("entropy_coef", "0.01", {"entropy_coef": 0.01}),
        ("entropy_quantile", "0.2", {"top_entropy_quantile": 0.2}),
        ("correction", "truncate(high=3.0)", {"sampler_correction": SamplerCorrectionBlock(mode="truncate")}),
        (
            "correction",
            "mask(low=0.25, high=2.0)",
            {"sampler_correction": SamplerCorrectionBlock(mode="mask", low=0.25, high=2.0)},
        ),
        (
            "correction",
            "sequence_mask(high=1.5)",
            {"parity": "trl", "sampler_correction": SamplerCorrectionBlock(mode="sequence_mask", high=1.5)},
        ),
        ("correction", "None", {"parity": "trl", "sampler_correction": SamplerCorrectionBlock(mode="none")}),
        ("correction", "truncate(high=3.0)", {"rollout": RolloutBlock(max_staleness=1)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_override_changes_its_own_choice_and_no_other(name: str, expected: str, changes: dict[str, Any]) -> None:
    start = choices(**{key: changes[key] for key in ("algorithm", "parity") if key in changes})
    assert choices(**changes) == {**start, name: expected}
    assert start[name] != expected


@pytest.mark.parametrize("algorithm", ["rloo", "sapo", "cispo"])
@pytest.mark.parametrize("numbers", [{"epsilon": 0.1}, {"delta": 2.0}, {"epsilon": 0.1, "epsilon_high": 0.3}], ids=str)
def test_a_clip_range_is_refused_where_no_ratio_is_clipped(algorithm: str, numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"algorithm '{algorithm}' has none"):
        algorithm_from(config(algorithm=algorithm, **numbers))


@pytest.mark.parametrize("changes", [{"kl_estimator": "k1"}, {"kl_placement": "reward"}], ids=str)
def test_a_kl_is_not_described_where_there_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="beta is 0; set beta"):
        algorithm_from(config(**changes))


def test_the_result_is_a_record_whose_functions_can_be_called() -> None:
    found = algorithm_from(config(loss_type="dr_grpo"))
    assert isinstance(found, PolicyGradient)
    assert isinstance(found.weighting, partial)


def test_stale_rounds_keep_a_presets_own_correction_and_one_that_was_asked_for() -> None:
    block = RolloutBlock(max_staleness=1)
    assert choices(parity="trl", rollout=block)["correction"] == "sequence_mask(high=3.0)"
    assert choices(rollout=block, sampler_correction=SamplerCorrectionBlock(mode="none"))["correction"] == "None"
    asked = SamplerCorrectionBlock(mode="mask", low=0.25, high=2.0)
    assert choices(rollout=block, sampler_correction=asked)["correction"] == "mask(low=0.25, high=2.0)"
