"""Rounds of experience from a stream of segments: the newest weights are taken in while completions are being sampled.

    sampling thread:  weights? -> draw prompts -> one segment of every unfinished completion -> finished groups -> judge
    trainer:          take(): give the weights, get the finished groups of a round

Completions that do not end within a segment go on in the next one, with whatever weights are the newest then; each
token carries their version. Stragglers stay for a later round (`fastrl.train.partial` says how long). What a round
holds depends on the clock: a run in segments cannot be repeated exactly, but its checkpoint holds every unfinished
completion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Condition, Thread
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.algorithms.dynamic_sampling import groups_with_signal
from fastrl.rollout.builtin import context_length
from fastrl.rollout.seeds import request_seed
from fastrl.train.ahead import Source, with_metrics
from fastrl.train.collect import Experience, TrainerState, joined, judged_experience, selected
from fastrl.train.order import row_at
from fastrl.train.partial import Group, chosen, extended, is_feasible, most_outstanding, new_group
from fastrl.train.policy_setup import sampler_at, served_context
from fastrl.train.rollout_tensors import rollouts_as_tensors, rollouts_from_tensors
from fastrl.train.snapshot import Progress
from fastrl.train.staleness import staleness_metrics


class Stream:
    """Owner of the thread that samples in segments, of the one that judges, and of every unfinished completion.

    Args:
        source: what rounds are drawn from; no episodes with tools.
        depth: most rounds between a completion's first weights and the round that learns from it.
        segment_tokens: most tokens between two looks at the weights.
    """

    def __init__(self, source: Source, *, depth: int, segment_tokens: int) -> None:
        self._source, self._depth = source, depth
        self._sampling = replace(source.sampler.sampling, segment_tokens=segment_tokens)
        self._context = served_context(source.config, context_length(source.policy))
        self._changed = Condition()  # guards everything below
        self._groups: list[Group] = []
        self._without_signal: list[Experience] = []  # since the last round
        self._cursor = 0
        self._round = 0  # number of the next round
        self._weights_round = 0  # rounds that the newest weights have learned
        self._rounds_left = 0
        self._progress: Progress | None = None  # of the newest weights
        self._weights: PreTrainedModel | None = None  # the newest
        self._is_loaded = False  # whether the engine has them
        self._seconds = {"rollout": 0.0, "reward": 0.0, "sampler_wait": 0.0}
        self._is_paused = self._is_sampling = self._is_closed = False
        self._judging = 0
        self._dropped = 0
        self._error: BaseException | None = None
        self._taken_at: float | None = None
        self._judge = ThreadPoolExecutor(1, thread_name_prefix="fastrl-judge")
        self._thread = Thread(target=self._run, name="fastrl-stream", daemon=True)

    def take(self, progress: Progress) -> tuple[Experience, int]:
        """The next round to learn from, and the number of prompts drawn so far; as `Rounds.take`."""
        started = perf_counter()
        weights = copy.deepcopy(self._source.policy)  # the thread loads it when its segment ends
        synced = perf_counter()
        with self._changed:
            if self._progress is None:
                self._cursor = max(self._cursor, progress.ordinal)
                self._thread.start()
            elif progress.rollbacks != self._progress.rollbacks:
                self._dropped += sum(len(group.rollouts) for group in self._groups)
                self._groups, self._without_signal = [], []
            self._progress, self._weights, self._is_loaded = progress, weights, False
            self._weights_round = self._round
            self._rounds_left = -(-(self._source.total_steps - progress.step) // self._source.updates)
            self._changed.notify_all()
            ready = sum(group.experience is not None for group in self._groups)
            self._changed.wait_for(lambda: self._error is not None or self._next_round() is not None)
            if self._error is not None:
                raise self._error
            experience = self._handed_over()
            ordinal, spent = self._cursor, self._seconds
            self._seconds = dict.fromkeys(spent, 0.0)
            self._changed.notify_all()
        now = perf_counter()
        metrics = staleness_metrics(experience.rollouts, version=progress.step) | {
            "async/queue_depth": ready / self._source.groups,
            "async/dropped_completions": float(self._dropped),
        }
        metrics |= {f"async/{name}_seconds": seconds for name, seconds in spent.items()}
        if self._taken_at is not None:
            metrics["async/trainer_wait_share"] = (now - synced) / (now - self._taken_at)
        self._taken_at = now
        experience = replace(experience, seconds={"wait": now - synced, "sync": synced - started})
        return with_metrics(experience, metrics), ordinal

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sampled or judged inside the block; completions go on after it where they stopped."""
        with self._quiet():
            self._is_loaded = False  # the block may let the engine load others
            yield

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: self._error is not None or not (self._is_sampling or self._judging))
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def state_dict(self) -> dict[str, Tensor]:
        """Every outstanding group, as far as it is sampled: a resumed run loses no completion and trains none twice."""
        with self._quiet():
            state = {"cursor": torch.tensor(self._cursor), "groups": torch.tensor(len(self._groups))}
            for place, group in enumerate(self._groups):
                known = [rollout for rollout in group.rollouts if rollout is not None]
                columns = {
                    "facts": torch.tensor([group.ordinal, self._round - group.begun]),
                    "seeds": torch.tensor(group.seeds),
                    "is_begun": torch.tensor([rollout is not None for rollout in group.rollouts]),
                    "is_done": torch.tensor(group.is_done),
                }
                columns |= rollouts_as_tensors(known)
                state |= {f"{place}.{name}": column for name, column in columns.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the groups of `state_dict` in the place of those that there are; finished ones are judged again."""
        pool, seed = self._source.prompts, self._source.sampler.seed
        with self._quiet(), self._changed:
            self._cursor, self._groups = int(state["cursor"]), []
            for place in range(int(state["groups"])):
                prefix = f"{place}."
                columns = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
                ordinal, age = columns["facts"].tolist()
                prompt = pool[row_at(ordinal, n=len(pool), seed=seed)]
                group = new_group(ordinal, prompt, begun=self._round - age, seeds=columns["seeds"].tolist())
                known = iter(rollouts_from_tensors(columns))
                group.rollouts = [next(known) if is_begun else None for is_begun in columns["is_begun"].tolist()]
                group.is_done = columns["is_done"].tolist()
                self._groups.append(group)

    def close(self) -> None:
        """End the threads once the segment and the group they are at have ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._judge.shutdown(wait=True, cancel_futures=True)

    def _next_round(self) -> list[Group] | None:
        size = wanted = self._source.groups
        if self._source.max_rounds:
            # A group without signal is replaced, as often as `max_rounds` rounds would.
            wanted -= min(size, max(0, len(self._without_signal) - self._source.max_rounds * size))
        return chosen(self._groups, wanted=wanted, size=size, next_round=self._round, depth=self._depth)

    def _handed_over(self) -> Experience:
        groups = self._next_round()
        assert groups is not None
        taken = {id(group) for group in groups}
        self._groups = [group for group in self._groups if id(group) not in taken]
        self._round += 1
        parts = [group.experience for group in groups if group.experience is not None]
        parts += self._without_signal
        self._without_signal = []
        return joined(parts)

    def _run(self) -> None:
        try:
            while (work := self._next_work()) is not None:
                progress, weights, going = work
                if weights is not None:
                    self._source.sampler.engine.load_weights(weights, progress.step)
                self._sample(going)
        except BaseException as error:
            self._fail(error)

    def _next_work(self) -> tuple[Progress, PreTrainedModel | None, list[tuple[Group, int]]] | None:
        """What the next segment is: weights to load before it, and unfinished completions; None at the end."""
        with self._changed:
            started = perf_counter()
            self._changed.wait_for(lambda: self._is_closed or (not self._is_paused and self._has_work()))
            self._seconds["sampler_wait"] += perf_counter() - started
            if self._is_closed:
                return None
            progress = self._progress
            assert progress is not None
            self._is_sampling = True
            weights = None if self._is_loaded else self._weights
            self._is_loaded = True
            self._draw_prompts(progress)
            for group in self._groups:
                self._have_judged(group, progress)
            return (
                progress,
                weights,
                [(g, i) for g in self._groups for i, is_done in enumerate(g.is_done) if not is_done],
            )

    def _has_work(self) -> bool:
        """Whether a completion is unfinished, a finished group waits for its judge, or there is room for a prompt."""
        is_waiting = any(not all(group.is_done) or not group.is_judging for group in self._groups)
        return self._progress is not None and (is_waiting or self._has_room())

    def _has_room(self) -> bool:
        size = self._source.groups
        if len(self._groups) >= min(most_outstanding(size, self._depth), size * self._rounds_left):
            return False
        due = [group.begun + self._depth for group in self._groups] + [self._weights_round + self._depth]
        return is_feasible(due, next_round=self._round, size=size)

    def _draw_prompts(self, progress: Progress) -> None:
        pool, sampler = self._source.prompts, sampler_at(self._source.sampler, self._source.config, progress)
        while self._has_room():
            prompt = pool[row_at(self._cursor, n=len(pool), seed=sampler.seed)]
            seeds = [request_seed(sampler.seed, self._cursor, i) for i in range(sampler.num_generations)]
            self._groups.append(new_group(self._cursor, prompt, begun=self._weights_round, seeds=seeds))
            self._cursor += 1

    def _sample(self, going: list[tuple[Group, int]]) -> None:
        """One segment of each unfinished completion."""
        started = perf_counter()
        known = [group.rollouts[i] for group, i in going]
        segments = self._source.sampler.engine.generate(
            [group.prompt.ids for group, _ in going],
            self._sampling,
            seeds=[group.seeds[i] for group, i in going],
            prefixes=[() if rollout is None else rollout.completion_ids for rollout in known],
        )
        with self._changed:
            for (group, i), rollout, segment in zip(going, known, segments, strict=True):
                whole, is_done = extended(rollout, segment, sampling=self._sampling, context=self._context)
                group.rollouts[i], group.is_done[i] = whole, is_done
            self._seconds["rollout"] += perf_counter() - started
            self._is_sampling = False
            self._changed.notify_all()

    def _have_judged(self, group: Group, progress: Progress) -> None:
        """Give a finished group to the rewards, once."""
        if all(group.is_done) and not group.is_judging:
            group.is_judging = True
            self._judging += 1
            self._judge.submit(self._judge_group, group, progress)

    def _judge_group(self, group: Group, progress: Progress) -> None:
        source, started = self._source, perf_counter()
        try:
            experience = judged_experience(
                sampler_at(source.sampler, source.config, progress),
                [group.prompt] * len(group.rollouts),
                [rollout for rollout in group.rollouts if rollout is not None],
                [group.ordinal] * len(group.rollouts),
                state=TrainerState(progress.step, source.total_steps, group.ordinal / len(source.prompts)),
            )
        except BaseException as error:
            self._fail(error)
            return
        is_kept = groups_with_signal(experience.reward, experience.group)
        with self._changed:
            if source.max_rounds and not bool(is_kept.any()):
                self._groups = [each for each in self._groups if each is not group]
                self._without_signal.append(selected(experience, is_kept))
            group.experience = experience
            self._seconds["reward"] += perf_counter() - started
            self._judging -= 1
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Let the trainer raise what ended a thread."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
