"""The gate before training: a verifier must refuse solutions that say nothing, and accept each row's own answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from fastrl.rewards.exact_match import exact_match, gold_text
from fastrl.rewards.math_reward import math_gold, math_reward
from fastrl.rewards.numeric import numeric
from fastrl.rewards.protocol import Reward, RewardFunction, unwrapped
from fastrl.rewards.score import score
from fastrl.rewards.workers import RewardWorkers

NULL_SOLUTIONS = ("", "I do not know.", "<think>", "<think></think>", "<answer></answer>", "\\boxed{}", "#### ")
MOST_LISTED = 20


def check_verifiers(rewards: Sequence[Reward], columns: Mapping[str, Sequence[object]]) -> None:
    """Score null solutions and reference solutions of every row with each reward that has references.

    Those are `numeric`, `exact_match` and `math_reward`, whose gold answers are solutions.

    Args:
        rewards: those of the run.
        columns: the whole dataset, name -> values.

    Raises:
        ValueError: a null solution does not score 0, or a reference does not score 1; lists the rows.

    Cost: eight calls a row: a second for 10,000 rows of numbers, minutes for as many formulas.
    """
    for reward in rewards:
        function = unwrapped(reward.function)
        for verifier, reference in _REFERENCES:
            if function is verifier:
                _check(reward, columns["answer"], reference)


def _check(reward: Reward, golds: Sequence[object], reference: Callable[[object], str]) -> None:
    offenders: list[tuple[int, str]] = []
    solutions = [[null] * len(golds) for null in NULL_SOLUTIONS] + [[reference(gold) for gold in golds]]
    with RewardWorkers() as workers:
        for texts in solutions:
            is_reference = texts is solutions[-1]
            prompts, ids, columns = [""] * len(golds), [[0]] * len(golds), {"answer": golds}
            found = score([Reward(reward.function, name=reward.name)], prompts, texts, ids, columns, workers=workers)
            kind = "its reference solution" if is_reference else f"the empty solution {texts[0]!r}"
            offenders += [
                (row, f"row {row}: {kind} scores {'nothing: a failure' if value is None else value}")
                for row, value in enumerate(found.values[0], 1)
                if value != float(is_reference)
            ]
    if offenders:
        listed = "\n".join(sentence for _, sentence in sorted(offenders)[:MOST_LISTED])
        raise ValueError(
            f"reward {reward.name!r} is no verifier for {len({row for row, _ in offenders})} of {len(golds)} rows: an "
            f"empty solution must score 0 and the reference 1. Remove these rows, or use another reward:\n{listed}"
        )


def _math_reference(gold: object) -> str:
    return str(gold) if isinstance(math_gold(gold), Fraction) else f"\\boxed{{{math_gold(gold)}}}"


_REFERENCES: tuple[tuple[RewardFunction, Callable[[object], str]], ...] = (
    (numeric, str),
    (exact_match, gold_text),
    (math_reward, _math_reference),
)
