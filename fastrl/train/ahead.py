"""Rounds of experience, sampled in step with training or ahead of it.

    depth 0:  sample 0 | learn 0 | sample 1 | learn 1 | ...                    one straight line, strictly on policy
    depth 1:  sample 0 | sample 1 | sample 2 | ...
                       | learn 0  | learn 1  | ...                             round r + 1 is sampled while r is learned

With depth k, round r is sampled by the weights after round r - k - 1, whichever of the two is faster: what a round
holds depends on the seed alone. Weights, rewards' weights and what rewards are told of the run are those of the moment
the round was asked for. One thread samples and judges, one round after another; an engine that computes in this very
process would gain nothing from it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.train.collect import Experience, Sampler, TrainerState, collect_round, judged_experience
from fastrl.train.config import OnPolicyConfig
from fastrl.train.order import row_at
from fastrl.train.policy_setup import sampler_at
from fastrl.train.prompts import Prompt
from fastrl.train.rollout_tensors import rollouts_as_tensors, rollouts_from_tensors
from fastrl.train.snapshot import Progress
from fastrl.train.staleness import staleness_metrics


@dataclass(frozen=True, slots=True)
class Source:
    """What rounds are drawn from.

    Attributes:
        config: `reward_schedule` and the seed are read.
        policy: the model that is trained.
        sampler: engine, rewards and sampling parameters.
        prompts: the pool.
        groups: prompts of one round.
        max_rounds: of dynamic sampling; 0 is none.
        updates: optimizer steps of one round at most.
        total_steps: optimizer steps of the run.
    """

    config: OnPolicyConfig
    policy: PreTrainedModel
    sampler: Sampler
    prompts: Sequence[Prompt]
    groups: int
    max_rounds: int
    updates: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A round that is sampled and judged.

    Attributes:
        ordinal: prompts drawn in the run up to its end.
        waited: seconds that the sampling thread had nothing to do before it.
    """

    experience: Experience
    ordinal: int
    waited: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """A round that was asked for.

    Attributes:
        progress: of the moment it was; its step is the version of the weights.
    """

    progress: Progress
    drawn: Future[_Drawn]


class Rounds:
    """Owner of the sampling thread and of the rounds it is ahead of the trainer.

    Args:
        source: what rounds are drawn from.
        depth: most versions of the weights between those that sample a round and those that learn from it first.
    """

    def __init__(self, source: Source, *, depth: int) -> None:
        self._source, self._depth = source, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastrl-rounds") if depth else None
        self._queue: deque[_Asked] = deque()
        self._cursor = 0
        self._dropped = 0
        self._idle_since: float | None = None
        self._taken_at: float | None = None

    def take(self, progress: Progress) -> tuple[Experience, int]:
        """The next round to learn from, and the number of prompts drawn up to its end.

        What failed while it was sampled or judged is raised here. Its `seconds` are what the trainer spent on it.

        Args:
            progress: before the round; its step is the version of the policy's weights.
        """
        if self._thread is None:
            return self._straight(progress)
        if any(asked.progress.rollbacks != progress.rollbacks for asked in self._queue):
            self._forget()
        if not self._queue:
            self._cursor = progress.ordinal
            self._ask(progress)
        started = perf_counter()
        drawn = self._queue[0].drawn.result()
        waited = perf_counter() - started
        self._queue.popleft()
        ready = sum(asked.drawn.done() for asked in self._queue)
        while len(self._queue) < self._depth and self._is_needed(progress):
            self._ask(progress)
        now = perf_counter()
        metrics = staleness_metrics(drawn.experience.rollouts, version=progress.step) | {
            "async/queue_depth": float(ready),
            "async/sampler_wait_seconds": drawn.waited,
            "async/dropped_completions": float(self._dropped),
        }
        metrics |= {f"async/{name}_seconds": seconds for name, seconds in drawn.experience.seconds.items()}
        if self._taken_at is not None:
            metrics["async/trainer_wait_share"] = waited / (now - self._taken_at)
        self._taken_at = now
        seconds = {"wait": waited, "sync": now - started - waited}
        return with_metrics(replace(drawn.experience, seconds=seconds), metrics), drawn.ordinal

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sampled or judged inside the block: the engine and the rewards are the caller's."""
        wait([asked.drawn for asked in self._queue])
        yield

    def state_dict(self) -> dict[str, Tensor]:
        """The rounds that are ahead, waited for: a resumed run judges them again and learns from the very same tokens.

        Episodes with tools are not kept: a resumed run plays them again, with the weights of the checkpoint.
        """
        kept = [] if self._source.sampler.player is not None else list(self._queue)
        state = {"rounds": torch.tensor(len(kept))}
        for place, asked in enumerate(kept):
            drawn, progress = asked.drawn.result(), asked.progress
            facts = [progress.step, progress.rollbacks, progress.ordinal, drawn.ordinal, drawn.experience.n_drawn]
            columns = {"facts": torch.tensor(facts), "group": drawn.experience.group}
            columns |= rollouts_as_tensors(drawn.experience.rollouts)
            state |= {f"{place}.{name}": column for name, column in columns.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the rounds of `state_dict` in the place of those that are ahead."""
        self._forget()
        for place in range(int(state["rounds"])):
            prefix = f"{place}."
            columns = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
            step, rollbacks, first, ordinal, n_drawn = columns["facts"].tolist()
            asked_at = Progress(step=step, rollbacks=rollbacks, ordinal=first)
            assert self._thread is not None
            self._queue.append(_Asked(asked_at, self._thread.submit(self._judged, asked_at, columns, ordinal, n_drawn)))
            self._cursor = ordinal

    def close(self) -> None:
        """End the thread once the round it is in has ended; what waits behind that is given up."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _straight(self, progress: Progress) -> tuple[Experience, int]:
        engine, started = self._source.sampler.engine, perf_counter()
        engine.load_weights(self._source.policy, progress.step)
        synced = perf_counter() - started
        experience, ordinal = self._collected(progress, progress.ordinal)
        engine.rest()
        return replace(experience, seconds=experience.seconds | {"sync": synced}), ordinal

    def _ask(self, progress: Progress) -> None:
        """Have a round sampled by the weights of now."""
        assert self._thread is not None
        weights = None
        if all(asked.drawn.done() for asked in self._queue):
            self._source.sampler.engine.load_weights(self._source.policy, progress.step)
        else:
            weights = copy.deepcopy(self._source.policy)  # the engine is busy, and the policy is about to change
        self._queue.append(_Asked(progress, self._thread.submit(self._draw, weights, progress)))

    def _is_needed(self, progress: Progress) -> bool:
        """Whether steps remain after the round just taken and those that are ahead."""
        return progress.step + (len(self._queue) + 1) * self._source.updates < self._source.total_steps

    def _draw(self, weights: PreTrainedModel | None, progress: Progress) -> _Drawn:
        waited = 0.0 if self._idle_since is None else perf_counter() - self._idle_since
        if weights is not None:
            self._source.sampler.engine.load_weights(weights, progress.step)
        experience, self._cursor = self._collected(progress, self._cursor)
        self._idle_since = perf_counter()
        return _Drawn(experience, self._cursor, waited)

    def _collected(self, progress: Progress, first_ordinal: int) -> tuple[Experience, int]:
        source = self._source
        return collect_round(
            sampler_at(source.sampler, source.config, progress),
            source.prompts,
            first_ordinal=first_ordinal,
            groups=source.groups,
            max_rounds=source.max_rounds,
            state=self._state(progress, first_ordinal),
        )

    def _judged(self, progress: Progress, columns: Mapping[str, Tensor], ordinal: int, n_drawn: int) -> _Drawn:
        """A round of a checkpoint."""
        sampler = sampler_at(self._source.sampler, self._source.config, progress)
        pool = self._source.prompts
        ordinals = columns["group"].tolist()
        experience = judged_experience(
            sampler,
            [pool[row_at(i, n=len(pool), seed=sampler.seed)] for i in ordinals],
            rollouts_from_tensors(columns),
            ordinals,
            state=self._state(progress, ordinals[0] if ordinals else ordinal),
        )
        return _Drawn(replace(experience, n_drawn=n_drawn), ordinal, 0.0)

    def _state(self, progress: Progress, ordinal: int) -> TrainerState:
        return TrainerState(progress.step, self._source.total_steps, ordinal / len(self._source.prompts))

    def _forget(self) -> None:
        """Drop the rounds that are ahead; none of them has taught anything."""
        wait([asked.drawn for asked in self._queue])
        whole = [asked.drawn.result() for asked in self._queue if asked.drawn.exception() is None]
        self._dropped += sum(len(drawn.experience.rollouts) for drawn in whole)
        self._queue.clear()


def with_metrics(experience: Experience, metrics: Mapping[str, float]) -> Experience:
    """The experience with further numbers to log about it."""
    return replace(experience, scores=replace(experience.scores, metrics={**experience.scores.metrics, **metrics}))
