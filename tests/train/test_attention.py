from __future__ import annotations

import importlib.machinery
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.train import attention
from fastrl.train.attention import use_packed_attention
from fastrl.train.model import checkpoint_activations, hidden_states, model_head, turn_off_dropout
from fastrl.train.packed_sdpa import bucketed, packed_sdpa
from fastrl.train.tiny import make_tiny_qwen3
from fastrl.types import TokenBatch
from tests.train.families import FAMILIES, VOCABULARY, family

LENGTHS = (5, 1, 9, 8, 3)


def packed(sequences: list[Tensor]) -> TokenBatch:
    ids = torch.cat(sequences)
    borders = torch.tensor([0, *[len(s) for s in sequences]]).cumsum(0)
    return TokenBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences]),
        target=ids.roll(-1),
        weight=torch.ones(len(ids)),
        cu_seqlens=borders.int(),
        max_seqlen=max(len(s) for s in sequences),
        sequence=torch.arange(len(sequences)),
    )


def random_sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def logits_of(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    head = model_head(model)  # type: ignore[arg-type]
    hidden = hidden_states(model, batch)  # type: ignore[arg-type]
    logits = head.logit_scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_and_gradients_equal_those_of_each_sequence_alone(name: str) -> None:
    model, sequences = family(name).double(), random_sequences()
    model.set_attn_implementation("eager")  # transformers' own plain attention is the specification
    alone = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])
    slope = torch.randn(alone.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = torch.autograd.grad((alone * slope).sum(), list(model.parameters()))

    use_packed_attention(model)
    together = logits_of(model, packed(sequences))
    gradients = torch.autograd.grad((together * slope).sum(), list(model.parameters()))

    # Some families compute norms and rotations in float32 even here.
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    largest = max(float(g.abs().max()) for g in expected)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    batch = packed(random_sequences())
    model = family(name)
    use_packed_attention(model)
    plain = torch.autograd.grad(logits_of(model, batch).square().sum(), list(model.parameters()))
    checkpoint_activations(model)
    turn_off_dropout(model)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layers = model.model.layers if name != "gpt2" else model.transformer.h
    layers[0].mlp.register_forward_pre_hook(count)
    checkpointed = torch.autograd.grad(logits_of(model, batch).square().sum(), list(model.parameters()))
    assert calls == 2  # once forward, once more in the backward pass
    assert not model.training
    torch.testing.assert_close(checkpointed, plain)


def test_the_same_model_object_decodes_with_a_cache_between_packed_passes() -> None:
    model, ids = family("gemma2"), random_sequences()[2]
    use_packed_attention(model)
    together = logits_of(model, packed([ids, ids[:4]]))[: len(ids)]
    prompt = model(input_ids=ids[None, :4], use_cache=True)
    rest = [prompt.logits[0]]
    cache = prompt.past_key_values
    for token in ids[4:]:
        step = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
        rest.append(step.logits[0])
    torch.testing.assert_close(torch.cat(rest), together, atol=1e-5, rtol=1e-4)


def test_left_padded_rows_with_a_mask_get_the_values_of_the_row_alone() -> None:
    model, ids = family("qwen3"), random_sequences()[2]
    use_packed_attention(model)
    alone = logits_of(model, packed([ids]))
    padded = torch.cat([torch.zeros(3, dtype=torch.int64), ids])
    mask = (torch.arange(12) >= 3).long()
    positions = (torch.arange(12) - 3).clamp(min=0)
    row = model(input_ids=padded[None], attention_mask=mask[None], position_ids=positions[None], use_cache=False)
    torch.testing.assert_close(row.logits[0, 3:], alone, atol=1e-5, rtol=1e-4)


def test_buckets_hold_lengths_within_a_fifth_and_every_row_returns_to_its_place() -> None:
    lengths = [10, 3, 0, 8, 100, 9, 3]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    buckets = bucketed(borders)
    assert buckets.shapes == ((1, 100), (3, 10), (2, 3))
    assert torch.equal(buckets.gather[buckets.place], torch.arange(sum(lengths)))


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_packed_sdpa_is_masked_softmax_attention_by_hand(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    query = torch.randn(total, 4, 6, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, total, 2, 6, generator=generator, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    row = torch.arange(total)
    is_seen = (owner[:, None] == owner) & (row[:, None] >= row) & (row[:, None] - row < (window or total))
    score = torch.einsum("the,she->hts", query, key.repeat_interleave(2, 1)) * 0.3
    score = score if softcap is None else softcap * (score / softcap).tanh()
    expected = torch.einsum(
        "hts,she->the", score.masked_fill(~is_seen, -torch.inf).softmax(-1), value.repeat_interleave(2, 1)
    )
    buckets = bucketed(torch.tensor([0, *LENGTHS]).cumsum(0))
    got = packed_sdpa(query, key, value, buckets, scaling=0.3, window=window, softcap=softcap)
    # The capped scores are exponentiated in float32, as in transformers.
    torch.testing.assert_close(got, expected, atol=1e-12 if softcap is None else 1e-6, rtol=1e-6)


def test_a_model_without_packed_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attends through 'sdpa', which would mix packed sequences"):
        hidden_states(family("qwen3"), packed(random_sequences()))


def test_kernels_that_cannot_run_here_are_refused_by_name() -> None:
    model = make_tiny_qwen3(VOCABULARY)
    with pytest.raises(RuntimeError, match="attention 'varlen' needs a CUDA device"):
        use_packed_attention(model, "varlen")
    with pytest.raises(RuntimeError, match="attention 'flash' needs"):
        use_packed_attention(model, "flash")


def kernel_on_the_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *_: object,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What varlen_attn documents: `window_size` counts keys to the left and right of a row, -1 for all of them."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = torch.empty_like(query)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        row = torch.arange(end - start)
        is_seen = (row[:, None] >= row) & ((left < 0) | (row[:, None] - row <= left))
        score = torch.einsum("the,she->hts", query[start:end], key[start:end]) * scale
        weight = score.masked_fill(~is_seen, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hts,she->the", weight, value[start:end])
    return out


def without_gqa(*arguments: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """The signature of torch 2.11."""
    return kernel_on_the_cpu(*arguments, scale=scale, window_size=window_size)


def flash_on_the_cpu(
    *arguments: Any, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float
) -> Tensor:
    """The part of flash-attn's signature that is used here."""
    assert causal
    assert softcap == 0.0
    return kernel_on_the_cpu(*arguments, scale=softmax_scale, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma3"])
@pytest.mark.parametrize("kernel", ["varlen", "varlen of torch 2.11", "flash"])
def test_the_flash_kernels_are_asked_for_the_same_attention(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = family(name), packed(random_sequences())
    use_packed_attention(model, "sdpa")
    expected = hidden_states(model, batch)
    monkeypatch.setattr(attention, "_cuda_obstacle", lambda model: None)
    if kernel == "flash":
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_on_the_cpu  # type: ignore[attr-defined]
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        use_packed_attention(model, "flash")
    else:
        stand_in = kernel_on_the_cpu if kernel == "varlen" else without_gqa
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
        attention._varlen_options.cache_clear()
        use_packed_attention(model)  # "auto" prefers it
        assert model.config._attn_implementation == "fastrl_varlen"
    torch.testing.assert_close(hidden_states(model, batch), expected, atol=1e-5, rtol=1e-4)
    attention._varlen_options.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_varlen_on_cuda_is_no_worse_than_bucketed_sdpa(name: str) -> None:
    model, batch = family(name).cuda(), packed(random_sequences())
    batch = TokenBatch(
        **{
            field: value.cuda() if isinstance(value := getattr(batch, field), Tensor) else value
            for field in TokenBatch.__slots__
        }
    )
    use_packed_attention(model, "sdpa")
    truth = hidden_states(model, batch)
    model.bfloat16()
    naive = (hidden_states(model, batch) - truth).abs().max()
    use_packed_attention(model, "varlen")
    assert (hidden_states(model, batch) - truth).abs().max() <= 2 * naive + 1e-2
