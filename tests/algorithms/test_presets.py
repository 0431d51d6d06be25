"""Every preset against the oracle: the loss of a whole step, and its derivative by every log-probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrl.algorithms import policy_loss_from_logprob, presets
from fastrl.types import TokenBatch
from tests import oracle
from tests.algorithms.algorithms import NAMED
from tests.algorithms.steps import GROUP, LENGTH, REWARD, make_head, make_step, oracle_step, pack

EVERYTHING = list(range(len(LENGTH)))


# The KL of a reward is measured under the old policy: those algorithms are tested with one.
CASES = [
    (name, has_old) for name, (_, spec) in NAMED.items() for has_old in (True, False) if has_old or not spec.in_reward
]


@pytest.mark.parametrize(("name", "has_old"), CASES)
def test_the_loss_and_its_derivatives_are_the_papers(name: str, has_old: bool) -> None:
    algorithm, spec = NAMED[name]
    head = make_head()
    step = make_step(head)
    sequences = oracle_step(step, head, has_old=has_old)
    loss, by_logprob, by_entropy = oracle.step_loss(spec, sequences, np.array(REWARD), GROUP)
    _, batch = pack(algorithm, step, EVERYTHING, has_old=has_old)
    logprob = torch.tensor(np.concatenate([q.logprob for q in sequences]), requires_grad=True)
    entropy = torch.tensor(np.concatenate([q.entropy for q in sequences]), requires_grad=True)
    output = policy_loss_from_logprob(algorithm, logprob, entropy, batch)
    d_logprob, d_entropy = torch.autograd.grad(output.loss, (logprob, entropy), materialize_grads=True)
    # weights are stored in f32: 1e-7 is their rounding
    assert output.loss.item() == pytest.approx(loss, rel=2e-7, abs=1e-8)
    torch.testing.assert_close(d_logprob, torch.tensor(np.concatenate(by_logprob)), rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(d_entropy, torch.tensor(np.concatenate(by_entropy)), rtol=2e-7, atol=1e-9)
    assert np.abs(np.concatenate(by_logprob)).max() > 0


def test_grpo_of_one_prompt_by_hand() -> None:
    """Two completions of 2 tokens and 1, rewards 1 and 0, on policy: A = +-1/sqrt 2, loss 0, gradient -w A."""
    algorithm = presets.grpo(eps=0.0)
    advantage = algorithm.advantage(torch.tensor([1.0, 0.0]), torch.zeros(2).long())
    weight = algorithm.weighting(torch.tensor([2, 1]), torch.zeros(2).long())
    batch = TokenBatch(
        input_ids=torch.zeros(3).long(),
        position_ids=torch.tensor([0, 1, 0]),
        target=torch.zeros(3).long(),
        weight=weight[[0, 0, 1]],
        cu_seqlens=torch.tensor([0, 2, 3]).int(),
        max_seqlen=2,
        sequence=torch.arange(2),
        advantage=advantage[[0, 0, 1]],
    )
    logprob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    output = policy_loss_from_logprob(algorithm, logprob, torch.zeros(3), batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.0)
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([-0.25 / 2**0.5, -0.25 / 2**0.5, 0.5 / 2**0.5])


@pytest.mark.parametrize("make", [presets.grpo, presets.rloo, presets.gspo])
def test_no_kl_needs_no_reference(make) -> None:  # type: ignore[no-untyped-def]
    assert make().kl is None
    assert make(beta=0.1).kl is not None
