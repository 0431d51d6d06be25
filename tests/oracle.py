"""The formulas again, from the papers, in plain NumPy float64: no code shared with fastrl, no tensors, explicit loops.

Surrogates and KL return (value, derivative) of one token. `x` is a log-ratio, `a` an advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[float, float]


def clipped(x: float, a: float, low: float, high: float, dual: float = math.inf, delta: float = math.inf) -> Pair:
    """PPO eq. 7 as cases: which term is smaller, and whether that term moves with r."""
    r = math.exp(x)
    first, first_slope = (r * a, r * a) if r < delta else (delta * a, 0.0)
    inside = 1 - low <= r <= 1 + high
    edge = 1 + high if r > 1 + high else 1 - low
    second, second_slope = (r * a, r * a) if inside else (edge * a, 0.0)
    value, slope = (-first, -first_slope) if first <= second else (-second, -second_slope)
    if a < 0 and value > -dual * a:
        return -dual * a, 0.0
    return value, slope


def cispo(x: float, a: float, high: float) -> Pair:
    weight = min(math.exp(x), high)
    return -weight * a * x, -weight * a


def reinforce(x: float, a: float) -> Pair:
    return -a * x, -a


def sapo(x: float, a: float, positive: float = 1.0, negative: float = 1.05) -> Pair:
    tau, r = (positive if a > 0 else negative), math.exp(x)
    gate = 1 / (1 + math.exp(-tau * (r - 1)))
    return -4 / tau * gate * a, -4 * gate * (1 - gate) * r * a


def vespo(x: float, a: float) -> Pair:
    k, c = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    w = math.exp(x)
    phi = w**k * math.exp(c * (1 - w))
    return -phi * a * x, -phi * a


def k1(l: float, ref: float) -> Pair:  # noqa: E741
    return l - ref, 1.0


def k2(l: float, ref: float) -> Pair:  # noqa: E741
    return 0.5 * (l - ref) ** 2, l - ref


def k3(l: float, ref: float) -> Pair:  # noqa: E741
    q = math.exp(ref - l)  # q / p
    return q - math.log(q) - 1, 1 - q


def inside_tv(l: float, old: float, a: float, low: float, high: float) -> float:  # noqa: E741
    moved = math.exp(l) - math.exp(old)
    return float(moved <= high) if a > 0 else float(moved >= -low)


def inside_kl(l: float, old: float, a: float, low: float, high: float) -> float:  # noqa: E741
    p, q = math.exp(l), math.exp(old)
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    if a > 0:
        return float(not (kl > high and p > q))
    return float(not (kl > low and p < q))


def _judged(reward: Array) -> list[int]:
    return [s for s in range(len(reward)) if not math.isnan(reward[s])]


def _members(group: Sequence[int], s: int, among: list[int]) -> list[int]:
    return [other for other in among if group[other] == group[s]]


def group_normalized(reward: Array, group: Sequence[int], ddof: int = 1, eps: float = 1e-4) -> Array:
    out = np.zeros(len(reward))
    for s in _judged(reward):
        r = reward[_members(group, s, _judged(reward))]
        if len(set(r)) > 1:
            out[s] = (reward[s] - r.mean()) / (r.std(ddof=ddof) + eps)
    return out


def group_centered(reward: Array, group: Sequence[int]) -> Array:
    out = np.zeros(len(reward))
    for s in _judged(reward):
        r = reward[_members(group, s, _judged(reward))]
        out[s] = 0.0 if len(set(r)) == 1 else reward[s] - r.mean()
    return out


def leave_one_out(reward: Array, group: Sequence[int]) -> Array:
    out = np.zeros(len(reward))
    for s in _judged(reward):
        others = [o for o in _members(group, s, _judged(reward)) if o != s]
        if others and any(reward[o] != reward[s] for o in others):
            out[s] = reward[s] - reward[others].mean()
    return out


def batch_normalized(reward: Array, group: Sequence[int], eps: float = 1e-4) -> Array:
    return np.asarray(group_centered(reward, group) / (reward[_judged(reward)].std(ddof=1) + eps))


def raw(reward: Array, group: Sequence[int]) -> Array:
    return np.nan_to_num(reward, nan=0.0)


def gpg(reward: Array, group: Sequence[int]) -> Array:
    """B / (B - M) with M the rollouts of groups that are all right or all wrong."""
    judged = _judged(reward)
    without = sum(1 for s in judged if len(set(reward[_members(group, s, judged)])) == 1)
    return np.asarray(group_centered(reward, group) * len(judged) / (len(judged) - without))


def multi_objective(reward: Array, group: Sequence[int], weights: Sequence[float]) -> Array:
    columns = [group_normalized(reward[:, n], group) for n in range(reward.shape[1])]
    total = sum(w * column for w, column in zip(weights, columns, strict=True))
    judged = [s for s in range(len(reward)) if not np.isnan(reward[s]).all()]
    out = np.zeros(len(reward))
    values = np.asarray(total)[judged]
    out[judged] = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    return out


def whiten(a: Array, trained: NDArray[np.bool_]) -> Array:
    kept = a[trained]
    return np.where(trained, (a - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0.0)


def return_to_go(score: float, kl: Array, trained: NDArray[np.bool_], coef: float, gamma: float = 1.0) -> Array:
    """One sequence: rewards of the trained tokens, summed backwards."""
    places = np.flatnonzero(trained)
    out = np.zeros(len(kl))
    for i, t in enumerate(places):
        for steps, u in enumerate(places[i:]):
            out[t] += gamma**steps * (-coef * kl[u] + (score if u == places[-1] else 0.0))
    return out


def weights(rule: str, n: Sequence[int], group: Sequence[int], constant: int = 1) -> list[float]:
    """The weight of each trained token of each sequence; sequences of length 0 are not there."""
    present = [s for s in range(len(n)) if n[s] > 0]
    prompts = {group[s] for s in present}
    table: dict[str, Callable[[int], float]] = {
        "token_mean": lambda s: 1 / sum(n),
        "sequence_mean": lambda s: 1 / (len(present) * n[s]),
        "sequence_sum": lambda s: 1 / len(present),
        "fixed_length": lambda s: 1 / (len(present) * constant),
        "prompt_mean": lambda s: 1 / (len(prompts) * sum(n[o] for o in present if group[o] == group[s])),
    }
    return [table[rule](s) if n[s] > 0 else 0.0 for s in range(len(n))]


@dataclass(frozen=True)
class Sequence1:
    """One sequence of a step: [n] columns of its positions."""

    logprob: Array
    old: Array
    sampler: Array
    ref: Array
    entropy: Array
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Spec:
    """An algorithm as the oracle sees it."""

    advantage: Callable[[Array, Sequence[int]], Array]
    surrogate: Callable[[float, float], Pair]
    rule: str
    constant: int = 1
    level: str = "token"  # the ratio: "token", "mean" or "sum" over the sequence
    limit: float = math.inf
    kl: Callable[[float, float], Pair] | None = None
    kl_coef: float = 0.0
    in_reward: bool = False
    whiten: bool = False
    correction: str = "none"  # "truncate" or "sequence_mask"
    cap: float = math.inf
    inside: Callable[[float, float, float], float] | None = None
    entropy_coef: float = 0.0


def token_advantages(spec: Spec, step: list[Sequence1], reward: Array, group: Sequence[int]) -> list[Array]:
    """[n] per sequence. The KL of the reward is measured under the old policy."""
    score = spec.advantage(reward, group)
    out = []
    for s, sequence in enumerate(step):
        spread = np.where(sequence.trained, score[s], 0.0)
        if spec.in_reward:
            assert spec.kl is not None
            kl = np.array([spec.kl(a, b)[0] for a, b in zip(sequence.old, sequence.ref, strict=True)])
            spread = return_to_go(score[s], kl, sequence.trained, spec.kl_coef)
        out.append(spread)
    if spec.whiten:
        flat = whiten(np.concatenate(out), np.concatenate([q.trained for q in step]))
        out = np.split(flat, np.cumsum([len(q.old) for q in step])[:-1])
    return out


def step_loss(
    spec: Spec, step: list[Sequence1], reward: Array, group: Sequence[int]
) -> tuple[float, list[Array], list[Array]]:
    """The loss of a whole optimizer step, and its derivatives by every log-probability and every entropy."""
    w = weights(spec.rule, [int(q.trained.sum()) for q in step], group, spec.constant)
    loss, by_logprob, by_entropy = 0.0, [], []
    for s, (q, advantage) in enumerate(zip(step, token_advantages(spec, step, reward, group), strict=True)):
        d_logprob, d_entropy = np.zeros(len(q.old)), np.zeros(len(q.old))
        x = q.logprob - q.old
        if spec.level != "token":
            reduce = np.mean if spec.level == "mean" else np.sum
            x = np.full(len(x), reduce(x[q.trained]) if q.trained.any() else 0.0)
        gap = q.old - q.sampler
        whole = math.exp(gap[q.trained].sum())
        for t in np.flatnonzero(q.trained):
            held = min(max(x[t], -spec.limit), spec.limit)
            value, slope = spec.surrogate(held, advantage[t])
            slope = slope if held == x[t] else 0.0
            factor = 1.0
            if spec.correction == "truncate":
                factor = min(math.exp(gap[t]), spec.cap)
            if spec.correction == "sequence_mask":
                factor = whole if whole <= spec.cap else 0.0
            if spec.inside is not None:
                factor *= spec.inside(q.logprob[t], q.old[t], advantage[t])
            value, slope = value * factor, slope * factor
            if spec.kl is not None and not spec.in_reward:
                kl, kl_slope = spec.kl(q.logprob[t], q.ref[t])
                value, slope = value + spec.kl_coef * kl, slope + spec.kl_coef * kl_slope
            loss += w[s] * (value - spec.entropy_coef * q.entropy[t])
            d_logprob[t] = w[s] * slope
            d_entropy[t] = -w[s] * spec.entropy_coef
        by_logprob.append(d_logprob)
        by_entropy.append(d_entropy)
    return loss, by_logprob, by_entropy
