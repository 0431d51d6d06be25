"""The native CPU layers: value and gradient against float64, and what they leave alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fastrl.ops.backend
from fastrl.testing import assert_no_worse_than, double, value_and_grads
from fastrl.train import native_layers
from fastrl.train.attention import use_packed_attention
from fastrl.train.model import check_packing
from fastrl.train.native_layers import rms_norm, rotary, swiglu, use_native_layers
from tests.train.families import FAMILIES, SIZES, family

built = pytest.mark.skipif(find_spec("fastrl._C") is None, reason="fastrl._C is not built here")
KNOWN = ("qwen3", "qwen2", "llama")


def norm_in_torch(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def swiglu_in_torch(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def rotary_in_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@built
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (7, 5), (3, 4, 33), (300, 64), (129, 257), (0, 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_norm_and_its_gradients_are_those_of_float64(shape: tuple[int, ...], scale: float):
    use_native_layers(family("qwen3"))  # loads the extension
    inputs = (scale * randn(*shape), 1.0 + 0.1 * randn(shape[-1], seed=1))
    options = {"epsilon": 1e-6}
    assert_no_worse_than(
        naive=value_and_grads(lambda x, w: norm_in_torch(x, w, **options), *inputs),
        got=value_and_grads(lambda x, w: rms_norm(x, w, **options), *inputs),
        truth=value_and_grads(lambda x, w: norm_in_torch(x, w, **options), *double(inputs)),
        slack=1e-6,
    )


@built
def test_the_norms_weight_gradient_over_many_rows_does_not_depend_on_threads():
    use_native_layers(family("qwen3"))
    x, weight = randn(20000, 16), torch.ones(16)
    truth = value_and_grads(lambda x, w: norm_in_torch(x, w, epsilon=1e-6), x.double(), weight.double())
    grads = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(value_and_grads(lambda x, w: rms_norm(x, w, epsilon=1e-6), x, weight).grads)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(grads[0][1].double(), truth.grads[1], rtol=1e-5, atol=1e-3)


@built
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 9, 31), (257, 64), (0, 4)])
def test_swiglu_and_its_gradients_are_those_of_float64(shape: tuple[int, ...]):
    use_native_layers(family("qwen3"))
    inputs = (4.0 * randn(*shape), randn(*shape, seed=1))
    assert_no_worse_than(
        naive=value_and_grads(swiglu_in_torch, *inputs),
        got=value_and_grads(swiglu, *inputs),
        truth=value_and_grads(swiglu_in_torch, *double(inputs)),
        slack=1e-6,
    )


@built
def test_swiglu_is_right_where_the_exponential_is_clamped_and_keeps_nan():
    use_native_layers(family("qwen3"))
    gate = torch.tensor([-1e4, -100.0, -87.5, -20.0, -1e-30, 0.0, 20.0, 88.5, 1e4]).requires_grad_()
    exact = gate.detach().double().requires_grad_()
    swiglu(gate, torch.ones(9)).sum().backward()
    swiglu_in_torch(exact, torch.ones(9).double()).sum().backward()
    torch.testing.assert_close(swiglu(gate, torch.ones(9)).double(), nn.functional.silu(exact), rtol=3e-7, atol=1e-30)
    assert gate.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(gate.grad.double(), exact.grad, rtol=1e-6, atol=1e-30)
    assert swiglu(torch.tensor([float("nan"), 1.0]), torch.ones(2)).isnan().tolist() == [True, False]


@built
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 6), (40, 4, 16), (9, 2, 128), (0, 2, 4)])
def test_rotations_and_their_gradients_are_those_of_float64(shape: tuple[int, int, int]):
    use_native_layers(family("qwen3"))
    half = randn(shape[0], shape[2] // 2, seed=1)
    angle = torch.cat([half, half], dim=-1)
    inputs = (randn(*shape), angle.cos(), angle.sin())
    assert_no_worse_than(
        naive=value_and_grads(rotary_in_torch, *inputs, differentiable=(0,)),
        got=value_and_grads(rotary, *inputs, differentiable=(0,)),
        truth=value_and_grads(rotary_in_torch, *double(inputs), differentiable=(0,)),
        slack=1e-6,
    )


def loss_and_grads(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, SIZES["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.log_softmax(-1) * torch.arange(SIZES["vocab_size"]).cos()).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


@built
@pytest.mark.parametrize("name", KNOWN)
def test_a_whole_model_gives_the_values_and_gradients_of_float64(name: str):
    model = family(name)
    use_packed_attention(model, "sdpa")
    truth, exact = loss_and_grads(copy.deepcopy(model).double())
    naive, naive_grads = loss_and_grads(model)
    layers = SIZES["num_hidden_layers"]
    assert use_native_layers(model) == layers * (2 + 2 + 2 * (name == "qwen3")) + 1
    assert use_native_layers(model) == 0
    got, grads = loss_and_grads(model)
    assert not torch.equal(got, naive)  # it did run
    assert float((got - truth).norm()) < 2 * float((naive - truth).norm()) + 1e-5
    assert grads.keys() == exact.keys()
    for key, grad in grads.items():
        slack = 1e-5 * float(exact[key].norm())
        assert float((grad - exact[key]).norm()) < 2 * float((naive_grads[key] - exact[key]).norm()) + slack, key
    check_packing(model)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(KNOWN)))
def test_other_families_keep_all_their_layers(name: str):
    model = family(name)
    kinds = [type(module) for module in model.modules()]
    assert use_native_layers(model) == 0
    assert [type(module) for module in model.modules()] == kinds


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_changes_nothing_before_or_after(dtype: torch.dtype):
    assert use_native_layers(family("qwen3").to(dtype)) == 0
    ids = torch.tensor([[3, 4, 5, 6]])
    plain, native = family("qwen3"), family("qwen3")
    assert use_native_layers(native) > 0
    for model in (plain, native):
        use_packed_attention(model, "sdpa")
        model.to(dtype)
    assert torch.equal(native(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_without_the_extension_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fastrl.ops.backend, "_extension_is_loaded", lambda: False)
    assert use_native_layers(family("qwen3")) == 0


@built
def test_a_build_that_lacks_one_operator_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native_layers, "OPERATORS", (*native_layers.OPERATORS, "an_operator_of_tomorrow"))
    assert use_native_layers(family("qwen3")) == 0


@built
def test_an_activation_other_than_silu_keeps_its_feed_forward_layers():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    changed = use_native_layers(model)
    assert changed == SIZES["num_hidden_layers"] * 3 + 1
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@built
def test_projections_replaced_afterwards_are_the_ones_that_run():
    """Adapters wrap the projections; the native layers must call them, not read their weights."""
    plain, native = family("qwen3"), family("qwen3")
    use_packed_attention(plain, "sdpa")
    use_packed_attention(native, "sdpa")
    use_native_layers(native)
    for model in (plain, native):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(model.model.layers[0].self_attn, part).__class__ = Halved
        for part in ("gate_proj", "up_proj", "down_proj"):
            getattr(model.model.layers[1].mlp, part).__class__ = Halved
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(native(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@built
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_native_model_is_copied_pickled_and_saved_like_another(copied: Callable[[Any], Any], tmp_path: Path):
    model = family("llama")
    names = list(model.state_dict())
    use_native_layers(model)
    twin = copied(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert list(twin.state_dict()) == names
    twin.save_pretrained(tmp_path)
    back = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(back.model.norm).__name__ == "LlamaRMSNorm"
    for name, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@built
def test_direct_calls_with_wrong_memory_raise_instead_of_reading_it():
    use_native_layers(family("qwen3"))
    ops, x, weight = torch.ops.fastrl, torch.ones(4, 6), torch.ones(6)
    scale = torch.ones(4)
    for call, message in (
        (lambda: ops.rms_norm(x, torch.ones(5), 1e-6), r"x must be \[..., D\] with D=5"),
        (lambda: ops.rms_norm(x.double(), weight, 1e-6), "x must be a contiguous float32"),
        (lambda: ops.rms_norm(torch.ones(6, 4).t(), weight, 1e-6), "x must be a contiguous float32"),
        (lambda: ops.rms_norm_backward(x[:2], x, weight, scale), "grad must have 24 elements, got 12"),
        (lambda: ops.rms_norm_backward(x, x, weight, scale[:3]), "scale must have one number per row"),
        (lambda: ops.swiglu(x, x[:3]), r"gate and up must be \[T, D\] both"),
        (lambda: ops.swiglu(x.t(), x.t()), "gate and up must be float32 CPU tensors with contiguous rows"),
        (lambda: ops.swiglu_backward(x[:1], x, x), "grad must have 24 elements, got 6"),
        (lambda: ops.rotary(x, x, x, False), r"x must be \[T, H, d\] with an even d"),
        (lambda: ops.rotary(torch.ones(2, 1, 4), torch.ones(3, 4), torch.ones(3, 4), False), "cos must be"),
        (lambda: ops.rotary(torch.ones(2, 1, 4), torch.ones(2, 4), torch.ones(1, 4), False), "sin must have 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
