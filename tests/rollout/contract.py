"""What every rollout engine must do, as checks over a factory; an engine's test file runs them all.

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_engine(check):
        check(make_engine, qwen3)

`make_engine(model, tokenizer)` returns the engine under test, sampling from `model`; `make_model()` returns a fresh
fp32 model. The truth is one forward pass over prompt and completion without a cache, and filters written again here,
naively, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.types import Rollout
from tests.rollout.tiny import CONTEXT, V, tiny_tokenizer

MakeEngine = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Engine]
MakeModel = Callable[[], PreTrainedModel]
Check = Callable[[MakeEngine, MakeModel], None]

LENGTHS = (1, 3, 4, 9, 4, 12)  # one token, neighbours, a repeated length, longer than the window
SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "greedy": Sampling(temperature=0.0),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.1),
    "penalty": Sampling(repetition_penalty=1.3),
    "greedy penalty": Sampling(temperature=0.0, repetition_penalty=2.0),
    "all": Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
}


def some_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


def with_length(sampling: Sampling, n: int) -> Sampling:
    return replace(sampling, max_completion_length=n)


def naive_logprob(logits: Tensor, seen: set[int], sampling: Sampling) -> Tensor:
    """[V] float64 log-probabilities of one position, one rule after another."""
    z = logits.double().clone()
    for token in seen if sampling.repetition_penalty != 1.0 else ():
        z[token] = z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
    if sampling.temperature == 0.0:
        return z.log_softmax(-1)
    z = z / sampling.temperature
    ranked = sorted(range(len(z)), key=lambda token: -float(z[token]))
    if sampling.top_k:
        z[ranked[sampling.top_k :]] = -math.inf
    p, reached, kept = z.softmax(-1), 0.0, set()
    for token in ranked:
        if reached < sampling.top_p:
            kept.add(token)
        reached += float(p[token])
    z[[token for token in ranked if token not in kept]] = -math.inf
    z[z < z.max() + math.log(max(sampling.min_p, 1e-300))] = -math.inf
    return z.log_softmax(-1)


def assert_fresh_forward_agrees(model: PreTrainedModel, rollout: Rollout, sampling: Sampling) -> None:
    """Every stored log-probability equals the naive one within 1e-4; a greedy token is the best one."""
    prompt, completion = rollout.prompt_ids, rollout.completion_ids
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(torch.tensor([prompt + completion])).logits[0].float()
    assert len(rollout.logprob) == len(completion) > 0
    for t, token in enumerate(completion):
        z = naive_logprob(logits[len(prompt) + t - 1], set(prompt + completion[:t]), sampling)
        assert abs(float(z[token]) - rollout.logprob[t]) < 1e-4, (sampling, t, float(z[token]), rollout.logprob[t])
        if sampling.temperature == 0.0:
            assert float(z[token]) >= float(z.max()) - 1e-5


def logprobs_equal_a_fresh_forward_pass(make_engine: MakeEngine, make_model: MakeModel) -> None:
    model = make_model()
    engine = make_engine(model, tiny_tokenizer())
    prompts = [prompt for prompt in some_prompts() for _ in range(2)]
    for sampling in SAMPLINGS.values():
        rollouts = engine.generate(prompts, with_length(sampling, 12), seeds=range(len(prompts)))
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            assert rollout.prompt_ids == tuple(prompt)
            assert_fresh_forward_agrees(model, rollout, sampling)


def same_seeds_reproduce_and_other_seeds_differ(make_engine: MakeEngine, make_model: MakeModel) -> None:
    engine = make_engine(make_model(), tiny_tokenizer())
    group = [some_prompts()[2]] * 8
    sampling = Sampling(max_completion_length=10)
    state = torch.get_rng_state()
    first = engine.generate(group, sampling, seeds=range(8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert engine.generate(group, sampling, seeds=range(8)) == first
    assert len({rollout.completion_ids for rollout in first}) == 8
    twins = engine.generate(group, sampling, seeds=[7] * 8)
    assert len({rollout.completion_ids for rollout in twins}) == 1
    assert twins[0].completion_ids == first[7].completion_ids
    fresh, fresher = engine.generate(group, sampling), engine.generate(group, sampling)
    assert {r.completion_ids for r in fresh}.isdisjoint({r.completion_ids for r in fresher})


def a_completion_does_not_depend_on_its_neighbours(make_engine: MakeEngine, make_model: MakeModel) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [1, 2, 3, 4, 5, 6]  # rows end at different steps and are retired
    engine = make_engine(model, tiny_tokenizer())
    prompts, sampling = some_prompts(), Sampling(max_completion_length=20, repetition_penalty=1.1)
    together = engine.generate(prompts, sampling, seeds=range(len(prompts)))
    backwards = engine.generate(prompts[::-1], sampling, seeds=range(len(prompts))[::-1])[::-1]
    assert len({len(rollout.completion_ids) for rollout in together}) > 2
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], sampling, seeds=[i])[0]
        for other in (together[i], backwards[i]):
            assert other.completion_ids == alone.completion_ids
            assert other.finish_reason == alone.finish_reason
            assert other.logprob == pytest.approx(alone.logprob, abs=1e-4)


def first_tokens_follow_the_distribution(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """Chi-square of 2000 draws against the model's own distribution; the 99.9 % point of chi2(39) is 72.1."""
    model = make_model()
    engine = make_engine(model, tiny_tokenizer())
    prompt, n = some_prompts()[3], 2000
    seeds = [request_seed(0, 0, i) for i in range(n)]
    rollouts = engine.generate([prompt] * n, Sampling(max_completion_length=1), seeds=seeds)
    count = torch.bincount(torch.tensor([rollout.completion_ids[0] for rollout in rollouts]), minlength=V)
    with torch.no_grad():
        expected = n * model.eval()(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    common = expected >= 5.0
    count = torch.cat([count[common], count[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    assert float(((count - expected) ** 2 / expected).sum()) < 72.1


def rollouts_carry_the_version_of_their_weights(make_engine: MakeEngine, make_model: MakeModel) -> None:
    engine = make_engine(make_model(), tiny_tokenizer())
    prompts, sampling = some_prompts(), Sampling(max_completion_length=6)
    before = engine.generate(prompts, sampling, seeds=range(len(prompts)))
    changed = make_model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).float()))
    engine.load_weights(changed, 7)
    after = engine.generate(prompts, sampling, seeds=range(len(prompts)))
    assert {rollout.policy_version for rollout in before} == {0}
    assert {rollout.policy_version for rollout in after} == {7}
    assert [r.completion_ids for r in before] != [r.completion_ids for r in after]
    for rollout in after:
        assert_fresh_forward_agrees(changed, rollout, sampling)


def every_eos_id_stops_and_nothing_else_does(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """Secondary EOS ids live in the generation config alone; truncation is never taken for an end."""
    model = make_model()
    model.generation_config.eos_token_id = [5, 6, 7]
    ends = {1, 5, 6, 7}  # 1 is the tokenizer's
    engine = make_engine(model, tiny_tokenizer("<eos>"))
    prompts = [prompt for prompt in some_prompts() for _ in range(8)]
    rollouts = engine.generate(prompts, Sampling(max_completion_length=12), seeds=range(len(prompts)))
    for rollout in rollouts:
        *body, last = rollout.completion_ids
        assert ends.isdisjoint(body)
        assert rollout.finish_reason == ("stop" if last in ends else "length")
        assert last in ends or len(rollout.completion_ids) == 12
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert len({r.completion_ids[-1] for r in rollouts if r.finish_reason == "stop"}) > 1


def an_eos_at_the_last_allowed_token_is_a_stop(make_engine: MakeEngine, make_model: MakeModel) -> None:
    model = make_model()
    engine = make_engine(model, tiny_tokenizer())
    prompt = some_prompts()[1]
    free = engine.generate([prompt], Sampling(max_completion_length=8), seeds=[3])[0].completion_ids
    n = next(i for i in range(2, 8) if free[i] not in free[:i]) + 1
    model.generation_config.eos_token_id = free[n - 1]
    engine = make_engine(model, tiny_tokenizer())
    ended = engine.generate([prompt], Sampling(max_completion_length=n), seeds=[3])[0]
    cut = engine.generate([prompt], Sampling(max_completion_length=n - 1), seeds=[3])[0]
    assert (ended.completion_ids, ended.finish_reason) == (free[:n], "stop")
    assert (cut.completion_ids, cut.finish_reason) == (free[: n - 1], "length")


def a_stop_string_ends_at_the_token_that_completes_it(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """Strings of two letters, each its own token: the match lies across a token border."""
    tokenizer = tiny_tokenizer()
    engine = make_engine(make_model(), tokenizer)
    prompts = [prompt for prompt in some_prompts() for _ in range(4)]
    seeds = range(len(prompts))
    free = engine.generate(prompts, Sampling(max_completion_length=24), seeds=seeds)
    stopped = 0
    for i in range(0, len(prompts), 5):
        pairs = [tokenizer.decode(list(pair)) for pair in pairwise(free[i].completion_ids)]
        word = next(pair for pair in pairs[2:] if pair.isalpha() and pair.isascii() and len(pair) == 2)
        ended = engine.generate(prompts, Sampling(max_completion_length=24, stop=(word, "#")), seeds=seeds)
        for want, got in zip(free, ended, strict=True):
            texts = [tokenizer.decode(list(want.completion_ids[: n + 1])) for n in range(len(want.completion_ids))]
            end = next((n + 1 for n, text in enumerate(texts) if word in text), None)
            assert got.completion_ids == want.completion_ids[:end]
            assert got.logprob == pytest.approx(want.logprob[:end], abs=1e-4)
            assert got.finish_reason == (want.finish_reason if end is None else "stop")
            stopped += end is not None
    assert stopped >= 5


def prompts_that_cannot_be_completed_are_refused(make_engine: MakeEngine, make_model: MakeModel) -> None:
    engine = make_engine(make_model(), tiny_tokenizer())
    for bad, message in (
        ([], "prompt 1 is empty"),
        ([5] * CONTEXT, f"prompt 1 has {CONTEXT} tokens.*context of {CONTEXT}"),
        ([V], rf"prompt 1 holds token {V}.*\[0, {V}\)"),
        ([-1], "prompt 1 holds token -1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([[5, 6], bad], Sampling(max_completion_length=2))
    with pytest.raises(ValueError, match="temperature"):
        engine.generate([[5, 6]], Sampling(temperature=-1.0))
    assert engine.generate([], Sampling()) == []


def a_prompt_near_the_context_gets_the_room_that_is_left(make_engine: MakeEngine, make_model: MakeModel) -> None:
    model = make_model()
    engine = make_engine(model, tiny_tokenizer())
    prompts, sampling = some_prompts((CONTEXT - 1, CONTEXT - 3, 30)), Sampling(max_completion_length=30)
    rollouts = engine.generate(prompts, sampling, seeds=[0, 1, 2])
    assert [len(rollout.completion_ids) for rollout in rollouts] == [1, 3, CONTEXT - 30]
    assert [rollout.finish_reason for rollout in rollouts] == ["length"] * 3
    for rollout in rollouts:
        assert_fresh_forward_agrees(model, rollout, sampling)


def a_segment_is_what_a_naive_forward_pass_says(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """The prefix is no part of what comes back; the segment, the limit and the context each end a completion."""
    model = make_model()
    engine = make_engine(model, tiny_tokenizer())
    prompts = some_prompts((3, 9, 4, CONTEXT - 6, 12))
    prefixes: list[list[int]] = [[], [5, 6, 7], [8], [9, 10], [11] * 9]
    for sampling in (Sampling(), SAMPLINGS["all"], SAMPLINGS["greedy penalty"]):
        sampling = replace(with_length(sampling, 10), segment_tokens=6)
        found = engine.generate(prompts, sampling, seeds=range(5), prefixes=prefixes)
        assert [len(rollout.completion_ids) for rollout in found] == [6, 6, 6, 4, 1]
        assert [rollout.finish_reason for rollout in found] == ["length"] * 5
        for prompt, prefix, rollout in zip(prompts, prefixes, found, strict=True):
            assert rollout.prompt_ids == tuple(prompt)
            assert_fresh_forward_agrees(model, replace(rollout, prompt_ids=(*prompt, *prefix)), sampling)


def segments_are_reproduced_and_end_where_they_should(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """In segments as in one piece: an EOS, a stop string across a border, the limit. Every engine is deterministic."""
    model, tokenizer = make_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [1, 5, 6]
    engine = make_engine(model, tokenizer)
    prompts = [prompt for prompt in some_prompts() for _ in range(4)]
    sampling = Sampling(max_completion_length=14, stop=("ab", "m", "no"))
    parts = in_segments(engine, prompts, sampling, seeds=range(len(prompts)), segment_tokens=3)
    assert in_segments(engine, prompts, sampling, seeds=range(len(prompts)), segment_tokens=3) == parts
    for rollout in parts:
        *body, last = rollout.completion_ids
        text, before = tokenizer.decode([*body, last]), tokenizer.decode(body)
        ends = last in (1, 5, 6) or any(word in text for word in sampling.stop)
        assert not {1, 5, 6} & set(body)
        assert not any(word in before for word in sampling.stop)
        assert rollout.finish_reason == ("stop" if ends else "length")
        assert ends or len(rollout.completion_ids) == 14
        assert_fresh_forward_agrees(model, rollout, sampling)
    assert {rollout.finish_reason for rollout in parts} == {"stop", "length"}


def prefixes_that_cannot_go_on_are_refused(make_engine: MakeEngine, make_model: MakeModel) -> None:
    engine = make_engine(make_model(), tiny_tokenizer())
    for prompt, prefix, message in (
        ([5] * 3, [6] * 8, "prefix 1 has 8 tokens, and completion 1 may have 8 .*ended already"),
        ([5] * (CONTEXT - 2), [6] * 2, "prefix 1 has 2 tokens, and completion 1 may have 2 .*ended already"),
        ([5], [V], rf"prompt 1 holds token {V}.*\[0, {V}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([[5, 6], prompt], Sampling(max_completion_length=8), prefixes=[[], prefix])
    with pytest.raises(ValueError, match="prefixes must have one entry per prompt: got 1 for 2"):
        engine.generate([[5, 6], [7]], Sampling(max_completion_length=8), prefixes=[[]])
    with pytest.raises(ValueError, match="segment_tokens"):
        engine.generate([[5, 6]], Sampling(segment_tokens=0))


def in_segments(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int], segment_tokens: int
) -> list[Rollout]:
    """The completions of `generate`, made by one call after another."""
    found = [Rollout(tuple(prompt), (), (), "length", 0) for prompt in prompts]
    going = list(range(len(prompts)))
    while going:
        segments = engine.generate(
            [prompts[i] for i in going],
            replace(sampling, segment_tokens=segment_tokens),
            seeds=[seeds[i] for i in going],
            prefixes=[found[i].completion_ids for i in going],
        )
        for i, segment in zip(going, segments, strict=True):
            assert 0 < len(segment.completion_ids) <= segment_tokens
            found[i] = replace(
                segment,
                completion_ids=found[i].completion_ids + segment.completion_ids,
                logprob=found[i].logprob + segment.logprob,
            )
        most = [min(sampling.max_completion_length, CONTEXT - len(prompt)) for prompt in prompts]
        going = [i for i in going if found[i].finish_reason == "length" and len(found[i].completion_ids) < most[i]]
    return found


CHECKS: tuple[Check, ...] = (
    logprobs_equal_a_fresh_forward_pass,
    same_seeds_reproduce_and_other_seeds_differ,
    a_completion_does_not_depend_on_its_neighbours,
    first_tokens_follow_the_distribution,
    rollouts_carry_the_version_of_their_weights,
    every_eos_id_stops_and_nothing_else_does,
    an_eos_at_the_last_allowed_token_is_a_stop,
    a_stop_string_ends_at_the_token_that_completes_it,
    prompts_that_cannot_be_completed_are_refused,
    a_prompt_near_the_context_gets_the_room_that_is_left,
    a_segment_is_what_a_naive_forward_pass_says,
    segments_are_reproduced_and_end_where_they_should,
    prefixes_that_cannot_go_on_are_refused,
)


def completions_in_segments_are_those_in_one_piece(make_engine: MakeEngine, make_model: MakeModel) -> None:
    """The further promise of an engine whose random positions are those of the completion: cuts change no token.

    An engine that cannot place its random numbers (vLLM) is deterministic in segments all the same, which CHECKS tests.
    """
    model = make_model()
    model.generation_config.eos_token_id = [1, 5]
    engine = make_engine(model, tiny_tokenizer())
    prompts = [prompt for prompt in some_prompts((*LENGTHS, CONTEXT - 5)) for _ in range(4)]
    seeds = range(len(prompts))
    for sampling in (replace(SAMPLINGS["all"], stop=("ab", "cd", "m")), SAMPLINGS["penalty"], SAMPLINGS["greedy"]):
        sampling = replace(sampling, max_completion_length=17)
        whole = engine.generate(prompts, sampling, seeds=seeds)
        for segment_tokens in (1, 4, 5):
            parts = in_segments(engine, prompts, sampling, seeds=seeds, segment_tokens=segment_tokens)
            assert [rollout.completion_ids for rollout in parts] == [rollout.completion_ids for rollout in whole]
            assert [rollout.finish_reason for rollout in parts] == [rollout.finish_reason for rollout in whole]
            for part, one in zip(parts, whole, strict=True):
                assert part.logprob == pytest.approx(one.logprob, abs=1e-4)
