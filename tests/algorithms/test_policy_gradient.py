from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrl.algorithms import (
    PolicyGradient,
    has_signal,
    is_sequence_coupled,
    parity,
    policy_loss,
    policy_loss_from_logprob,
    presets,
    token_advantage,
)
from fastrl.losses import KL, binary_tv, clipped, k1, k2, k3, mask, raw, sequence_mask, token_mean, truncate
from fastrl.types import TokenBatch
from tests import oracle
from tests.algorithms.algorithms import NAMED
from tests.algorithms.steps import GROUP, LENGTH, REWARD, columns, make_head, make_step, oracle_step, pack

EVERYTHING = list(range(len(LENGTH)))


def row(
    ratio: list[float],
    advantage: list[float],
    *,
    weight: list[float] | None = None,
    sampler: list[float] | None = None,
    ref: list[float] | None = None,
) -> tuple[Tensor, TokenBatch]:
    """One sequence whose old log-probabilities are -1 and whose ratios are given."""
    n = len(ratio)

    def column(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    batch = TokenBatch(
        input_ids=torch.zeros(n).long(),
        position_ids=torch.arange(n),
        target=torch.zeros(n).long(),
        weight=torch.tensor(weight or [1 / n] * n),
        cu_seqlens=torch.tensor([0, n]).int(),
        max_seqlen=n,
        sequence=torch.zeros(1).long(),
        advantage=column(advantage),
        old_logprob=torch.full((n,), -1.0, dtype=torch.float64),
        sampler_logprob=column(sampler),
        ref_logprob=column(ref),
    )
    return torch.tensor(ratio, dtype=torch.float64).log() - 1, batch


def loss_of(algorithm: PolicyGradient, logprob: Tensor, batch: TokenBatch) -> float:
    return policy_loss_from_logprob(algorithm, logprob, torch.zeros_like(logprob), batch).loss.item()


PPO = PolicyGradient(raw, clipped, token_mean)


def test_the_loss_is_the_weighted_sum_of_the_surrogate() -> None:
    logprob, batch = row([1.0, 2.0, 0.5], [1.0, 1.0, -1.0], weight=[0.5, 0.25, 0.25])
    assert loss_of(PPO, logprob, batch) == pytest.approx(-0.5 - 0.25 * 1.2 + 0.25 * 0.8)


def test_a_correction_multiplies_after_the_clip_and_before_the_kl() -> None:
    """r = 2 is clipped to 1.2, times the weight min(e^0.5, 1.5) = 1.5, plus 0.1 k1 = 0.1 (log 2 - 1 + 3)."""
    algorithm = replace(PPO, correction=partial(truncate, high=1.5), kl=KL(k1, 0.1))
    logprob, batch = row([2.0], [1.0], sampler=[-1.5], ref=[-3.0])
    assert loss_of(algorithm, logprob, batch) == pytest.approx(-1.2 * 1.5 + 0.1 * (math.log(2) - 1 + 3))


def test_the_correction_compares_the_old_policy_with_the_sampler_not_the_new_one() -> None:
    algorithm = replace(PPO, correction=partial(mask, low=0.5, high=2.0))
    logprob, batch = row([1.1], [1.0], sampler=[-1.0])
    assert loss_of(algorithm, logprob, batch) == pytest.approx(-1.1)


def test_the_entropy_bonus_lowers_the_loss() -> None:
    logprob, batch = row([1.0, 1.0], [0.0, 0.0])
    entropy = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
    loss = policy_loss_from_logprob(replace(PPO, entropy_coef=0.1), logprob, entropy, batch).loss
    assert loss.item() == pytest.approx(-0.3)
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.05, -0.05])


def test_numbers_on_untrained_tokens_are_never_read() -> None:
    nan = float("nan")
    algorithm = replace(PPO, correction=truncate, kl=KL(k3, 0.1), entropy_coef=0.1, trust_region=binary_tv)
    logprob, batch = row([1.0, nan], [1.0, nan], weight=[1.0, 0.0], sampler=[-1.0, nan], ref=[-1.0, nan])
    logprob.requires_grad_()
    output = policy_loss_from_logprob(algorithm, logprob, torch.tensor([0.5, nan]).double(), batch)
    (gradient,) = torch.autograd.grad(output.loss, logprob)
    assert output.loss.item() == pytest.approx(-1.0 - 0.05)
    assert gradient.tolist() == [-1.0, 0.0]
    assert all(values.isfinite().all() and values[1] == 0 for values in output.metrics.values())


def test_metrics_say_where_the_clip_bound_and_on_which_side() -> None:
    logprob, batch = row([0.5, 0.5, 1.5, 1.5, 1.0, 9.0], [-1.0, 1.0, 1.0, -1.0, 1.0, -1.0], sampler=[-1.0] * 6)
    algorithm = replace(PPO, surrogate=partial(clipped, dual_clip=3.0))
    metrics = policy_loss_from_logprob(algorithm, logprob, torch.ones(6).double(), batch).metrics
    assert metrics["clip_ratio/low_mean"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["clip_ratio/high_mean"].tolist() == [0, 0, 1, 0, 0, 0]
    assert metrics["clip_ratio/region_mean"].tolist() == [1, 0, 1, 0, 0, 1]  # the last one by the dual clip
    assert metrics["ratio"].tolist() == pytest.approx([0.5, 0.5, 1.5, 1.5, 1.0, 9.0])
    assert metrics["approx_kl"].tolist() == pytest.approx([r - 1 - math.log(r) for r in (0.5, 0.5, 1.5, 1.5, 1, 9)])
    assert metrics["entropy"].tolist() == [1.0] * 6
    assert "kl" not in metrics


def test_metrics_report_the_weight_that_was_applied() -> None:
    logprob, batch = row([1.0, 1.0], [1.0, 1.0], sampler=[-2.0, -0.5], ref=[-1.0, -1.0])
    metrics = policy_loss_from_logprob(
        replace(PPO, correction=partial(truncate, high=2.0)), logprob, torch.ones(2).double(), batch
    ).metrics
    assert metrics["sampling/importance_sampling_ratio/mean"].tolist() == pytest.approx([2.0, math.exp(-0.5)])
    assert metrics["sampling/sampling_logp_difference/mean"].tolist() == pytest.approx([1.0, 0.5])
    assert metrics["kl"].tolist() == [0.0, 0.0]
    assert not any(values.requires_grad for values in metrics.values())


def test_a_token_outside_the_trust_region_counts_as_clipped() -> None:
    logprob, batch = row([2.0, 1.0], [1.0, 1.0])  # probability e^-1 = 0.37 becomes 0.74
    algorithm = presets.dppo()
    output = policy_loss_from_logprob(algorithm, logprob, torch.ones(2).double(), batch)
    assert output.metrics["clip_ratio/region_mean"].tolist() == [1, 0]
    assert output.metrics["clip_ratio/high_mean"].tolist() == [1, 0]
    assert output.loss.item() == 0  # the first is masked, the second's log-ratio is 0


def test_a_sequence_is_coupled_only_while_something_about_it_is_unknown() -> None:
    _, batch = row([1.0], [1.0], sampler=[-1.0])
    fresh = replace(batch, old_logprob=None)
    table = {
        "token": (presets.grpo(), False, False),
        "limited token ratio": (parity.verl(), False, False),
        "sequence ratio": (presets.gspo(), True, False),
        "token correction": (replace(PPO, correction=partial(truncate, high=2.0)), False, False),
        "sequence correction": (replace(PPO, correction=partial(sequence_mask, high=3.0)), False, True),
        "unknown ratio": (replace(PPO, ratio=lambda log_ratio, sequence, trained: log_ratio), True, False),
    }
    for name, (algorithm, with_old, without_old) in table.items():
        assert is_sequence_coupled(algorithm, batch) is with_old, name
        assert is_sequence_coupled(algorithm, fresh) is without_old, name


def test_zero_advantage_is_no_signal_unless_something_else_pulls() -> None:
    advantage = torch.tensor([0.0, -0.5, float("nan")])
    assert has_signal(PPO, advantage).tolist() == [False, True, True]
    assert has_signal(replace(PPO, kl=KL(k3, 0.0)), advantage).tolist() == [False, True, True]
    for pulls in ({"kl": KL(k3, 0.1)}, {"kl": KL(k1, 0.1, "reward")}, {"entropy_coef": 0.1}, {"whiten": True}):
        assert has_signal(replace(PPO, **pulls), advantage).tolist() == [True] * 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMED)
def test_token_advantages_are_the_papers(name: str) -> None:
    algorithm, spec = NAMED[name]
    step = make_step(make_head())
    expected = oracle.token_advantages(spec, oracle_step(step, make_head()), np.array(REWARD), GROUP)
    got, _ = columns(algorithm, step)
    torch.testing.assert_close(torch.cat(got), torch.tensor(np.concatenate(expected)), rtol=1e-10, atol=1e-12)


def test_a_kl_in_the_reward_without_its_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="kl"):
        token_advantage(presets.reinforce_pp(), torch.ones(1), torch.tensor([0, 2]), torch.ones(2).bool())


@pytest.mark.parametrize(
    ("algorithm", "column"),
    [(PPO, "advantage"), (presets.grpo(beta=0.1), "ref_logprob"), (parity.trl(), "sampler_logprob")],
)
def test_a_missing_column_is_named_with_the_remedy(algorithm: PolicyGradient, column: str) -> None:
    head = make_head()
    hidden, batch = pack(algorithm, make_step(head), EVERYTHING)
    with pytest.raises(ValueError, match=f"batch.{column}"):
        policy_loss(algorithm, hidden, head, replace(batch, **{column: None}))


def test_a_kl_in_the_reward_needs_no_reference_in_the_loss() -> None:
    head = make_head()
    hidden, batch = pack(presets.rloo(beta=0.1), make_step(head), EVERYTHING)
    policy_loss(presets.rloo(beta=0.1), hidden, head, replace(batch, ref_logprob=None))


def test_the_kl_gradient_can_be_another_estimators() -> None:
    head = make_head()
    step = make_step(head)
    algorithms = [replace(presets.grpo(), kl=kl) for kl in (KL(k3, 0.5, gradient=k2), KL(k3, 0.5), KL(k2, 0.5))]
    outputs = []
    for algorithm in algorithms:
        hidden, batch = pack(algorithm, step, EVERYTHING)
        output = policy_loss(algorithm, hidden, head, batch)
        outputs.append((output.loss.item(), torch.autograd.grad(output.loss, head.weight)[0]))
    assert outputs[0][0] == pytest.approx(outputs[1][0], rel=1e-12)
    torch.testing.assert_close(outputs[0][1], outputs[2][1], rtol=1e-11, atol=1e-13)


def test_a_certified_skip_reports_its_bound_and_an_exact_pass_has_none() -> None:
    head = make_head()
    algorithm = presets.dapo()
    hidden, batch = pack(algorithm, make_step(head), EVERYTHING)
    exact = policy_loss(algorithm, hidden, head, batch)
    skipping = policy_loss(algorithm, hidden, head, batch, skip_tolerance=0.3)
    assert "skipped_bound" not in exact.metrics
    bound = skipping.metrics["skipped_bound"]
    assert bound.shape == batch.weight.shape
    assert bound[0] > 0
    assert skipping.loss.item() == exact.loss.item()
    d_exact, d_skipping = (torch.autograd.grad(x.loss, hidden, retain_graph=True)[0] for x in (exact, skipping))
    assert 0 < (d_exact - d_skipping).abs().max() <= bound[0] * head.weight.abs().max()
