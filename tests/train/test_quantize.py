"""A base in 4 bits: what it computes is what its dequantised weights compute, with and without gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.recipes.sorting import make_tokenizer
from fastrl.train.export import save_pretrained
from fastrl.train.lora import add_lora, is_of_adapter
from fastrl.train.lora_files import merged_state
from fastrl.train.model import load_model
from fastrl.train.quantize import four_bit_layers
from fastrl.train.tiny import make_tiny_qwen3
from tests.train.test_lora import logits, loss_of, randomize

pytest.importorskip("bitsandbytes")
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_tiny_qwen3(len(TOKENIZER), hidden_size=64, layers=2, context=64)
    return save_pretrained(model, TOKENIZER, tmp_path_factory.mktemp("base") / "model", card="random")


def loaded(path: Path, *, load_in_4bit: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(path, dtype=dtype, device="cpu", load_in_4bit=load_in_4bit)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    add_lora(model, r=3, alpha=6, seed=0)
    randomize(model)
    return model


def pair(base: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model in 4 bits, and a dense one with the weights those bits stand for; the same adapter over both."""
    quantized, dense = loaded(base, load_in_4bit=True), loaded(base, load_in_4bit=False)
    dense.load_state_dict(merged_state(quantized))
    return adapted(quantized), adapted(dense)


def test_linear_layers_take_half_a_byte_a_weight_and_the_rest_stays(base: Path) -> None:
    quantized, dense = loaded(base, load_in_4bit=True), loaded(base, load_in_4bit=False)
    paths = [path for path, _ in four_bit_layers(quantized)]
    assert len(paths) == 2 * 7
    weights = dict(dense.named_parameters())
    for path, layer in four_bit_layers(quantized):
        assert layer.weight.nbytes == weights[f"{path}.weight"].numel() / 2
    for key, parameter in quantized.named_parameters():
        if key.removesuffix(".weight") not in paths:
            assert torch.equal(parameter, weights[key]), key
    state = merged_state(quantized)
    # NF4 keeps a normal weight to about 9 % of its deviation.
    for path in paths:
        gap = (state[f"{path}.weight"] - weights[f"{path}.weight"]).norm() / weights[f"{path}.weight"].norm()
        assert 0.05 < gap < 0.12, path


def test_values_and_gradients_are_those_of_the_dequantised_weights(base: Path) -> None:
    quantized, dense = pair(base)
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-4)
    loss, expected = loss_of(quantized), loss_of(dense)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    wanted = {key: parameter.grad for key, parameter in dense.named_parameters()}
    trained = 0
    for key, parameter in quantized.named_parameters():
        if not is_of_adapter(key):
            assert parameter.grad is None, key
            continue
        trained += 1
        assert parameter.grad is not None, key
        want = wanted[key]
        assert isinstance(want, Tensor)
        assert (parameter.grad - want).norm() <= 1e-4 * want.norm(), key
    assert trained == 2 * 2 * 7


def test_a_pass_without_gradients_leaves_the_next_one_with_them_right(base: Path) -> None:
    """On some CPUs bitsandbytes would change a layer for good in the first pass that needs no gradient."""
    quantized, dense = pair(base)
    quantized.eval()
    logits(quantized)
    for layer in (layer for _, layer in four_bit_layers(quantized)):
        assert layer.weight.dtype == torch.uint8
    loss_of(quantized).backward()
    loss_of(dense).backward()
    first = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    got, want = (dict(model.named_parameters())[first].grad for model in (quantized, dense))
    assert got is not None
    assert want is not None
    assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_export_is_dense_and_says_what_was_trained(
    base: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = adapted(loaded(base, load_in_4bit=True, dtype=dtype))
    expected = logits(model).float()
    written = save_pretrained(model, TOKENIZER, tmp_path / "run" / "model", card="merged")
    assert "quantization_config" not in (written / "config.json").read_text()
    plain = loaded(written, load_in_4bit=False, dtype=dtype)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert (logits(plain).float() - expected).norm() <= tolerance * expected.norm()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
