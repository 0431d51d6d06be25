"""Gates: a reward counts only where another one holds, as accuracy does only in the right format.

    counted[r, s] = value[r, s] if value[condition, s] > threshold else 0

Without a gate a policy can earn accuracy in any form, or form without accuracy; with one there is a single way up.
Source: Liu 2026, arXiv:2601.05242, sec. 4 (conditioned rewards).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Values = Sequence[Sequence[float | None]]

_CONDITION = re.compile(r"\s*(?P<name>.+?)\s*(?:>\s*(?P<threshold>[-+]?\d+(?:\.\d+)?)\s*)?")


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate.

    Attributes:
        reward: name of the reward that counts only where the gate is open.
        condition: name of the reward that opens it. Its own value is read, not what a gate of its own leaves.
        threshold: the gate is open where the condition's value is greater.
    """

    reward: str
    condition: str
    threshold: float = 0.0


def gates_from(spec: Mapping[str, str]) -> tuple[Gate, ...]:
    """Gates as a configuration writes them: reward -> condition, or reward -> "condition > 0.5".

    Raises:
        ValueError: a condition is empty, or a reward is its own.
    """
    found = []
    for reward, text in spec.items():
        match = _CONDITION.fullmatch(text)
        if match is None or match["name"] == reward:
            raise ValueError(
                f"the gate of {reward!r} must name another reward, as `format` or `format > 0.5`, got {text!r}"
            )
        found.append(Gate(reward, match["name"], float(match["threshold"] or 0)))
    return tuple(found)


def check_gates(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """Refuse gates on rewards that the run does not have.

    Args:
        names: of the run's rewards.

    Raises:
        ValueError: naming the reward that is missing and those there are.
    """
    for gate in gates:
        for name in (gate.reward, gate.condition):
            if name not in names:
                raise ValueError(f"reward_gates: there is no reward {name!r}; the run has: {', '.join(names)}")


def gated(values: Values, names: Sequence[str], gates: Sequence[Gate]) -> tuple[tuple[float | None, ...], ...]:
    """[R][S] what counts: the values, with 0 where a gate is closed and None where the reward itself did not judge.

    Args:
        values: [R][S] what each reward said; None where it did not judge, which closes the gates it opens.
        names: [R] of the rewards.
        gates: several on one reward must all be open.
    """
    counted = dict(zip(names, (tuple(column) for column in values), strict=True))
    said = dict(counted)
    for gate in gates:
        counted[gate.reward] = tuple(
            value if value is None or (condition is not None and condition > gate.threshold) else 0.0
            for value, condition in zip(counted[gate.reward], said[gate.condition], strict=True)
        )
    return tuple(counted[name] for name in names)
