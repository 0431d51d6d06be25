"""Log-probabilities with a gradient, summed over sequences, against the model's own logits one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from fastrl.data.pack import TokenSequence, pack
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head
from tests.train.rounds import KERNELS, make_model

ROWS = [([3, 1, 4, 1, 5], 3), ([9, 2, 6], 1), ([5, 3, 5, 8, 9, 7], 2)]


@pytest.mark.parametrize("token_budget", [6, 100])
def test_sums_over_completions_have_the_values_and_gradients_of_the_models_own_logits(token_budget: int) -> None:
    model = make_model()
    sequences = [TokenSequence(ids, [float(i >= start) for i in range(len(ids))]) for ids, start in ROWS]
    logp = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids, _ in ROWS]
    expected = torch.stack(
        [each[range(n - 1, len(ids) - 1), ids[n:]].sum() for each, (ids, n) in zip(logp, ROWS, strict=True)]
    )
    want = torch.autograd.grad((expected * torch.tensor([1.0, -2.0, 3.0])).sum(), list(model.parameters()))
    got: dict[int, torch.Tensor] = {}
    for batch in pack(sequences, token_budget=token_budget):
        logprob, entropy = trained_logprob(model, model_head(model), batch, KERNELS)
        assert not (entropy[batch.weight == 0]).any()
        got |= dict(zip(batch.sequence.tolist(), sequence_sum(batch.weight * logprob, batch), strict=True))
    sums = torch.stack([got[i] for i in range(3)])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((sums * torch.tensor([1.0, -2.0, 3.0])).sum(), list(model.parameters()))
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
