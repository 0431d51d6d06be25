"""Groups of completions that are sampled in segments: what is unfinished, what is due, and which make the next round.

A group begun with the weights of round b is learned in round b + k at the latest. Every round takes `size` groups, so
some groups may be outstanding together when, for each round, no more are due by then than the rounds up to it take:

    for every d:  #{outstanding due by d}  <=  size (d - next + 1)

(the schedulability of unit jobs by their deadlines). A round takes finished groups, those due first in front, and
waits only when taking them would leave something due to be dropped: no completion is ever too old, so none is dropped.
To drop the long ones would teach brevity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastrl.rollout.engine import Sampling
from fastrl.train.collect import Experience
from fastrl.train.prompts import Prompt
from fastrl.types import Rollout


@dataclass(slots=True)
class Group:
    """The completions of one prompt; the stream fills them in.

    Attributes:
        ordinal: place of the prompt in the run.
        prompt: what is completed.
        begun: rounds that the weights which began it had learned.
        seeds: [G] one per completion.
        rollouts: [G] as far as they are sampled; None before the first segment.
        is_done: [G] whether each has ended.
        is_judging: whether the rewards have it.
        experience: the group judged; None before.
    """

    ordinal: int
    prompt: Prompt
    begun: int
    seeds: list[int]
    rollouts: list[Rollout | None]
    is_done: list[bool]
    is_judging: bool = False
    experience: Experience | None = None


def new_group(ordinal: int, prompt: Prompt, *, begun: int, seeds: list[int]) -> Group:
    """A group of which nothing is sampled yet."""
    return Group(ordinal, prompt, begun, seeds, [None] * len(seeds), [False] * len(seeds))


def extended(rollout: Rollout | None, segment: Rollout, *, sampling: Sampling, context: int) -> tuple[Rollout, bool]:
    """A completion with its next segment, and whether it has ended.

    Args:
        rollout: what there was; None for the first segment.
        segment: the new tokens, of one version of the weights.
        sampling: `max_completion_length` is read.
        context: most tokens the model holds, prompt and completion together.
    """
    versions = (segment.policy_version,) * len(segment.completion_ids)
    if rollout is None:
        whole = replace(segment, token_version=versions)
    else:
        whole = replace(
            rollout,
            completion_ids=rollout.completion_ids + segment.completion_ids,
            logprob=rollout.logprob + segment.logprob,
            finish_reason=segment.finish_reason,
            token_version=(rollout.token_version or ()) + versions,
        )
    room = min(sampling.max_completion_length, context - len(whole.prompt_ids))
    is_done = segment.finish_reason != "length" or len(whole.completion_ids) >= room
    if is_done and set(whole.token_version or ()) <= {whole.policy_version}:
        whole = replace(whole, token_version=None)
    return whole, is_done


def is_feasible(due: Sequence[int], *, next_round: int, size: int) -> bool:
    """Whether every outstanding group can be learned in time.

    Args:
        due: last round of each group.
        next_round: number of the next round; it and later ones take `size` groups each.
    """
    return all(place < size * (last - next_round + 1) for place, last in enumerate(sorted(due)))


def chosen(groups: Sequence[Group], *, wanted: int, size: int, next_round: int, depth: int) -> list[Group] | None:
    """The groups of the next round, or None while it must wait for more, or for an older one.

    Args:
        groups: outstanding, finished or not.
        wanted: groups of the next round: `size`, or fewer when dynamic sampling has used up its replacements.
        size: groups of a round.
        depth: rounds after which a group is due.
    """
    finished = sorted((g for g in groups if g.experience is not None), key=lambda g: (g.begun, g.ordinal))
    taken = finished[:wanted]
    ordinals = {group.ordinal for group in taken}
    due = [group.begun + depth for group in groups if group.ordinal not in ordinals]
    if len(taken) < wanted or not is_feasible(due, next_round=next_round + 1, size=size):
        return None
    return taken


def most_outstanding(size: int, depth: int) -> int:
    """Groups in flight and not yet learned: half of what the bound allows, (k + 1) / 2 rounds.

    The other half is the stragglers' time: a completion may take twice as long as the rounds that are sampled with it
    before a round waits for it. Depth 1 has no such half: one round is sampled while one is learned.
    """
    return -(-size * (depth + 1) // 2)
