"""One batch from prompts to completions: prefill once per different prompt, decode together, retire what ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from fastrl.rollout.draw import drawn, filtered, greedy, penalized
from fastrl.rollout.engine import Sampling
from fastrl.rollout.kv import decoding_cache
from fastrl.rollout.masks import decoding_mask, is_mask_made_by_model, prompt_mask
from fastrl.rollout.seeds import uniform
from fastrl.rollout.stepper import Stepper
from fastrl.rollout.stop import StopStrings
from fastrl.types import FinishReason

PREFILL_TOKENS = 16384  # fed in one forward pass, padding included: bounds the activations of long prompts
PREFILL_LIKENESS = 3 / 4  # shortest over longest prompt of a pass: bounds the padding (measured, docs/rollout.md)
RETIRE_SHARE = 1 / 8  # rows that ended leave the batch when they are this share of it (measured, docs/rollout.md)
CUDA_CHECK_EVERY = 8  # steps between looks at which rows ended: a look waits for the device; on CPU it is free


@dataclass(frozen=True, slots=True)
class Request:
    """What is the same for every batch of a call.

    Attributes:
        is_eos: [V] bool.
        stop_strings: None when the call has none.
        context: most tokens the model holds, prompt and completion together.
        stepper: feeds `model` one token per row.
    """

    model: PreTrainedModel
    sampling: Sampling
    is_eos: Tensor
    stop_strings: StopStrings | None
    context: int
    stepper: Stepper


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens, their logprobs and why they end."""

    ids: tuple[int, ...]
    logprob: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(slots=True)
class _Rows:
    """The rows still decoding; retiring shortens every tensor along its first axis.

    Attributes:
        place: [B] row of the batch as it started.
        stream: [B] random stream.
        position: [B] position of the next token.
        limit: [B] tokens the row may have.
        mask: [B, ...] for all steps; None without padding.
        seen: [B, V] bool for the repetition penalty; None without one.
        is_done: [B] bool, ended but not yet retired; what such a row still samples is ignored.
        cache: keys and values.
    """

    place: Tensor
    stream: Tensor
    position: Tensor
    limit: Tensor
    mask: Tensor | None
    seen: Tensor | None
    is_done: Tensor
    cache: Cache

    def keep(self, rows: Tensor) -> None:
        self.place, self.stream = self.place[rows], self.stream[rows]
        self.position, self.limit, self.is_done = self.position[rows], self.limit[rows], self.is_done[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        for layer in self.cache.layers:
            layer.keep_rows(rows)


def decode(
    request: Request,
    prompts: list[tuple[int, ...]],
    limits: list[int],
    stream: Tensor,
    *,
    prefix_lengths: list[int],
) -> list[Completion]:
    """Sample one completion per prompt, or the rest of one.

    Args:
        prompts: tokens to feed, a prefix of the completion included; sorted by length and content, so that equal
            prompts are neighbours.
        limits: tokens to sample for each at most, at least 1.
        stream: [B] random streams.
        prefix_lengths: how many of each prompt's last tokens belong to its completion: stop strings may begin there.

    Cost: one forward pass of the different prompts, then one of [B', 1] tokens per step, B' the rows in flight.
    """
    rows, logits = _prefilled(request, prompts, limits, stream)
    longest = max(limits)
    token_log = stream.new_zeros(len(prompts), longest)
    logprob_log = torch.zeros(len(prompts), longest, device=stream.device)
    ends: dict[int, int] = {}  # row -> number of tokens up to a stop string
    window = 0 if request.stop_strings is None else request.stop_strings.window
    earlier = [list(ids[len(ids) - min(n, window) :]) for ids, n in zip(prompts, prefix_lengths, strict=True)]
    checked = 0
    for step in range(longest):
        token, logprob = _next_token(request.sampling, logits, rows, step)
        token_log[rows.place, step], logprob_log[rows.place, step] = token, logprob
        rows.is_done |= request.is_eos[token] | (rows.limit == step + 1) | ~logprob.isfinite()
        if (step + 1) % (CUDA_CHECK_EVERY if token.is_cuda else 1) == 0 or step + 1 == longest:
            if request.stop_strings is not None:
                _find_stops(request.stop_strings, rows, token_log, ends, earlier, checked, step + 1)
                checked = step + 1
            done = int(rows.is_done.sum())
            if done == len(token) or step + 1 == longest:
                break
            if done >= RETIRE_SHARE * len(token):
                going = (~rows.is_done).nonzero()[:, 0]
                rows.keep(going)
                token = token[going]
        logits = _forward(request, rows, token)
    return _completions(request, token_log[:, : step + 1], logprob_log[:, : step + 1], limits, ends)


def _prefilled(
    request: Request, prompts: list[tuple[int, ...]], limits: list[int], stream: Tensor
) -> tuple[_Rows, Tensor]:
    """Feed each different prompt once; returns the rows ready to decode and their logits [B, V] f32."""
    model, device = request.model, stream.device
    made_by_model = is_mask_made_by_model(model)
    width = len(prompts[-1])
    limit = width + max(limits)
    position = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prefilled: list[tuple[slice, DynamicCache, Tensor]] = []
    logits = []
    # A model's own mask may leave a padding row nothing to see, which some attentions turn into NaN: no padding then.
    for start, different in _passes(prompts, 1.0 if made_by_model else PREFILL_LIKENESS):
        repeat = torch.tensor([i for i, (_, n) in enumerate(different) for _ in range(n)], device=device)
        passed, cache = _feed([prompt for prompt, _ in different], model)
        logits.append(passed[repeat])
        prefilled.append((slice(start, start + len(repeat)), cache, repeat))
    pad = width - position
    is_padded = width > len(prompts[0])
    seen = None
    if request.sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), logits[0].shape[-1], dtype=torch.bool, device=device)
        seen.scatter_(1, _left_padded(prompts, device), True)
    rows = _Rows(
        place=torch.arange(len(prompts), device=device),
        stream=stream,
        position=position,
        limit=torch.tensor(limits, device=device),
        mask=decoding_mask(pad, limit, model.dtype, made_by_model) if is_padded else None,
        seen=seen,
        is_done=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        cache=decoding_cache(prefilled, batch=len(prompts), width=width, limit=limit),
    )
    return rows, torch.cat(logits)


def _passes(prompts: list[tuple[int, ...]], likeness: float) -> list[tuple[int, list[tuple[tuple[int, ...], int]]]]:
    """Cut sorted prompts into forward passes of PREFILL_TOKENS: (first row, [(prompt, times it is repeated)]).

    Args:
        likeness: least length of a pass's shortest prompt, relative to its longest.
    """
    passes: list[tuple[int, list[tuple[tuple[int, ...], int]]]] = []
    for row, prompt in enumerate(prompts):
        if row and prompt == prompts[row - 1]:
            last = passes[-1][1]
            last[-1] = (prompt, last[-1][1] + 1)
        elif passes and _fits(passes[-1][1], prompt, likeness):
            passes[-1][1].append((prompt, 1))
        else:
            passes.append((row, [(prompt, 1)]))
    return passes


def _fits(different: list[tuple[tuple[int, ...], int]], prompt: tuple[int, ...], likeness: float) -> bool:
    is_within_memory = (len(different) + 1) * len(prompt) <= PREFILL_TOKENS
    return is_within_memory and len(different[0][0]) >= likeness * len(prompt)


def _feed(prompts: list[tuple[int, ...]], model: PreTrainedModel) -> tuple[Tensor, DynamicCache]:
    ids = _left_padded(prompts, model.device)
    width = ids.shape[1]
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=model.device)
    mask = None
    if len(prompts[0]) < width:
        mask = prompt_mask(pad, width, model.dtype)
    position = (torch.arange(width, device=model.device) - pad[:, None]).clamp_(min=0)
    cache = DynamicCache()
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
    )
    return output.logits[:, -1].float(), cache


def _left_padded(prompts: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """[U, width] ids; the padding repeats the prompt's first token, which is valid and already seen."""
    width = max(len(prompt) for prompt in prompts)
    return torch.tensor([(prompt[0],) * (width - len(prompt)) + prompt for prompt in prompts], device=device)


def _next_token(sampling: Sampling, logits: Tensor, rows: _Rows, step: int) -> tuple[Tensor, Tensor]:
    if rows.seen is not None:
        logits = penalized(logits, rows.seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        token, logprob = greedy(logits)
    else:
        token, logprob = drawn(filtered(logits, sampling), uniform(rows.stream, step))
    if rows.seen is not None:
        rows.seen.scatter_(1, token[:, None], True)
    return token, logprob


def _forward(request: Request, rows: _Rows, token: Tensor) -> Tensor:
    # A row that ended at the context's limit but is not yet retired must not run past the position table.
    position = rows.position.clamp(max=request.context - 1)
    rows.position += 1
    length = rows.cache.get_seq_length() + 1
    mask = None if rows.mask is None else rows.mask[..., :length]
    return request.stepper(token, position, mask, rows.cache)


def _find_stops(
    stop_strings: StopStrings,
    rows: _Rows,
    token_log: Tensor,
    ends: dict[int, int],
    earlier: list[list[int]],
    checked: int,
    step: int,
) -> None:
    """Mark rows whose new tokens complete a stop string as done and note where."""
    place = rows.place.tolist()
    first = max(0, checked - stop_strings.window)
    recent = token_log[rows.place, first:step].tolist()
    ended = []
    for i, (row, ids) in enumerate(zip(place, recent, strict=True)):
        before = earlier[row] if first == 0 else []
        match = None if row in ends else stop_strings.first_match(before + ids, len(before) + checked - first)
        if match is not None:
            ends[row] = first + match + 1 - len(before)
            ended.append(i)
    rows.is_done[ended] = True


def _completions(
    request: Request, token_log: Tensor, logprob_log: Tensor, limits: Sequence[int], ends: dict[int, int]
) -> list[Completion]:
    """Cut each row at whatever came first: a stop, its limit, or logits that were not finite."""
    bad_at = _first(~logprob_log.isfinite())
    stop_at = _first(request.is_eos[token_log])
    token_rows, logprob_rows = token_log.tolist(), logprob_log.tolist()
    completions = []
    for row, limit in enumerate(limits):
        stop = min(stop_at[row] + 1, ends.get(row, limit + 1))
        end = min(bad_at[row], stop, limit)
        reason: FinishReason = "stop" if stop == end else "length" if limit == end else "error"
        completions.append(Completion(tuple(token_rows[row][:end]), tuple(logprob_rows[row][:end]), reason))
    return completions


def _first(flags: Tensor) -> list[int]:
    """Per row of [B, n], the index of the first True, or n when there is none."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1]).tolist()
