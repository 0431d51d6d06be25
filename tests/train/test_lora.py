"""Adapters beside frozen weights: what trains, what the base still says, and which adapter a gradient belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.data.pack import pack
from fastrl.losses.supervised import nll
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.train.lora import active_adapters, adapter, adapter_names, adapter_off, add_lora, is_of_adapter, lora_layers
from fastrl.train.lora_files import merged_state
from fastrl.train.model import checkpoint_activations, hidden_states, model_head
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.sequences import supervised_sequence
from fastrl.train.tiny import make_tiny_qwen3
from fastrl.types import TokenBatch
from tests.train.families import family

VOCABULARY = 17
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return make_tiny_qwen3(VOCABULARY, hidden_size=16, layers=2, intermediate_size=24, context=64).to(dtype)


def randomize(model: PreTrainedModel, name: str = "default", *, seed: int = 0) -> None:
    """Give B values as if it had been trained; a fresh adapter is the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_of_adapter(key, name) and ".lora_B." in key:
                parameter.normal_(0.0, 0.2, generator=generator)


def lora_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = make_model(dtype)
    add_lora(model, r=3, alpha=6, seed=0)
    randomize(model)
    return model


def batch() -> TokenBatch:
    """Two packed rows of 6 and 4 tokens."""
    rows = [([3, 1, 4, 1, 5, 9], [False, False, True, True, True, True]), ([2, 6, 5, 3], [False, True, True, True])]
    sequences = [supervised_sequence(ids, is_trained, weight=1 / 7) for ids, is_trained in rows]
    (packed,) = pack(sequences, token_budget=64)
    return packed


def loss_of(model: PreTrainedModel) -> Tensor:
    packed = batch()
    return linear_token_loss(
        hidden_states(model, packed), model_head(model).weight, packed.target, nll, row_weight=packed.weight
    ).loss


def gradients(model: PreTrainedModel, name: str = "default") -> dict[str, Tensor]:
    return {key: p.grad for key, p in model.named_parameters() if is_of_adapter(key, name) and p.grad is not None}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Tensor = model(input_ids=torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    return output


def test_a_fresh_adapter_changes_nothing_and_trains_r_times_in_plus_out_numbers_a_layer() -> None:
    model = make_model()
    before, total = logits(model), sum(parameter.numel() for parameter in model.parameters())
    add_lora(model, r=3, alpha=6, seed=0)
    assert torch.equal(logits(model), before)
    # Four heads of 4 over two of keys and values: q and o are 16 x 16, k and v 8 x 16, the feed-forward 24 x 16.
    numbers = 2 * 3 * (2 * (16 + 16) + 2 * (8 + 16) + 3 * (24 + 16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers
    assert sum(p.numel() for p in model.parameters()) == total + numbers
    assert all(key.partition(".")[2] for key in MasterAdamW(model).state_dict())
    assert all(is_of_adapter(key.partition(".")[2]) for key in MasterAdamW(model).state_dict())


def test_the_gradient_is_that_of_the_dense_matrix_seen_through_a_and_b() -> None:
    """y = (W + s B A) x, so dA = s B^T dW and dB = s dW A^T."""
    model = lora_model()
    dense = make_model()
    dense.load_state_dict(merged_state(model))
    loss, expected = loss_of(model), loss_of(dense)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    got, wanted = gradients(model), {key: p.grad for key, p in dense.named_parameters()}
    assert len(got) == 2 * 2 * len(LINEARS)
    for path, layer in model.named_modules():
        if f"{path}.lora_A.default.weight" not in got:
            continue
        a, b, full = layer.lora_A["default"].weight, layer.lora_B["default"].weight, wanted[f"{path}.weight"]
        assert full is not None
        torch.testing.assert_close(a.grad, 2.0 * b.T @ full, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.grad, 2.0 * full @ a.T, rtol=1e-9, atol=1e-12)


def test_with_the_adapter_off_the_base_speaks_bit_for_bit_and_afterwards_all_is_as_before() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, model = make_model(dtype), lora_model(dtype)
        flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        trained = logits(model)
        assert not torch.equal(trained, logits(base))
        with adapter_off(model):
            assert active_adapters(model) == ()
            assert torch.equal(logits(model), logits(base))
            assert torch.equal(hidden_states(model, batch()), hidden_states(base, batch()))
            assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
        with pytest.raises(KeyError), adapter_off(model):
            raise KeyError
        assert torch.equal(logits(model), trained)
        assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    plain = make_model()
    with adapter_off(plain):
        assert active_adapters(plain) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_has_the_precision_of_its_base_and_moves_while_that_rests(dtype: torch.dtype) -> None:
    model = lora_model(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = MasterAdamW(model, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step(1e-2)
    assert {master.dtype for master in optimizer.state_dict().values()} == {torch.float32}
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != is_of_adapter(key), key


def test_a_second_adapter_has_its_own_values_and_its_own_gradient() -> None:
    model = lora_model()
    first = logits(model)
    add_lora(model, r=2, alpha=2, seed=1, target_modules=("q_proj", "mlp.down_proj"), name="value")
    assert adapter_names(model) == ("default", "value")
    assert active_adapters(model) == ("default",)
    assert torch.equal(logits(model), first)
    randomize(model, "value", seed=1)
    assert torch.equal(logits(model), first)
    with adapter(model, "value"):
        assert not torch.equal(logits(model), first)
        loss_of(model).backward()
    assert len(gradients(model, "value")) == 2 * 2 * 2
    assert gradients(model) == {}
    assert active_adapters(model) == ("default",)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (is_of_adapter(key) or is_of_adapter(key, "value")), key


def test_a_third_adapter_leaves_frozen_ones_frozen() -> None:
    model = lora_model()
    add_lora(model, r=2, alpha=2, seed=1, name="reward")
    for key, parameter in model.named_parameters():
        if is_of_adapter(key, "reward"):
            parameter.requires_grad_(False)
    add_lora(model, r=2, alpha=2, seed=1, name="value")
    with adapter(model, "reward"), adapter_off(model), adapter(model, "value"):
        pass
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if is_of_adapter(key) or is_of_adapter(key, "value")}


@pytest.mark.parametrize("is_inside", [True, False], ids=["backward inside the block", "backward after it"])
def test_activation_checkpointing_computes_again_with_the_adapter_of_the_forward_pass(is_inside: bool) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = make_model()
        if is_checkpointed:
            checkpoint_activations(model)
        add_lora(model, r=3, alpha=6, seed=0)
        add_lora(model, r=3, alpha=6, seed=1, name="value")
        randomize(model)
        randomize(model, "value", seed=1)
        with adapter(model, "value"):
            loss = loss_of(model)
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        assert active_adapters(model) == ("default",)
        assert gradients(model) == {}
        found.append(gradients(model, "value"))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 28
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-12, atol=1e-15)


def test_four_roles_over_one_base_take_at_most_three_tenths_more_bytes() -> None:
    """Policy, critic and reward model as adapters, the reference with all of them off."""
    model = make_tiny_qwen3(VOCABULARY, hidden_size=128, layers=2)
    base = sum(parameter.nbytes for parameter in model.parameters())
    for name in ("default", "value", "reward"):
        add_lora(model, r=4, alpha=8, seed=0, name=name)
    assert sum(parameter.nbytes for parameter in model.parameters()) <= 1.3 * base


def test_the_seed_alone_decides_the_first_values() -> None:
    def first_values(seed: int) -> Tensor:
        model = make_model()
        add_lora(model, r=3, alpha=6, seed=seed)
        return next(lora_layers(model)).lora_A["default"].weight.detach()

    state = torch.random.get_rng_state()
    one = first_values(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(first_values(5), one)
    assert not torch.equal(first_values(6), one)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "phi3", "gpt2", "gpt-neox"])
def test_other_families_take_adapters_and_give_them_up(name: str) -> None:
    model = family(name)
    before = logits(model)
    add_lora(model, r=2, alpha=4, seed=0)
    assert torch.equal(logits(model), before)
    randomize(model)
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, before)
    with adapter_off(model):
        assert torch.equal(logits(model), before)
    merged = family(name)
    merged.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        (("all-linear",), [f"{i}.{name}" for i in (0, 1) for name in LINEARS]),
        (("v_proj", "q_proj"), ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        (("layers.1.self_attn.q_proj",), ["1.q_proj"]),
    ],
)
def test_targets_choose_layers_by_name_or_path(wanted: tuple[str, ...], layers: list[str]) -> None:
    model = make_model()
    add_lora(model, r=1, alpha=1, seed=0, target_modules=wanted)
    adapted = [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    assert [f"{path.split('.')[2]}.{path.split('.')[-1]}" for path in adapted] == layers


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "b", "target_modules": ("lm_head",)}, "lm_head is no linear layer"),
        ({"name": "b", "target_modules": ("q_proj", "c_attn")}, "c_attn is no linear layer .*some of down_proj"),
        ({}, "must be new"),
        ({"name": "a.b"}, "have no dot"),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        add_lora(lora_model(), r=1, alpha=1, seed=0, **options)


def test_an_adapter_that_is_not_there_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="no adapter 'value'"), adapter(lora_model(), "value"):
        pass
