"""What ranks sampled and judged, each its share of the prompts, put together: every rank then has the whole round.

Completions are small beside what it takes to make them, so all ranks get all of them, and compute advantages, weights
and metrics alike. A message is JSON with one column of float64 behind it: tokens and their log-probabilities.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fastrl.rewards.join import joined_scores
from fastrl.rewards.protocol import Reward
from fastrl.rewards.score import RewardError, Scores
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.episodes import Episode
from fastrl.train.distributed import gather_bytes, rank, size
from fastrl.train.shares import places_of_ranks
from fastrl.types import Rollout

if TYPE_CHECKING:
    from fastrl.train.collect import Experience
    from fastrl.train.prompts import Prompt

Item = TypeVar("Item")


def generated_on_ranks(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
) -> list[Rollout]:
    """Sample one completion per prompt, each on the rank whose turn it is; all ranks get all, in order."""
    places = places_of_ranks(len(prompts))
    own = places[rank()]
    rollouts = engine.generate([prompts[i] for i in own], sampling, seeds=[seeds[i] for i in own]) if own else []
    if size() == 1:
        return rollouts
    told = gather_bytes(written(rollouts, {}), "the completions of the others", lane="sampling")
    return in_order([read(data)[0] for data in told], places)


def of_all_ranks(
    part: Experience,
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    ordinals: Sequence[int],
    *,
    num_generations: int,
) -> Experience:
    """The experience of every rank, put together from their shares.

    Args:
        part: of this rank: the groups of its places in `places_of_ranks(len(prompts))`.
        rewards: that judged it.
        prompts: of all ranks, one per group.
        ordinals: of their groups.
        num_generations: completions of a group.

    Returns:
        What one process would have collected: `seconds` are those of the slowest rank, and a metric that a reward
        function logged itself is the mean of the ranks' values, each counting as often as the rank has completions.
    """
    if size() == 1:
        return part
    record = {
        "completions": part.completions,
        "prompts": [prompt.prompt for prompt in part.prompts],
        "scores": asdict(part.scores),
        "seconds": part.seconds,
        "episodes": [_without_rollout(episode) for episode in part.episodes],
    }
    told = gather_bytes(written(part.rollouts, record), "the completions of the others", lane="sampling")
    parts = [read(data) for data in told]
    records = [each for _, each in parts]
    places = [
        [group * num_generations + sample for group in groups for sample in range(num_generations)]
        for groups in places_of_ranks(len(prompts))
    ]
    rollouts = in_order([each for each, _ in parts], places)
    scores = joined_scores(
        rewards,
        [scores_of(each["scores"]) for each in records],
        places,
        lengths=[len(rollout.completion_ids) for rollout in rollouts],
        is_whole=[rollout.finish_reason != "error" for rollout in rollouts],
    )
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    shown = in_order([each["prompts"] for each in records], places)  # an environment may have added to a prompt
    return replace(
        part,
        prompts=[replace(prompt, prompt=text) for prompt, text in zip(repeated, shown, strict=True)],
        rollouts=rollouts,
        completions=in_order([each["completions"] for each in records], places),
        group=torch.tensor(ordinals, dtype=torch.int64).repeat_interleave(num_generations),
        reward=torch.tensor([torch.nan if total is None else total for total in scores.total], dtype=torch.float32),
        scores=scores,
        seconds={name: max(each["seconds"][name] for each in records) for name in part.seconds},
        n_drawn=len(prompts),
        episodes=_episodes_of([each["episodes"] for each in records], places, rollouts),
    )


def in_order(parts: Sequence[Sequence[Item]], places: Sequence[Sequence[int]]) -> list[Item]:
    """Items of several parts in one list, each at its place."""
    pairs = (zip(its, part, strict=True) for part, its in zip(parts, places, strict=True))
    found = {place: item for each in pairs for place, item in each}
    return [found[place] for place in range(len(found))]


def written(rollouts: Sequence[Rollout], record: Mapping[str, Any]) -> bytes:
    """Rollouts and what else there is to tell: the length of the JSON, the JSON, and the columns as float64.

    Every column of a rollout fits: token ids and versions are below 2^53.
    """
    columns: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    scalars: list[dict[str, Any]] = []
    for rollout in rollouts:
        known: dict[str, Any] = {}
        for field in fields(Rollout):
            value = getattr(rollout, field.name)
            if isinstance(value, tuple):
                columns.append(np.array(value, dtype=np.float64))
                value = len(value)
            known[field.name] = value
        scalars.append(known)
    head = json.dumps({"rollouts": scalars, "record": record}, default=str).encode()
    return struct.pack("<q", len(head)) + head + (np.concatenate(columns).tobytes() if columns else b"")


def read(data: bytes) -> tuple[list[Rollout], dict[str, Any]]:
    """What `written` was given; lists in the record, where there were tuples."""
    (n_head,) = struct.unpack_from("<q", data)
    head = json.loads(data[8 : 8 + n_head])
    numbers = np.frombuffer(data, dtype=np.uint8, offset=8 + n_head).view(np.float64)
    kinds = {field.name: _number_in(str(field.type)) for field in fields(Rollout)}
    rollouts, start = [], 0
    for known in head["rollouts"]:
        for name, kind in kinds.items():
            if kind is not None and known[name] is not None:
                stop = start + known[name]
                known[name] = tuple(numbers[start:stop].astype(kind).tolist())
                start = stop
        rollouts.append(Rollout(**known))
    return rollouts, head["record"]


def scores_of(record: Mapping[str, Any]) -> Scores:
    """Scores from their JSON."""
    return Scores(
        values=tuple(tuple(column) for column in record["values"]),
        total=tuple(record["total"]),
        errors={name: RewardError(**error) for name, error in record["errors"].items()},
        metrics=record["metrics"],
        extra=record["extra"],
        counted=tuple(tuple(column) for column in record["counted"]),
    )


def _without_rollout(episode: Episode) -> dict[str, Any]:
    return {field.name: getattr(episode, field.name) for field in fields(Episode) if field.name != "rollout"}


def _episodes_of(
    records: Sequence[Sequence[dict[str, Any]]], places: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
) -> list[Episode]:
    """Episodes from their JSON and their rollouts; none of a run without tools."""
    if not any(records):
        return []
    is_tuple = {field.name: str(field.type).startswith("tuple[") for field in fields(Episode)}
    told: list[dict[str, Any]] = [
        {name: tuple(value) if is_tuple[name] else value for name, value in each.items()}
        for each in in_order(records, places)
    ]
    return [Episode(rollout=rollout, **each) for each, rollout in zip(told, rollouts, strict=True)]


def _number_in(annotation: str) -> type | None:
    """The type inside `tuple[int, ...]`; None of what is no tuple."""
    kinds: dict[str, type] = {"tuple[int": int, "tuple[float": float, "tuple[bool": bool}
    return kinds.get(annotation.partition(",")[0])
