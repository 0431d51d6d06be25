"""Sequences into packed batches: the only place where labels are shifted.

    sequence of n ids  ->  n - 1 positions:   input[t] = ids[t],   target[t] = ids[t + 1],   column[t] = column[t + 1]

A sequence's columns are unshifted (entry i is about ids[i]); a batch's follow the alignment rule of `fastrl.types`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrl.data.prefixes import LEAST_SAVED, bundles, first_alike, in_order
from fastrl.types import SharedRows, TokenBatch

IntColumn = Sequence[int] | NDArray[np.integer] | Tensor
FloatColumn = Sequence[float] | NDArray[np.floating] | Tensor

OPTIONAL_COLUMNS = ("advantage", "sampler_logprob", "old_logprob", "ref_logprob", "old_value", "returns")


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One sequence before packing; entry i of every column is about ids[i], nothing is shifted yet.

    Columns are tuples, numpy arrays or CPU tensors; arrays pack ten times faster.

    Attributes:
        ids: at least two token ids.
        weight: share of predicting ids[i] in the optimizer step's loss; weight[0] is 0, as nothing precedes ids[0].
        advantage: constant per token; entry 0 of this and the next columns is not used.
        sampler_logprob, old_logprob, ref_logprob: log-probability of ids[i], in nats; see `TokenBatch`.
        old_value, returns: of the state in which ids[i] is chosen; see `TokenBatch`.
    """

    ids: IntColumn
    weight: FloatColumn
    advantage: FloatColumn | None = None
    sampler_logprob: FloatColumn | None = None
    old_logprob: FloatColumn | None = None
    ref_logprob: FloatColumn | None = None
    old_value: FloatColumn | None = None
    returns: FloatColumn | None = None


def pack(
    sequences: Sequence[TokenSequence],
    *,
    token_budget: int,
    group: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    parts: int = 1,
) -> list[TokenBatch]:
    """Best-fit decreasing into batches of at most `token_budget` positions; deterministic, nothing cut or padded.

    Sequences that begin alike are kept together as far as that leaves batches full (a quarter of the budget at most),
    and `shared` says which of their positions are one and the same. The longest of these runs, or else the longest
    sequence, is in the first batch, so that a step that does not fit fails at once. Within a batch, sequences keep
    their order. The batches of one call share storage: one transfer per column.

    Args:
        sequences: those of one optimizer step; an optional column is on all of them or on none.
        token_budget: most positions (one less than tokens, per sequence) of a batch.
        group: [S] sequences of the same number (the two of a preference pair) share a batch; None leaves each alone.
        parts: the sequences are first cut into so many parts of about equal length, and no batch spans two: for
            processes that train a step together. A part may be empty.

    Returns:
        The batches, none of them empty; [] for no sequences.

    Raises:
        ValueError: a sequence or a group over the budget; a sequence shorter than two tokens, with columns of other
            lengths, with a weight on its first token or not finite, or with a column that others lack.

    Cost: O(S log S) on the host plus one pass over the tokens.

    Source: best-fit decreasing, Johnson 1973; at most 11/9 of the fewest batches + 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    if not sequences:
        return []
    tokens = np.array([len(each.ids) for each in sequences], dtype=np.int64)
    _require_lengths(tokens, token_budget)
    ids = _joined_ids(sequences)
    first = np.cumsum(tokens) - tokens  # [S] place of each sequence's first token in the joined columns
    columns = _joined_columns(sequences, tokens)
    _require_weights(columns["weight"], first)

    fed_ids = [ids[start : start + n - 1] for start, n in zip(first, tokens, strict=True)]
    alike, common = in_order(fed_ids)
    if group is None:
        share = int((tokens - 1).sum()) // (2 * parts) if parts > 1 else token_budget  # one bundle leaves ranks idle
        runs = bundles(tokens - 1, alike, common, most=min(token_budget // 4, share))
        group = np.repeat(np.arange(len(runs)), [len(run) for run in runs])[np.argsort(np.concatenate(runs))].tolist()
    bins = _bins(tokens - 1, token_budget, group, parts)
    order = np.concatenate(bins)  # [S] sequences in packed order
    lengths = tokens[order] - 1
    start = np.cumsum(lengths) - lengths  # [S] first position of each packed sequence
    position = np.arange(lengths.sum()) - np.repeat(start, lengths)
    source = np.repeat(first[order], lengths) + position  # the token fed at each position

    def on_device(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device)

    fed, positions, target = on_device(ids[source]), on_device(position), on_device(ids[source + 1])
    shifted = {name: on_device(values[source + 1]) for name, values in columns.items()}
    sequence = on_device(order)
    place_alike = np.argsort(alike)  # [S] place of each sequence in the order of their tokens
    batches = []
    s = t = 0
    for members in bins:
        borders = np.concatenate([[0], np.cumsum(lengths[s : s + len(members)])])
        here = slice(t, t + int(borders[-1]))
        batches.append(
            TokenBatch(
                input_ids=fed[here],
                position_ids=positions[here],
                target=target[here],
                cu_seqlens=on_device(borders.astype(np.int32)),
                max_seqlen=int(lengths[s : s + len(members)].max()),
                sequence=sequence[s : s + len(members)],
                shared=_shared(place_alike[members], borders, common, device),
                **{name: values[here] for name, values in shifted.items()},
            )
        )
        s, t = s + len(members), here.stop
    return batches


def _shared(
    places: NDArray[np.int64], borders: NDArray[np.int64], common: NDArray[np.int64], device: torch.device | str | None
) -> SharedRows | None:
    """What the sequences of a batch have in common, or None where it is too little to be worth it.

    Args:
        places: [K] of the batch's sequences among all, sorted by their tokens.
        borders: [K + 1] of the sequences in the batch.
        common: of `in_order`.
    """
    by_tokens = np.argsort(places)
    same = first_alike(places[by_tokens], borders[:-1][by_tokens], np.diff(borders)[by_tokens], common)
    is_kept = same == np.arange(len(same))
    if is_kept.sum() > (1 - LEAST_SAVED) * len(same):
        return None
    place = (np.cumsum(is_kept) - 1)[same]
    others = np.flatnonzero(~is_kept)
    several, summed = np.unique(place[others], return_inverse=True)
    columns = (np.flatnonzero(is_kept), place, others, several, summed)
    return SharedRows(*(torch.from_numpy(column).to(device) for column in columns))


def unpack(per_token: Tensor, batch: TokenBatch) -> list[Tensor]:
    """[T, ...] values cut at the sequences' borders, in the order of `batch.sequence`; views, [n - 1, ...] each.

    Raises:
        ValueError: another number of positions than the batch has.
    """
    if per_token.shape[:1] != batch.target.shape:
        raise ValueError(f"per_token must be [T, ...] with T={len(batch.target)}, got shape {tuple(per_token.shape)}")
    return list(per_token.split(batch.cu_seqlens.diff().tolist()))


def unpack_columns(per_token: Sequence[Tensor], batches: Sequence[TokenBatch]) -> list[Tensor]:
    """One [T] tensor per batch back to one [n] column per sequence, in the order given to `pack`.

    The inverse of packing one column: entry i is about ids[i] again and entry 0 is 0, so that the result can be
    a column of a `TokenSequence` and be packed otherwise (old log-probabilities kept for later minibatches).

    Args:
        per_token: values of all batches of one `pack` call.

    Raises:
        ValueError: another number of tensors than batches, or batches of different calls.
    """
    if len(per_token) != len(batches):
        raise ValueError(f"per_token must hold one tensor per batch, got {len(per_token)} for {len(batches)} batches")
    columns: dict[int, Tensor] = {}
    for values, batch in zip(per_token, batches, strict=True):
        for index, piece in zip(batch.sequence.tolist(), unpack(values, batch), strict=True):
            columns[index] = torch.cat([piece.new_zeros(1), piece])
    count = sum(len(batch.sequence) for batch in batches)
    if sorted(columns) != list(range(count)):
        raise ValueError(
            f"batches must be all those of one pack call, got sequences {sorted(columns)[:8]}... of {count}"
        )
    return [columns[index] for index in range(count)]


def _bins(lengths: NDArray[np.int64], budget: int, group: Sequence[int] | None, parts: int) -> list[NDArray[np.int64]]:
    """The sequences of each bin, ascending; those of a group in one bin."""
    if group is None:
        return _of_parts(lengths, budget, parts)
    if len(group) != len(lengths):
        raise ValueError(f"group must hold a number for each of the {len(lengths)} sequences, got {len(group)}")
    _, first, member = np.unique(np.asarray(group, np.int64), return_index=True, return_inverse=True)
    totals = np.bincount(member, weights=lengths).astype(np.int64)
    longest = int(totals.argmax())
    if totals[longest] > budget:
        raise ValueError(
            f"sequence {first[longest]} and those that must be learned together with it take {totals[longest]} "
            f"positions, over the token budget of {budget}: raise packing.token_budget to at least {totals[longest]}"
        )
    bins = _of_parts(totals, budget, parts)
    members = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    return [np.sort(np.concatenate([members[group] for group in groups])) for groups in bins]


def _of_parts(lengths: NDArray[np.int64], budget: int, parts: int) -> list[NDArray[np.int64]]:
    """The sequences of each bin of each part; a part takes the next longest sequence when it is the shortest so far."""
    if parts == 1:
        return _best_fit_decreasing(lengths, budget)
    members: list[list[int]] = [[] for _ in range(parts)]
    total = [0] * parts
    for index in np.argsort(-lengths, kind="stable").tolist():
        least = min(range(parts), key=total.__getitem__)
        members[least].append(index)
        total[least] += int(lengths[index])
    places = [np.array(sorted(part), dtype=np.int64) for part in members if part]
    return [part[bin_] for part in places for bin_ in _best_fit_decreasing(lengths[part], budget)]


def _best_fit_decreasing(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """[S] lengths -> the sequences of each bin: longest first, each into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(room, (length, 0))
        if place == len(room):
            left, bin_index = budget, len(bins)
            bins.append([])
        else:
            left, bin_index = room.pop(place)
        bins[bin_index].append(index)
        insort(room, (left - length, bin_index))
    return [np.array(sorted(members), dtype=np.int64) for members in bins]


def _joined_ids(sequences: Sequence[TokenSequence]) -> NDArray[np.int64]:
    joined = np.concatenate([np.asarray(each.ids) for each in sequences])
    if joined.dtype.kind not in "iu" or joined.ndim != 1:
        raise ValueError(f"ids must be one-dimensional integers, got {joined.dtype} with {joined.ndim} dimensions")
    return joined.astype(np.int64, copy=False)


def _joined_columns(sequences: Sequence[TokenSequence], tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    columns = {}
    for name in ("weight", *OPTIONAL_COLUMNS):
        parts = [getattr(each, name) for each in sequences]
        missing = [index for index, part in enumerate(parts) if part is None]
        if len(missing) == len(parts):
            continue
        if missing:
            raise ValueError(
                f"{name} must be on all {len(parts)} sequences of a step or on none; sequence {missing[0]} has none"
            )
        arrays = [np.asarray(part, dtype=np.float32) for part in parts]
        for index, array in enumerate(arrays):
            if array.shape != (tokens[index],):
                raise ValueError(f"sequence {index}: {name} must be [{tokens[index]}] as ids, got shape {array.shape}")
        columns[name] = np.concatenate(arrays)
    return columns


def _require_lengths(tokens: NDArray[np.int64], budget: int) -> None:
    shortest, longest = int(tokens.argmin()), int(tokens.argmax())
    if tokens[shortest] < 2:
        raise ValueError(
            f"sequence {shortest}: needs at least 2 tokens, one to feed and one to predict, got {tokens[shortest]}"
        )
    if tokens[longest] - 1 > budget:
        raise ValueError(
            f"sequence {longest} has {tokens[longest]} tokens, {tokens[longest] - 1} positions, over the token budget "
            f"of {budget}: raise packing.token_budget to at least {tokens[longest] - 1}, or shorten the sequence"
        )


def _require_weights(weight: NDArray[np.float32], first: NDArray[np.int64]) -> None:
    weighted = np.flatnonzero(weight[first] != 0)
    if len(weighted):
        raise ValueError(f"sequence {weighted[0]}: weight[0] must be 0, as nothing predicts the first token")
    broken = np.flatnonzero(~np.isfinite(weight))
    if len(broken):
        index = int(np.searchsorted(first, broken[0], side="right")) - 1
        raise ValueError(
            f"sequence {index}: weight must be finite, got {weight[broken[0]]} at {broken[0] - first[index]}"
        )
