"""One round of experience: sample groups of completions, judge them, replace groups without signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.dynamic_sampling import Rounds, after_round, groups_with_signal, missing
from fastrl.losses.overlong import soft_overlong
from fastrl.rewards.gates import Gate
from fastrl.rewards.protocol import Reward
from fastrl.rewards.score import RewardError, Scores, score
from fastrl.rewards.workers import RewardWorkers
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.episodes import Episode
from fastrl.rollout.seeds import request_seed
from fastrl.train.config import OverlongBlock
from fastrl.train.distributed import rank
from fastrl.train.environments import Player, opened, record_of
from fastrl.train.exchange import of_all_ranks
from fastrl.train.order import row_at
from fastrl.train.prompts import Prompt, columns_of
from fastrl.train.shares import places_of_ranks
from fastrl.types import Rollout


@dataclass(frozen=True, slots=True)
class Sampler:
    """What turns prompts into judged completions.

    Attributes:
        engine: samples.
        decode: token ids -> text, special tokens left out.
        rewards: judge the text.
        sampling: how to draw.
        num_generations: completions per prompt.
        seed: of the run; with a prompt's ordinal and the sample's number it fixes a completion.
        overlong: soft punishment added to the reward; a buffer of 0 adds none.
        workers: processes that judge; None judges in this one.
        gates: which rewards count only where another one holds.
        player: plays episodes with tools; None samples one completion per prompt.
    """

    engine: Engine
    decode: Callable[[Sequence[int]], str]
    rewards: Sequence[Reward]
    sampling: Sampling
    num_generations: int
    seed: int
    overlong: OverlongBlock
    workers: RewardWorkers | None = None
    gates: tuple[Gate, ...] = ()
    player: Player | None = None


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a reward function may know of the run, under TRL's names: a curriculum reads `global_step`."""

    global_step: int
    max_steps: int
    epoch: float


@dataclass(frozen=True, slots=True)
class Experience:
    """Judged completions, group by group.

    Attributes:
        prompts: [S] the prompt of each completion.
        rollouts: [S] as the engine made them.
        completions: [S] text, or one assistant message, as the reward functions saw it.
        group: [S] int64; completions of one prompt share a number.
        reward: [S] f32, the weighted sum and the overlong punishment; NaN where there is no verdict or the engine
            failed: such a completion is no part of its group.
        scores: what each reward said, their failures and their metrics; `total` is `reward`, with None for NaN.
        seconds: what sampling and judging took, `{"rollout": ..., "reward": ...}`.
        n_drawn: groups sampled to get these; more than there are here when groups without signal were replaced.
        episodes: [S] turn by turn, when there are tools; else [].
    """

    prompts: list[Prompt]
    rollouts: list[Rollout]
    completions: list[Any]
    group: Tensor
    reward: Tensor
    scores: Scores
    seconds: dict[str, float]
    n_drawn: int
    episodes: list[Episode] = field(default_factory=list)


def collect(
    sampler: Sampler, prompts: Sequence[Prompt], ordinals: Sequence[int], *, state: TrainerState | None = None
) -> Experience:
    """Sample a group of completions per prompt and judge them.

    Args:
        prompts: one per ordinal.
        ordinals: place of each prompt in the run, counted over all epochs; also the group's number.
        state: handed to reward functions that ask for `trainer_state`.

    Returns:
        All groups, in order, on every rank; each rank samples and judges its share of them.
    """
    own = places_of_ranks(len(prompts))[rank()]
    part = _own_part(sampler, [prompts[i] for i in own], [ordinals[i] for i in own], state)
    return of_all_ranks(part, sampler.rewards, prompts, ordinals, num_generations=sampler.num_generations)


def _own_part(
    sampler: Sampler, prompts: Sequence[Prompt], ordinals: Sequence[int], state: TrainerState | None
) -> Experience:
    """The groups of this rank; arguments as `collect`."""
    size = sampler.num_generations
    repeated = [prompt for prompt in prompts for _ in range(size)]
    seeds = [request_seed(sampler.seed, ordinal, sample) for ordinal in ordinals for sample in range(size)]
    started = perf_counter()
    episodes: list[Episode] = []
    if sampler.player is None:
        rollouts = sampler.engine.generate([prompt.ids for prompt in repeated], sampler.sampling, seeds=seeds)
        completions = _completions(sampler, repeated, rollouts)
    else:
        episodes = sampler.player.play(sampler.engine, repeated, seeds, sampler.sampling)
        rollouts = [episode.rollout for episode in episodes]
        completions = [episode.messages for episode in episodes]
        repeated = [
            replace(prompt, prompt=opened(prompt, episode)) for prompt, episode in zip(repeated, episodes, strict=True)
        ]
    sampled = perf_counter()
    group = [ordinal for ordinal in ordinals for _ in range(size)]
    return _scored(sampler, repeated, rollouts, completions, episodes, group, state, seconds=sampled - started)


def judged_experience(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    group: Sequence[int],
    *,
    state: TrainerState | None = None,
) -> Experience:
    """Judge completions that were sampled earlier, one by one or before a resumed run was stopped.

    Args:
        prompts, rollouts, group: [S] the prompt of each completion, the completion, and the ordinal of its prompt.
        state: see `collect`.
    """
    return _scored(sampler, list(prompts), list(rollouts), _completions(sampler, prompts, rollouts), [], group, state)


def _scored(
    sampler: Sampler,
    prompts: list[Prompt],
    rollouts: list[Rollout],
    completions: list[Any],
    episodes: list[Episode],
    group: Sequence[int],
    state: TrainerState | None,
    *,
    seconds: float = 0.0,
) -> Experience:
    """What was sampled in some seconds, judged; `group` [S]."""
    started = perf_counter()
    scores = _with_punishment(sampler, rollouts, _judged(sampler, prompts, rollouts, completions, episodes, state))
    return Experience(
        prompts=prompts,
        rollouts=rollouts,
        completions=completions,
        group=torch.tensor(group, dtype=torch.int64),
        reward=torch.tensor([torch.nan if total is None else total for total in scores.total], dtype=torch.float32),
        scores=scores,
        seconds={"rollout": seconds, "reward": perf_counter() - started},
        n_drawn=len(set(group)),
        episodes=episodes,
    )


def collect_round(
    sampler: Sampler,
    pool: Sequence[Prompt],
    *,
    first_ordinal: int,
    groups: int,
    max_rounds: int,
    state: TrainerState | None = None,
) -> tuple[Experience, int]:
    """Collect the groups of one round; with `max_rounds`, groups without signal are replaced by further prompts.

    Args:
        pool: the prompts of the run, visited in an order fixed by the seed.
        first_ordinal: prompts drawn so far in the run.
        groups: wanted.
        state: see `collect`.
        max_rounds: extra rounds of sampling; afterwards a batch with fewer groups is taken as it is.

    Returns:
        The experience, and the ordinal the next round starts from.
    """
    ordinal = first_ordinal
    rounds = Rounds(wanted=groups, max_rounds=max_rounds)
    found: list[Experience] = []
    while True:
        ordinals = range(ordinal, ordinal + (groups if not found else missing(rounds)))
        ordinal = ordinals.stop
        prompts = [pool[row_at(i, n=len(pool), seed=sampler.seed)] for i in ordinals]
        experience = collect(sampler, prompts, ordinals, state=state)
        if max_rounds == 0:
            return experience, ordinal
        is_kept = groups_with_signal(experience.reward, experience.group)
        with_signal = len(experience.group[is_kept].unique())
        rounds = after_round(rounds, drawn=len(ordinals), with_signal=with_signal)
        found.append(selected(experience, is_kept))
        if missing(rounds) == 0:
            return joined(found), ordinal


def reward_columns(experience: Experience) -> Tensor:
    """[S, R] f32 what each reward counts for each completion, after the gates; NaN where it did not judge.

    A completion without a verdict (a reward failed on it, or the engine did) is NaN in every column.
    """
    columns = [[torch.nan if value is None else value for value in column] for column in experience.scores.counted]
    found = torch.tensor(columns, dtype=torch.float32).T
    return torch.where(experience.reward.isfinite()[:, None], found, torch.nan)


def sampled_reward(experience: Experience) -> Tensor:
    """[<= S] f32 the rewards of completions that the engine finished: what it lost says nothing of the rewards.

    What an environment ended is here, without a verdict: one that ends every episode is to be mended as a reward is.
    """
    is_whole = [rollout.finish_reason != "error" for rollout in experience.rollouts]
    if experience.episodes:
        is_whole = [one or episode.error != "" for one, episode in zip(is_whole, experience.episodes, strict=True)]
    return experience.reward[torch.tensor(is_whole, dtype=torch.bool)]


def _completions(sampler: Sampler, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Any]:
    """Each completion as text, or as one assistant message, like its prompt."""
    # Completions repeat as a policy grows sure of them, and a tokenizer takes longer than a dictionary.
    text = {ids: sampler.decode(ids) for ids in {rollout.completion_ids for rollout in rollouts}}
    return [
        _completion(prompt, text[rollout.completion_ids]) for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def _completion(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


def _judged(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    completions: Sequence[Any],
    episodes: Sequence[Episode],
    state: TrainerState | None,
) -> Scores:
    """The scores of a batch; rollouts that the engine failed on are shown to no reward and have no value."""
    is_whole = [rollout.finish_reason != "error" for rollout in rollouts]
    whole = list(compress(prompts, is_whole))
    scores = score(
        sampler.rewards,
        [prompt.prompt for prompt in whole],
        list(compress(completions, is_whole)),
        [rollout.completion_ids for rollout in compress(rollouts, is_whole)],
        columns_of(whole),
        environments=[record_of(each) for each in compress(episodes, is_whole)] if sampler.player else None,
        trainer_state=state,
        workers=sampler.workers,
        gates=sampler.gates,
    )
    return replace(
        scores,
        values=tuple(_spread(values, is_whole) for values in scores.values),
        total=_spread(scores.total, is_whole),
        extra={name: _spread(column, is_whole) for name, column in scores.extra.items()},
        counted=tuple(_spread(values, is_whole) for values in scores.counted),
    )


def _spread(values: Sequence[Any], is_whole: Sequence[bool]) -> tuple[Any, ...]:
    """One value per rollout, None for those that were not judged."""
    remaining = iter(values)
    return tuple(next(remaining) if is_one else None for is_one in is_whole)


def _with_punishment(sampler: Sampler, rollouts: Sequence[Rollout], scores: Scores) -> Scores:
    """The scores with DAPO's soft overlong punishment in every total that there is."""
    if sampler.overlong.buffer == 0:
        return scores
    punishment = soft_overlong(
        torch.tensor([len(rollout.completion_ids) for rollout in rollouts]),
        limit=sampler.sampling.max_completion_length,
        buffer=sampler.overlong.buffer,
        penalty=sampler.overlong.penalty,
    ).tolist()
    total = [None if value is None else value + less for value, less in zip(scores.total, punishment, strict=True)]
    return replace(scores, total=tuple(total))


def selected(experience: Experience, is_kept: Tensor) -> Experience:
    kept, scores = is_kept.tolist(), experience.scores
    return replace(
        experience,
        prompts=list(compress(experience.prompts, kept)),
        rollouts=list(compress(experience.rollouts, kept)),
        completions=list(compress(experience.completions, kept)),
        group=experience.group[is_kept],
        reward=experience.reward[is_kept],
        episodes=list(compress(experience.episodes, kept)),
        scores=replace(
            scores,
            values=tuple(tuple(compress(values, kept)) for values in scores.values),
            total=tuple(compress(scores.total, kept)),
            extra={name: list(compress(column, kept)) for name, column in scores.extra.items()},
            counted=tuple(tuple(compress(values, kept)) for values in scores.counted),
        ),
    )


def joined(parts: Sequence[Experience]) -> Experience:
    """One experience of several rounds of one step."""
    return Experience(
        prompts=[prompt for part in parts for prompt in part.prompts],
        rollouts=[rollout for part in parts for rollout in part.rollouts],
        completions=[completion for part in parts for completion in part.completions],
        group=torch.cat([part.group for part in parts]),
        reward=torch.cat([part.reward for part in parts]),
        scores=_joined_scores(parts),
        seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        n_drawn=sum(part.n_drawn for part in parts),
        episodes=[episode for part in parts for episode in part.episodes],
    )


def _joined_scores(parts: Sequence[Experience]) -> Scores:
    """Values of what was kept; metrics and failures of everything sampled, weighed by groups drawn."""
    all_scores = [part.scores for part in parts]
    names = dict.fromkeys(name for scores in all_scores for name in scores.metrics)
    extras = dict.fromkeys(name for scores in all_scores for name in scores.extra)
    errors: dict[str, RewardError] = {}
    for name, error in (item for scores in all_scores for item in scores.errors.items()):
        earlier = errors.get(name)
        errors[name] = error if earlier is None else RewardError(earlier.count + error.count, earlier.first)
    return Scores(
        values=_end_to_end([scores.values for scores in all_scores]),
        total=tuple(total for scores in all_scores for total in scores.total),
        errors=errors,
        metrics={name: _drawn_mean(name, parts) for name in names},
        extra={
            name: [value for part in parts for value in part.scores.extra.get(name, [None] * len(part.scores.total))]
            for name in extras
        },
        counted=_end_to_end([scores.counted for scores in all_scores]),
    )


def _end_to_end(parts: Sequence[tuple[tuple[float | None, ...], ...]]) -> tuple[tuple[float | None, ...], ...]:
    """[R][S] of several rounds, one after another."""
    return tuple(tuple(value for values in column for value in values) for column in zip(*parts, strict=True))


def _drawn_mean(name: str, parts: Sequence[Experience]) -> float:
    having = [part for part in parts if name in part.scores.metrics]
    return sum(part.scores.metrics[name] * part.n_drawn for part in having) / sum(part.n_drawn for part in having)
