"""PPO's critic and rewards again, from the papers, in plain Python: no code shared with fastrl, explicit loops."""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[float, float]


def value_squared(v: float, target: float) -> Pair:
    return 0.5 * (v - target) ** 2, v - target


def value_clipped(v: float, old: float, target: float, clip: float) -> Pair:
    """As cases: where the clipped value is worse it decides, and it moves with v only inside the band."""
    held = min(max(v, old - clip), old + clip)
    if 0.5 * (held - target) ** 2 <= 0.5 * (v - target) ** 2:
        return 0.5 * (v - target) ** 2, v - target
    return 0.5 * (held - target) ** 2, (v - target if held == v else 0.0)


def gae(reward: Sequence[float], value: Sequence[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of one completion that ends after its last token."""
    advantage = [0.0] * len(reward)
    following = 0.0
    for t in reversed(range(len(reward))):
        after = value[t + 1] if t + 1 < len(reward) else 0.0
        following = reward[t] + gamma * after - value[t] + gamma * lam * following
        advantage[t] = following
    return advantage, [a + v for a, v in zip(advantage, value, strict=True)]
