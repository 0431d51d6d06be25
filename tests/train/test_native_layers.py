"""Models with fused layers, on fastrl._C and on Triton: value and gradient in float64, and what is left alone."""

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
from fastrl.train import native_layers
from fastrl.train.attention import use_packed_attention
from fastrl.train.model import check_packing, make_packed
from fastrl.train.native_layers import use_native_layers, use_triton_layers
from tests.train.families import FAMILIES, SIZES, family

built = pytest.mark.skipif(find_spec("fastrl._C") is None, reason="fastrl._C is not built here")
KNOWN = ("qwen3", "qwen2", "llama")
FUSE = {"native": use_native_layers, "triton": use_triton_layers}
each_backend = pytest.mark.parametrize("backend", [pytest.param("native", marks=built), "triton"])


def loss_and_grads(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, SIZES["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.log_softmax(-1) * torch.arange(SIZES["vocab_size"]).cos()).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


@each_backend
@pytest.mark.parametrize("name", KNOWN)
def test_a_whole_model_gives_the_values_and_gradients_of_float64(backend: str, name: str):
    model = family(name)
    use_packed_attention(model, "sdpa")
    truth, exact = loss_and_grads(copy.deepcopy(model).double())
    naive, naive_grads = loss_and_grads(model)
    layers = SIZES["num_hidden_layers"]
    assert FUSE[backend](model) == layers * (2 + 2 + 2 * (name == "qwen3")) + 1
    assert FUSE[backend](model) == 0
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
    with pytest.raises(ValueError, match=f"not {type(model).__name__}'s; set kernels.layers to transformers"):
        use_triton_layers(model)
    assert [type(module) for module in model.modules()] == kinds


def test_triton_asked_for_where_it_cannot_run_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match=r"float16 and float32, not torch\.float64; set kernels"):
        use_triton_layers(family("qwen3").double())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"kernels.layers: .* needs a CUDA tensor, got one on cpu .*; set kernels"):
        make_packed(
            family("qwen3"),
            device="cpu",
            attn_implementation="auto",
            gradient_checkpointing=False,
            layers="triton",
        )


@built
def test_a_model_that_ran_natively_can_be_moved_to_triton():
    model = family("qwen3")
    use_packed_attention(model, "sdpa")
    ids = torch.tensor([[3, 4, 5, 6]])
    count = use_native_layers(model)
    native = model(input_ids=ids).logits
    assert use_triton_layers(model) == count
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"triton"}
    torch.testing.assert_close(model(input_ids=ids).logits, native, rtol=1e-4, atol=1e-5)


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


@each_backend
def test_projections_replaced_afterwards_are_the_ones_that_run(backend: str):
    """Adapters wrap the projections; the native layers must call them, not read their weights."""
    plain, native = family("qwen3"), family("qwen3")
    use_packed_attention(plain, "sdpa")
    use_packed_attention(native, "sdpa")
    FUSE[backend](native)
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
