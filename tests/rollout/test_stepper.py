"""Which forward pass decodes: agreement seen once, disagreement told once, weights read anew for each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling
from tests.rollout.contract import assert_fresh_forward_agrees, some_prompts
from tests.rollout.tiny import gpt2, mistral_window, qwen3, tiny_tokenizer


def passes_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass through transformers' backbone; no hook, which would change what is known."""
    rows: list[int] = []
    kind = type(model.base_model)
    forward = kind.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(args[0] if args else kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return rows


def test_transformers_decodes_one_step_and_ours_the_rest(monkeypatch: pytest.MonkeyPatch):
    model = qwen3()
    passes = passes_of(model, monkeypatch)
    engine = BuiltinEngine(model, tiny_tokenizer())
    first = engine.generate([[5, 6, 7]] * 4, Sampling(6), seeds=range(4))
    assert passes == [1, 4]  # the prompt, and the step taken both ways
    assert engine.generate([[5, 6, 7]] * 4, Sampling(6), seeds=range(4)) == first
    assert passes == [1, 4, 1]


@pytest.mark.parametrize("make", [gpt2, mistral_window])
def test_models_that_are_not_known_stay_with_transformers(make: Any, monkeypatch: pytest.MonkeyPatch):
    model = make()
    passes = passes_of(model, monkeypatch)
    BuiltinEngine(model, tiny_tokenizer()).generate([[5, 6, 7]] * 4, Sampling(6), seeds=range(4))
    assert passes == [1, 4, 4, 4, 4, 4]


class DoubledNorm(Qwen3RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]


def test_a_model_that_looks_known_and_differs_is_told_once_and_decoded_by_transformers():
    model = qwen3()
    model.model.norm.__class__ = DoubledNorm
    engine = BuiltinEngine(model, tiny_tokenizer())
    prompts = some_prompts()
    with pytest.warns(UserWarning, match=r"Qwen3ForCausalLM logits that differ .*stays with transformers"):
        rollouts = engine.generate(prompts, Sampling(8), seeds=range(len(prompts)))
    again = engine.generate(prompts, Sampling(8), seeds=range(len(prompts)))  # a second warning would be an error
    assert again == rollouts
    for rollout in rollouts:
        assert_fresh_forward_agrees(model, rollout, Sampling())


def test_a_hook_added_later_is_obeyed(monkeypatch: pytest.MonkeyPatch):
    model = qwen3()
    engine = BuiltinEngine(model, tiny_tokenizer())
    engine.generate([[5, 6]], Sampling(4), seeds=[0])
    assert engine.stepper.has_agreed
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    engine.generate([[5, 6]], Sampling(4), seeds=[0])
    assert len(seen) == 4


def test_weights_changed_in_place_between_calls_are_the_ones_that_sample():
    model = qwen3()
    engine = BuiltinEngine(model, tiny_tokenizer())
    for version in range(3):
        rollout = engine.generate([[5, 6, 7]], Sampling(6), seeds=[0])[0]
        assert_fresh_forward_agrees(model, rollout, Sampling())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 0.1 * (version + 1))


def test_a_first_step_without_finite_logits_decides_nothing():
    model = qwen3()
    engine = BuiltinEngine(model, tiny_tokenizer())
    healthy = engine.generate([[5, 6, 7]], Sampling(1), seeds=[0])[0].completion_ids[0]
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
    with torch.no_grad():
        embedding[healthy] = float("nan")
    assert engine.generate([[5, 6, 7]], Sampling(4), seeds=[0])[0].finish_reason == "error"
    assert engine.stepper.has_agreed is None
