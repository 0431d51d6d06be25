from __future__ import annotations

from functools import partial

from fastrl.algorithms import describe, parity, presets
from fastrl.losses import clipped, group_normalized


def test_a_partial_application_reads_as_the_call_with_every_number() -> None:
    shown = describe(partial(partial(clipped, low=0.1), high=0.28))
    assert shown == "clipped(low=0.1, high=0.28, dual_clip=None, delta=None)"


def test_a_function_without_options_is_its_name() -> None:
    assert describe(presets.dapo().weighting) == "token_mean"


def test_a_required_option_that_is_missing_is_visible() -> None:
    assert describe(presets.fixed_length) == "fixed_length(length=?)"


def test_functions_inside_options_are_unwrapped_too() -> None:
    clamped = parity.openrlhf().advantage
    assert describe(clamped) == "clamped(advantage=group_normalized(ddof=1, eps=1e-09), limit=10.0)"


def test_a_record_prints_every_choice() -> None:
    assert repr(parity.open_instruct()) == (
        "PolicyGradient(\n"
        "    advantage=group_centered,\n"
        "    surrogate=clipped(low=0.2, high=0.272, dual_clip=None, delta=None),\n"
        "    weighting=token_mean,\n"
        "    ratio=token_ratio(limit=None),\n"
        "    kl=KL(\n"
        "        estimator=k3(limit=40.0),\n"
        "        coef=0.05,\n"
        "        placement='loss',\n"
        "        gradient=None,\n"
        "    ),\n"
        "    correction=truncate(high=2.0),\n"
        "    trust_region=None,\n"
        "    entropy_coef=0.0,\n"
        "    entropy_quantile=1.0,\n"
        "    whiten=False,\n"
        "    gamma=1.0,\n"
        ")"
    )


def test_equal_choices_made_apart_print_alike() -> None:
    assert describe(partial(group_normalized, eps=1e-4)) == describe(group_normalized)
