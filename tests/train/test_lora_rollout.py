"""The built-in engine over a model with an adapter samples from base and adapter, whichever way it decodes."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout import llama_decode
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling
from fastrl.rollout.llama_decode import is_known
from fastrl.train.lora import adapter_off, add_lora
from tests.rollout.contract import assert_fresh_forward_agrees, some_prompts
from tests.rollout.tiny import qwen3, tiny_tokenizer
from tests.train.test_lora import randomize


def adapted() -> PreTrainedModel:
    model = qwen3()
    add_lora(model, r=3, alpha=6, seed=0)
    randomize(model)
    return model


def make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BuiltinEngine:
    return BuiltinEngine(model, tokenizer, batch_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_float32_weights_are_decoded_with_the_adapter_added_to_them(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    assert is_known(model) == (dtype == torch.float32)
    engine = make_engine(model, tiny_tokenizer())
    engine.generate(some_prompts(), Sampling(2))
    assert engine.stepper.has_agreed == (True if dtype == torch.float32 else None)


def test_a_model_whose_sum_with_the_adapter_is_too_large_to_copy_decodes_through_its_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_decode, "FUSED_BYTES", 1000)
    assert is_known(qwen3())
    assert not is_known(adapted())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_of_what_is_sampled_are_those_of_base_and_adapter(temperature: float) -> None:
    model, sampling = adapted(), Sampling(12, temperature)
    for rollout in make_engine(model, tiny_tokenizer()).generate(some_prompts(), sampling):
        assert_fresh_forward_agrees(model, rollout, sampling)


def test_what_is_sampled_follows_the_adapter_as_it_moves_and_when_it_is_off() -> None:
    model = adapted()
    engine = make_engine(model, tiny_tokenizer())
    greedy = Sampling(8, temperature=0.0)
    found = []
    for change in ("as it is", "moved", "off"):
        if change == "moved":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".lora_B." in key:
                        parameter.neg_()
        if change == "off":
            with adapter_off(model):
                rollouts = engine.generate(some_prompts(), greedy)
                for rollout in rollouts:
                    assert_fresh_forward_agrees(qwen3(), rollout, greedy)
        else:
            rollouts = engine.generate(some_prompts(), greedy)
            for rollout in rollouts:
                assert_fresh_forward_agrees(model, rollout, greedy)
        found.append([rollout.completion_ids for rollout in rollouts])
    assert found[0] != found[1] != found[2] != found[0]
