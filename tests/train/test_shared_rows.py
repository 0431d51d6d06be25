"""Positions that sequences have in common go through the layers once: the same values, gradients, fewer products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastrl.data.pack import TokenSequence, pack
from fastrl.testing import gemm_flops
from fastrl.train.attention import use_packed_attention
from fastrl.train.model import checkpoint_activations, hidden_states, turn_off_dropout
from fastrl.train.shared_rows import spread
from fastrl.types import SharedRows, TokenBatch
from tests.train.families import FAMILIES, VOCABULARY, family


def group_of_three() -> TokenBatch:
    """A prompt of 6 with three completions, two of which begin alike, and a sequence of another kind."""
    generator = torch.Generator().manual_seed(5)

    def drawn(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    prompt, begun = drawn(6), drawn(2)
    sequences = [prompt + begun + drawn(3), drawn(7), prompt + drawn(4), prompt + begun + drawn(1)]
    (batch,) = pack([TokenSequence(ids, [0.0, *[1.0] * (len(ids) - 1)]) for ids in sequences], token_budget=1000)
    assert batch.shared is not None
    assert len(batch.target) == 10 + 6 + 9 + 8
    assert len(batch.shared.kept) == 10 + 6 + (9 - 6) + (8 - 8)  # the last one's are all in the first
    return batch


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_gradients_are_those_without_sharing(name: str, is_checkpointed: bool) -> None:
    model, batch = family(name).double(), group_of_three()
    use_packed_attention(model)
    turn_off_dropout(model)
    if is_checkpointed:
        checkpoint_activations(model)
    apart = replace(batch, shared=None)
    expected = hidden_states(model, apart)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p is not model.get_output_embeddings().weight]
    truth = torch.autograd.grad((expected * slope).sum(), parameters, allow_unused=True)
    got = hidden_states(model, batch)
    found = torch.autograd.grad((got * slope).sum(), parameters, allow_unused=True)
    # GPT-2 computes all of it in float64; the others' norms and rotations are float32 even here.
    noise = 1e-13 if name == "gpt2" else 1e-6
    torch.testing.assert_close(got, expected, rtol=0, atol=noise * float(expected.detach().abs().max()))
    largest = max(float(x.abs().max()) for x in truth if x is not None)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=noise * largest)


def test_layers_run_on_the_shared_rows_alone() -> None:
    model, batch = family("qwen3"), group_of_three()
    use_packed_attention(model)

    def flops(of: TokenBatch) -> float:
        return gemm_flops(lambda: hidden_states(model, of).sum().backward())

    assert batch.shared is not None
    share = len(batch.shared.kept) / len(batch.target)
    assert flops(batch) == pytest.approx(share * flops(replace(batch, shared=None)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_of_a_shared_row_is_summed_in_float32(dtype: torch.dtype) -> None:
    columns = ([0, 2], [0, 0, 1, 0, 0], [1, 3, 4], [0], [0, 0, 0])
    shared = SharedRows(*(torch.tensor(column) for column in columns))
    x = torch.tensor([[1.0], [2.0]], dtype=dtype).requires_grad_()
    y = spread(x, shared)
    assert y[:, 0].tolist() == [1, 1, 2, 1, 1]
    grads = torch.tensor([[256.0], [1.0], [5.0], [1.0], [1.0]], dtype=dtype)  # a sum in bfloat16 stays at 256
    total: Tensor = torch.autograd.grad(y, x, grads)[0]
    assert total.dtype == dtype
    assert total[:, 0].tolist() == [260.0 if dtype == torch.bfloat16 else 259.0, 5.0]
