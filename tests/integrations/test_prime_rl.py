"""The head with per-token temperature against logits made by hand in float64."""

from __future__ import annotations

import pytest
import torch

from fastrl.integrations.prime_rl import FusedOutputLinear


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_numbers_and_gradients_are_those_of_the_logits(chunk_size: int | None) -> None:
    torch.manual_seed(0)
    head = FusedOutputLinear(8, 37, chunk_size)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    labels, temperature = torch.randint(0, 37, (2, 5)), torch.rand(2, 5) + 0.5
    found = head(hidden, labels, temperature)
    (found["logprobs"].sum() + 0.3 * found["entropy"].sum()).backward()

    exact, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logp = (exact @ weight.T / temperature.double()[..., None]).log_softmax(-1)
    logprobs = logp.gather(-1, labels[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    for got, expected in (
        (found["logprobs"], logprobs),
        (found["entropy"], entropy),
        (hidden.grad, exact.grad),
        (head.weight.grad, weight.grad),
    ):
        assert expected is not None
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_it_wants_labels_and_temperatures() -> None:
    with pytest.raises(AssertionError, match="requires labels"):
        FusedOutputLinear(2, 3)(torch.zeros(1, 1, 2), None, torch.ones(1, 1))
    with pytest.raises(AssertionError, match="per-token temperatures"):
        FusedOutputLinear(2, 3)(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))


def test_labels_may_be_of_any_integer_dtype() -> None:
    head, hidden, labels = FusedOutputLinear(2, 3), torch.randn(1, 2, 2), torch.tensor([[0, 2]])
    found, expected = head(hidden, labels.int(), torch.ones(1, 2)), head(hidden, labels, torch.ones(1, 2))
    torch.testing.assert_close(found, expected)
