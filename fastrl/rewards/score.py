"""Score a batch with several rewards: weighted sum, exclusions, counted errors, metrics under TRL's names.

    total[s] = sum over rewards r that judged s of weight_r counted_r[s],    counted = value, or 0 where a gate is shut

None where no reward judged s (TRL's rule), and where any reward failed on s: a failure is never a reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastrl.rewards.call import Fault, Judgement, call_rewards
from fastrl.rewards.correlation import correlation_metrics
from fastrl.rewards.gates import Gate, check_gates, gated
from fastrl.rewards.protocol import STANDARD_INPUTS, Reward
from fastrl.rewards.workers import RewardWorkers

# TRL hands these to reward functions under other names (prompts, completions, completion_ids).
_RENAMED_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True, slots=True)
class RewardError:
    """Failures of one reward in one batch.

    Attributes:
        count: items it failed on.
        first: the first failure: a traceback, or a sentence about the value it returned.
    """

    count: int
    first: str


@dataclass(frozen=True, slots=True)
class Scores:
    """A judged batch.

    Attributes:
        values: [R][S] what each reward said, unweighted; None where it did not judge or failed.
        total: [S] weighted sum; None means "leave this item out of the batch".
        errors: reward name -> its failures; rewards without a failure are absent.
        metrics: `rewards/<name>/{mean,std,error_rate}`, `reward`, `reward_std` (over the items with a total),
            `rewards/correlation/*`, and what the functions logged. Deviations are the sample's (n - 1). A statistic of
            too few values is absent.
        extra: column name -> [S] values for the completions log, from `log_extra`.
        counted: [R][S] `values` after the gates: what enters the sum.
    """

    values: tuple[tuple[float | None, ...], ...]
    total: tuple[float | None, ...]
    errors: Mapping[str, RewardError]
    metrics: Mapping[str, float]
    extra: Mapping[str, Sequence[object]]
    counted: tuple[tuple[float | None, ...], ...] = ()


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[object]],
    *,
    environments: Sequence[Mapping[str, object]] | None = None,
    trainer_state: object = None,
    workers: RewardWorkers | None = None,
    gates: Sequence[Gate] = (),
) -> Scores:
    """Judge S completions with every reward.

    Args:
        rewards: at least one; names differ.
        prompts: [S] strings or message lists, repeated within a group.
        completions: [S] strings or message lists.
        completion_ids: [S] token ids of each completion.
        columns: name -> [S] the dataset's other columns. `prompt`, `completion` and `completion_ids` are left out,
            as TRL does.
        environments: [S] records of `FinishedEnvironment`, for functions that ask for `environments`; None when
            the run has none.
        trainer_state: handed to functions that ask for it.
        workers: processes that judge; None judges everything in this one, without time limits.
        gates: which rewards count only where another one holds.

    Raises:
        ValueError: lengths differ, a column has the name of a standard input, two rewards share a name, or a gate
            names a reward that is not there.
    """
    data = {name: column for name, column in columns.items() if name not in _RENAMED_COLUMNS}
    _check(rewards, prompts, completions, completion_ids, data)
    names = [reward.name for reward in rewards]
    check_gates(gates, names)
    if not completions:
        return Scores(((),) * len(rewards), (), {}, {}, {}, ((),) * len(rewards))
    inputs = {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        **{name: list(column) for name, column in data.items()},
        **({} if environments is None else {"environments": list(environments)}),
        "trainer_state": trainer_state,
    }
    if workers is None:
        judgements = call_rewards([reward.function for reward in rewards], inputs)
    else:
        judgements = workers.judge(rewards, inputs)
    values = tuple(
        tuple(None if isinstance(value, Fault) else value for value in judgement.values) for judgement in judgements
    )
    counted = gated(values, names, gates)
    failed = [any(isinstance(judgement.values[s], Fault) for judgement in judgements) for s in range(len(completions))]
    total = tuple(
        None if failed[s] else weighted_total(rewards, [column[s] for column in counted])
        for s in range(len(completions))
    )
    lengths = [len(ids) for ids in completion_ids]
    return Scores(
        values=values,
        total=total,
        errors=_errors(rewards, judgements),
        metrics=_metrics(rewards, judgements, total)
        | correlation_metrics(dict(zip(names, values, strict=True)), total, lengths),
        extra={column: found for judgement in judgements for column, found in judgement.extra.items()},
        counted=counted,
    )


def _check(
    rewards: Sequence[Reward],
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    data: Mapping[str, Sequence[object]],
) -> None:
    names = [reward.name for reward in rewards]
    if not names:
        raise ValueError("score needs at least one reward")
    if len(set(names)) != len(names):
        raise ValueError(f"rewards need different names, got {names}; give one of them another `name`")
    size = len(completions)
    for name, column in (("prompts", prompts), ("completion_ids", completion_ids), *data.items()):
        if len(column) != size:
            raise ValueError(f"{name} must have one value per completion: {size}, got {len(column)}")
    for name in data:
        if name in STANDARD_INPUTS:
            raise ValueError(f"a data column cannot be called {name!r}: reward functions get something else under it")


def weighted_total(rewards: Sequence[Reward], item: Sequence[float | None]) -> float | None:
    """The weighted sum of one item's values; None when none judged it."""
    if all(value is None for value in item):
        return None
    return math.fsum(reward.weight * value for reward, value in zip(rewards, item, strict=True) if value is not None)


def _errors(rewards: Sequence[Reward], judgements: Sequence[Judgement]) -> dict[str, RewardError]:
    found = {}
    for reward, judgement in zip(rewards, judgements, strict=True):
        faults = [value for value in judgement.values if isinstance(value, Fault)]
        if faults:
            found[reward.name] = RewardError(len(faults), faults[0].message)
    return found


def _metrics(
    rewards: Sequence[Reward], judgements: Sequence[Judgement], total: Sequence[float | None]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for judgement in judgements:
        for name, logged in judgement.metrics.items():
            metrics[name] = math.fsum(logged) / len(logged)
    for reward, judgement in zip(rewards, judgements, strict=True):
        judged = [value for value in judgement.values if not isinstance(value, Fault)]
        faults = len(judgement.values) - len(judged)
        metrics |= mean_and_std(judged, f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std")
        metrics[f"rewards/{reward.name}/error_rate"] = faults / len(judgement.values)
    return metrics | mean_and_std(total, "reward", "reward_std")


def mean_and_std(values: Sequence[float | None], mean_name: str, std_name: str) -> dict[str, float]:
    """The mean and the sample deviation of what is not None, under these names; nothing of nothing."""
    present = [value for value in values if value is not None]
    if not present:
        return {}
    mean = math.fsum(present) / len(present)
    if len(present) == 1:
        return {mean_name: mean}
    variance = math.fsum((value - mean) ** 2 for value in present) / (len(present) - 1)
    return {mean_name: mean, std_name: math.sqrt(variance)}
