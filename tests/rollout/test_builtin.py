from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout import decode
from fastrl.rollout.builtin import BuiltinEngine, eos_token_ids
from fastrl.rollout.engine import Engine, Sampling, check_sampling
from tests.rollout.contract import (
    CHECKS,
    Check,
    MakeModel,
    assert_fresh_forward_agrees,
    completions_in_segments_are_those_in_one_piece,
    some_prompts,
)
from tests.rollout.tiny import CONTEXT, MODELS, V, gpt2, mistral_window, qwen3, tiny_tokenizer


def make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    model.train()  # dropout must be off all the same
    return BuiltinEngine(model, tokenizer, batch_size=64)


@pytest.mark.parametrize("make_model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("check", [*CHECKS, completions_in_segments_are_those_in_one_piece], ids=lambda f: f.__name__)
def test_the_builtin_engine_meets_the_contract(check: Check, make_model: MakeModel):
    check(make_engine, make_model)


def test_batches_retirement_and_growth_change_no_completion(monkeypatch: pytest.MonkeyPatch):
    prompts = [prompt for prompt in some_prompts() for _ in range(4)]
    sampling = Sampling(max_completion_length=30)
    model = qwen3()
    model.generation_config.eos_token_id = [1, 2, 3]
    want = BuiltinEngine(model, tiny_tokenizer()).generate(prompts, sampling, seeds=range(24))
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 13)
    monkeypatch.setattr(decode, "RETIRE_SHARE", 0.0)
    monkeypatch.setattr("fastrl.rollout.kv.FIRST_ROOM", 1)
    got = BuiltinEngine(model, tiny_tokenizer(), batch_size=5).generate(prompts, sampling, seeds=range(24))
    assert [rollout.completion_ids for rollout in got] == [rollout.completion_ids for rollout in want]
    assert len({len(rollout.completion_ids) for rollout in got}) > 5


def test_a_repeated_prompt_is_fed_once():
    fed = []
    model = qwen3()
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    BuiltinEngine(model, tiny_tokenizer()).generate([[5, 6, 7]] * 8 + [[8, 9, 10]] * 8, Sampling(2))
    assert fed == [(2, 3), (16, 1)]


def test_rows_that_ended_leave_the_batch():
    widths = []
    model = qwen3()
    model.generation_config.eos_token_id = [1, 2, 3, 4]
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[0]))
    rollouts = BuiltinEngine(model, tiny_tokenizer()).generate([[5, 6]] * 64, Sampling(40), seeds=range(64))
    longest = max(len(rollout.completion_ids) for rollout in rollouts)
    assert widths[1:] == sorted(widths[1:], reverse=True)
    needed = sum(len(rollout.completion_ids) - 1 for rollout in rollouts)
    assert needed <= sum(widths[1:]) < 1.2 * needed < 64 * (longest - 1)


def test_a_row_at_the_end_of_the_context_waits_for_its_neighbours_in_bounds():
    """One ended row among 16 is too few to retire; its next position would lie outside GPT-2's table."""
    prompts = some_prompts((CONTEXT - 1, *[2] * 15))
    rollouts = BuiltinEngine(gpt2(), tiny_tokenizer()).generate(prompts, Sampling(8), seeds=range(16))
    assert [len(rollout.completion_ids) for rollout in rollouts] == [1] + [8] * 15


def test_training_goes_on_after_sampling_from_the_same_module():
    model = qwen3().train()
    model.model.layers[0].eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    engine = BuiltinEngine(model, tiny_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor(some_prompts((9,)))
    for version in range(2):
        rollout = engine.generate(ids.tolist(), Sampling(6), seeds=[0])[0]
        assert [module.training for module in model.modules()] == modes
        assert rollout.policy_version == version
        assert_fresh_forward_agrees(model, rollout, Sampling())
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        engine.load_weights(model, version + 1)


def test_logits_that_are_not_finite_end_their_rollout_as_an_error():
    model = qwen3()
    engine = BuiltinEngine(model, tiny_tokenizer())
    good = engine.generate([[5, 6], [7, 8]], Sampling(6), seeds=[0, 1])
    poison = good[0].completion_ids[2]
    others = set(good[1].completion_ids) | {5, 6, 7, 8}
    assert poison not in others
    assert poison not in good[0].completion_ids[:2]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untie
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    bad = engine.generate([[5, 6], [7, 8]], Sampling(6), seeds=[0, 1])
    assert bad[0].finish_reason == "error"
    assert bad[0].completion_ids == good[0].completion_ids[:3]
    assert bad[0].logprob == pytest.approx(good[0].logprob[:3])
    assert bad[1].completion_ids == good[1].completion_ids
    assert bad[1].finish_reason == "length"


@pytest.mark.parametrize("sampling", [Sampling(4), Sampling(4, 0.0), Sampling(4, 0.7, 0.9, 5, 0.1, 1.2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_head_gives_errors_and_no_tokens(sampling: Sampling, value: float):
    model = qwen3()
    passes = []
    model.lm_head.register_forward_hook(lambda _, __, logits: (passes.append(1), torch.full_like(logits, value))[1])
    for rollout in BuiltinEngine(model, tiny_tokenizer()).generate([[5, 6], [7, 8]], sampling):
        assert (rollout.completion_ids, rollout.logprob, rollout.finish_reason) == ((), (), "error")
    assert len(passes) == 1


def test_a_logit_of_minus_infinity_is_a_token_that_is_never_drawn():
    model = qwen3()
    forbidden = torch.arange(V) >= 20
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.masked_fill(forbidden, -float("inf")))
    for rollout in BuiltinEngine(model, tiny_tokenizer()).generate([[5, 6]] * 16, Sampling(8)):
        assert rollout.finish_reason == "length"
        assert max(rollout.completion_ids) < 20


def test_weights_that_do_not_fit_are_refused_by_name():
    engine = BuiltinEngine(qwen3(), tiny_tokenizer())
    wide = qwen3()
    wide.model.norm.weight = nn.Parameter(torch.ones(33))
    with pytest.raises(ValueError, match=r"model.norm.weight must be \[32\] .* got \[33\]"):
        engine.load_weights(wide, 1)
    with pytest.raises(ValueError, match=r"missing .*self_attn\.k_norm"):
        engine.load_weights(mistral_window(), 1)
    untied = qwen3()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="are one tensor in the engine's model, but differ"):
        engine.load_weights(untied, 1)
    assert engine.version == 0


def test_tied_weights_stay_tied_and_an_untied_engine_takes_tied_weights():
    source = qwen3()
    with torch.no_grad():
        source.model.embed_tokens.weight.add_(1.0)
    engine = BuiltinEngine(qwen3(), tiny_tokenizer())
    engine.load_weights(source, 1)
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight
    torch.testing.assert_close(engine.model.lm_head.weight, source.lm_head.weight)
    untied = qwen3()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    engine = BuiltinEngine(untied, tiny_tokenizer())
    engine.load_weights(source, 1)
    torch.testing.assert_close(untied.lm_head.weight, source.lm_head.weight)


def test_another_dtype_means_a_copy_that_load_weights_casts_into():
    model = qwen3()
    engine = BuiltinEngine(model, tiny_tokenizer(), dtype=torch.bfloat16)
    assert engine.model is not model
    assert model.dtype == torch.float32
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(0.5)
    engine.load_weights(changed, 3)
    assert engine.model.model.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(engine.model.model.norm.weight.float(), changed.model.norm.weight)
    rollout = engine.generate([[5, 6]], Sampling(4), seeds=[0])[0]
    assert len(rollout.logprob) == 4
    assert max(rollout.logprob) <= 0.0


def test_eos_ids_come_from_tokenizer_config_and_generation_config():
    model, tokenizer = qwen3(), tiny_tokenizer("<eos>")
    assert eos_token_ids(model, tokenizer) == {1}
    model.config.eos_token_id = 2
    model.generation_config.eos_token_id = [3, 4]
    assert eos_token_ids(model, tokenizer) == {1, 2, 3, 4}


def test_seeds_must_match_the_prompts():
    with pytest.raises(ValueError, match="got 1 for 2 prompts"):
        BuiltinEngine(qwen3(), tiny_tokenizer()).generate([[5], [6]], Sampling(1), seeds=[0])


def test_an_attention_that_falls_through_to_sdpa_decodes_padded_batches():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("falls_through", sdpa_attention_forward)
    model = qwen3()
    model.config._attn_implementation = "falls_through"
    prompts = [*some_prompts(), *some_prompts((13, 14, 15))]
    got = BuiltinEngine(model, tiny_tokenizer()).generate(prompts, Sampling(8), seeds=range(9))
    model.config._attn_implementation = "sdpa"
    for rollout in got:
        assert_fresh_forward_agrees(model, rollout, Sampling())
    windowed = mistral_window()
    windowed.config._attn_implementation = "falls_through"
    with pytest.raises(ValueError, match="not registered"):
        BuiltinEngine(windowed, tiny_tokenizer()).generate([[5]], Sampling(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_completion_length", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
    ],
)
def test_sampling_that_describes_no_distribution_is_refused(field: str, value: float):
    with pytest.raises(ValueError, match=rf"sampling\.{field}"):
        check_sampling(Sampling(**{field: value}))


def test_every_id_of_the_vocabulary_can_be_a_prompt():
    rollouts = BuiltinEngine(qwen3(), tiny_tokenizer()).generate([[token] for token in range(V)], Sampling(1))
    assert [rollout.prompt_ids for rollout in rollouts] == [(token,) for token in range(V)]
