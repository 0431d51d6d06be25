"""The Llama family's decoding step against transformers' own, one token after another over the same cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastrl.rollout import llama_decode
from fastrl.rollout.decode_operators import NATIVE, TORCH, Operators, operators_for
from fastrl.rollout.kv import decoding_cache
from fastrl.rollout.llama_decode import LlamaDecode, is_known
from fastrl.rollout.masks import decoding_mask
from tests.rollout.tiny import CONTEXT, MODELS, V, gemma2_softcap, gpt2, llama_eager, made, mistral_window, qwen3

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def qwen2() -> PreTrainedModel:
    """Query, key and value have a bias."""
    model = made(Qwen2ForCausalLM, Qwen2Config(**SIZES), "sdpa")
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.bias.copy_(torch.linspace(-1.0, 1.0, len(part.bias)))
    return model


def llama3_rope() -> PreTrainedModel:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return made(LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=12, rope_parameters=rope), "sdpa")


def scaled_norms(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Norm weights that differ from 1 and from each other: a norm left out or swapped shows."""
    model = make().eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5 + 0.1 * i, len(parameter)))
    return model


def steps_of(model: PreTrainedModel, step: Callable[..., torch.Tensor], *, is_padded: bool) -> torch.Tensor:
    """[6, B, V] logits of six given tokens after prompts of 5 tokens; row 1's prompt has 2, the rest is padding."""
    generator = torch.Generator().manual_seed(0)
    prompt, tokens = (torch.randint(0, V, shape, generator=generator) for shape in ((3, 5), (6, 3)))
    prefilled = DynamicCache()
    model(input_ids=prompt, past_key_values=prefilled, use_cache=True)
    cache = decoding_cache([(slice(0, 3), prefilled, torch.arange(3))], batch=3, width=5, limit=11)
    mask = decoding_mask(torch.tensor([0, 3, 0]), 11, model.dtype, False) if is_padded else None
    position = torch.tensor([5, 2, 5]) if is_padded else torch.tensor([5, 5, 5])
    logits = []
    for i, token in enumerate(tokens):
        logits.append(step(token, position + i, None if mask is None else mask[..., : 6 + i], cache).float())
    return torch.stack(logits)


def by_transformers(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    def step(token: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        output = model(
            input_ids=token[:, None], position_ids=position[:, None], attention_mask=mask, past_key_values=cache
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    return step


@pytest.mark.parametrize("is_padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("fused_bytes", [1 << 30, 0], ids=["fused", "single"])
@pytest.mark.parametrize("make", [qwen3, qwen2, llama_eager, llama3_rope])
@torch.no_grad()
def test_every_family_gives_transformers_logits(
    make: Callable[[], PreTrainedModel], fused_bytes: int, is_padded: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llama_decode, "FUSED_BYTES", fused_bytes)
    model = scaled_norms(make).double()  # norms work in float32 on both sides
    assert is_known(model)
    expected = steps_of(model, by_transformers(model), is_padded=is_padded)
    assert expected.std() > 0.5
    got = steps_of(model, LlamaDecode(model, context=11), is_padded=is_padded)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("operators", [TORCH, NATIVE], ids=["torch", "native"])
@pytest.mark.parametrize("make", [qwen3, qwen2, llama_eager, llama3_rope])
@torch.no_grad()
def test_float32_is_exact_with_both_sets_of_operators(
    make: Callable[[], PreTrainedModel], operators: Operators, is_padded: bool, monkeypatch: pytest.MonkeyPatch
):
    model = scaled_norms(make)
    if operators is NATIVE and operators_for(model.lm_head.weight) is TORCH:
        pytest.skip("fastrl._C is not built here")
    truth = steps_of(copy.deepcopy(model).double(), by_transformers(copy.deepcopy(model).double()), is_padded=is_padded)
    naive = (steps_of(model, by_transformers(model), is_padded=is_padded) - truth).abs().max()
    monkeypatch.setattr(llama_decode, "operators_for", lambda weight: operators)
    got = (steps_of(model, LlamaDecode(model, context=11), is_padded=is_padded) - truth).abs().max()
    assert float(got) < 2 * float(naive) + 2e-6 * float(truth.abs().max())


@pytest.mark.parametrize("make", [qwen3, qwen2, llama_eager])
@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_transformers(make: Callable[[], PreTrainedModel]):
    model = scaled_norms(make)
    truth = steps_of(model, by_transformers(model), is_padded=False)
    model = model.to(torch.bfloat16)
    naive = (steps_of(model, by_transformers(model), is_padded=False) - truth).norm() / truth.norm()
    ours = (steps_of(model, LlamaDecode(model, context=11), is_padded=False) - truth).norm() / truth.norm()
    assert float(naive) > 1e-4
    assert float(ours) < 1.5 * float(naive)


@pytest.mark.parametrize("make", [gpt2, mistral_window, gemma2_softcap])
def test_other_families_are_not_known(make: Callable[[], PreTrainedModel]):
    assert not is_known(make())


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"attention_bias": True},  # of the output too
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_configuration_with_more_than_the_formula_is_not_known(field: dict[str, Any]):
    assert is_known(made(LlamaForCausalLM, LlamaConfig(**SIZES), "sdpa"))
    assert not is_known(made(LlamaForCausalLM, LlamaConfig(**SIZES | field), "sdpa"))


class HalvedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def replaced_class(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = HalvedLinear


def forward_of_its_own(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def hook_before(model: Any) -> None:
    model.model.norm.register_forward_pre_hook(lambda *_: None)


def hook_after(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [replaced_class, forward_of_its_own, hook_before, hook_after])
def test_a_model_that_was_changed_is_not_known(change: Callable[[Any], None]):
    model = qwen3()
    assert is_known(model)
    change(model)
    assert not is_known(model)


class RenamedNorm(Qwen3RMSNorm):
    pass


def test_a_norm_may_be_of_a_subclass():
    model = qwen3()
    model.model.norm.__class__ = RenamedNorm
    assert is_known(model)


def test_the_contract_runs_on_models_of_both_kinds():
    assert [is_known(make()) for make in MODELS] == [True, True, False, False, False]
