from __future__ import annotations

import pytest

from fastrl.algorithms import AdaptiveKL, adapted, exceeds_target_kl

STATE = AdaptiveKL(coef=0.1, target=2.0, horizon=1000)


def test_on_target_the_coefficient_stays() -> None:
    assert adapted(STATE, 2.0, samples=64) == STATE


@pytest.mark.parametrize(("kl", "factor"), [(2.2, 1.01), (100.0, 1.02), (1.9, 0.995), (0.0, 0.98), (-1.0, 0.98)])
def test_the_coefficient_moves_by_the_clipped_error_per_sample(kl: float, factor: float) -> None:
    assert adapted(STATE, kl, samples=100).coef == pytest.approx(0.1 * factor)


def test_the_controller_is_never_changed_in_place() -> None:
    adapted(STATE, 100.0, samples=100)
    assert STATE.coef == 0.1


@pytest.mark.parametrize("arguments", [{"target": 0.0}, {"target": -1.0}, {"horizon": 0}])
def test_a_controller_that_cannot_steer_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="adaptive KL"):
        AdaptiveKL(**{"coef": 0.1, "target": 1.0, "horizon": 10, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "target", "stops"), [(0.2, 0.1, True), (0.1, 0.1, False), (9.0, None, False), (float("nan"), 0.1, True)]
)
def test_remaining_updates_stop_above_the_target(kl: float, target: float | None, stops: bool) -> None:
    assert exceeds_target_kl(kl, target) is stops
