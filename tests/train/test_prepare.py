"""Weights, dropped sequences and old log-probabilities of a round; `test_update.py` follows them to the gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastrl.algorithms import presets
from fastrl.losses.kl import KL, k1
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.train import logprob as logprob_module
from fastrl.train.config import KernelsBlock
from fastrl.train.prepare import cut_into_steps, needs_every_token, prepare
from tests.algorithms.algorithms import NAMED
from tests.train.rounds import GROUP, KERNELS, LENGTH, REWARD, TEMPERATURE, make_model, make_rollouts, make_step

EVERYONE = torch.ones(len(LENGTH), dtype=torch.bool)
TRUNCATED = torch.tensor([rollout.finish_reason != "length" for rollout in make_rollouts()])


def weights(step: Any) -> list[float]:
    return [float(each.weight.sum()) for each in step.sequences]


def test_a_completion_without_verdict_leaves_loss_and_denominator() -> None:
    step = make_step(presets.dapo())
    trained = [sum(each.weight != 0) for each in step.sequences]
    # Group 2 has no signal; 5 has no verdict. 2 and 7 hold tool output: 5 of 8 and 3 of 5 tokens were sampled.
    assert trained == [5, 3, 5, 4, 1, 7, 2]
    everyone_judged = 5 + 3 + 5 + 4 + 1 + (2 + 3 + 3) + 7 + 2
    assert [float(each.weight.max()) for each in step.sequences] == pytest.approx([1 / everyone_judged] * 7)


@pytest.mark.parametrize(("keep", "denominator"), [(True, 10), (False, 9)])
def test_a_truncated_completion_leaves_the_loss_and_the_denominator_as_asked(keep: bool, denominator: int) -> None:
    step = make_step(presets.grpo(), is_kept=TRUNCATED, keep_denominator=keep)
    assert weights(step) == pytest.approx([1 / denominator] * 6)
    assert step.n_sequences == 11


def test_a_round_is_cut_into_steps_of_equal_size_that_each_weigh_one() -> None:
    algorithm = presets.gspo()
    rollouts = make_rollouts()
    cut = cut_into_steps(
        algorithm,
        rollouts,
        torch.arange(1.0, 12.0),
        GROUP,
        is_judged=EVERYONE,
        is_kept=EVERYONE,
        keep_denominator=False,
        steps=3,
    )
    assert [step.n_sequences for step in cut] == [4, 4, 3]
    assert [sum(weights(step)) for step in cut] == pytest.approx([1.0, 1.0, 1.0])
    ids = [list(each.ids) for step in cut for each in step.sequences]
    assert ids == [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
    assert sum(step.n_tokens for step in cut) == sum(map(len, ids))


def test_a_round_with_fewer_completions_than_steps_makes_fewer_steps_and_an_empty_one_makes_an_empty_step() -> None:
    def steps_of(n: int) -> list[int]:
        cut = cut_into_steps(
            presets.grpo(),
            make_rollouts()[:n],
            torch.ones(n),
            GROUP[:n],
            is_judged=EVERYONE[:n],
            is_kept=EVERYONE[:n],
            keep_denominator=False,
            steps=4,
        )
        return [len(step.sequences) for step in cut]

    assert steps_of(2) == [1, 1]
    assert steps_of(0) == [0]


@pytest.mark.parametrize("name", NAMED)
def test_only_what_spreads_over_the_step_needs_every_token(name: str) -> None:
    in_reward = ("rloo_with_kl", "reinforce_pp", "ppo", "openrlhf")
    assert needs_every_token(NAMED[name][0]) == (name in in_reward)


class Passes:
    """Counts forward passes of a model's backbone."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.base_model.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def passes(algorithm: Any, *, needs_old: bool) -> tuple[int, int]:
    model, reference = make_model(), make_model(seed=1)
    counted = Passes(model), Passes(reference)
    prepare(
        algorithm,
        make_step(algorithm),
        model=model,
        reference=reference,
        temperature=TEMPERATURE,
        token_budget=4096,
        kernels=KERNELS,
        needs_old=needs_old,
    )
    return counted[0].count, counted[1].count


def test_one_update_without_a_reference_costs_no_pass() -> None:
    assert passes(presets.grpo(), needs_old=False) == (0, 0)


def test_passes_happen_where_the_loss_needs_their_numbers() -> None:
    in_reward = presets.rloo(beta=0.1)
    assert in_reward.kl == KL(k1, 0.1, "reward")
    assert passes(presets.grpo(), needs_old=True) == (1, 0)
    assert passes(presets.grpo(beta=0.1), needs_old=False) == (0, 1)
    assert passes(presets.grpo(beta=0.1), needs_old=True) == (1, 1)
    assert passes(in_reward, needs_old=False) == (1, 1)
    assert passes(in_reward, needs_old=True) == (1, 1)


def test_old_and_reference_log_probabilities_are_the_models_at_the_sampling_temperature() -> None:
    algorithm = presets.grpo(beta=0.1)
    model, reference = make_model(), make_model(seed=1)
    (batch,) = prepare(
        algorithm,
        make_step(algorithm),
        model=model,
        reference=reference,
        temperature=TEMPERATURE,
        token_budget=4096,
        kernels=KERNELS,
        needs_old=True,
    )
    for column, source in ((batch.old_logprob, model), (batch.ref_logprob, reference)):
        assert column is not None
        for s, start in enumerate(batch.cu_seqlens[:-1].tolist()):
            here = slice(start, int(batch.cu_seqlens[s + 1]))
            logits = source(input_ids=batch.input_ids[None, here]).logits[0]
            logp = (logits / TEMPERATURE).log_softmax(-1).gather(1, batch.target[here, None])[:, 0]
            expected = torch.where(batch.weight[here] != 0, logp, 0.0).float()
            torch.testing.assert_close(column[here], expected, rtol=1e-5, atol=1e-6)


def test_a_kl_in_the_reward_is_a_return_to_go_on_top_of_the_advantage() -> None:
    """gamma 1: A[t] = A - beta * (sum of log p - log p_ref over the sampled tokens from t on)."""
    algorithm = presets.rloo(beta=0.5)
    (batch,) = prepare(
        algorithm,
        make_step(algorithm),
        model=make_model(),
        reference=make_model(seed=1),
        temperature=TEMPERATURE,
        token_budget=4096,
        kernels=KERNELS,
        needs_old=True,
    )
    assert batch.old_logprob is not None
    assert batch.ref_logprob is not None
    assert batch.advantage is not None
    raw = algorithm.advantage(REWARD, GROUP)
    kept = [s for s in range(len(LENGTH)) if REWARD[s].isfinite()]
    for place, index in enumerate(batch.sequence.tolist()):
        here = slice(int(batch.cu_seqlens[place]), int(batch.cu_seqlens[place + 1]))
        trained = batch.weight[here] != 0
        kl = torch.where(trained, batch.old_logprob[here] - batch.ref_logprob[here], 0.0)
        to_go = kl.flip(0).cumsum(0).flip(0)
        expected = torch.where(trained, raw[kept[index]] - 0.5 * to_go, 0.0)
        torch.testing.assert_close(batch.advantage[here], expected, rtol=1e-4, atol=1e-5)


def test_low_entropy_tokens_lose_their_advantage_and_keep_their_weight() -> None:
    algorithm = replace(presets.grpo(), entropy_quantile=0.25)
    batches = prepare(
        algorithm,
        make_step(algorithm),
        model=make_model(),
        reference=None,
        temperature=TEMPERATURE,
        token_budget=16,
        kernels=KERNELS,
        needs_old=False,
    )
    plain = make_step(presets.grpo())
    assert len(batches) > 1
    trained = torch.cat([batch.weight != 0 for batch in batches])
    pushed = torch.cat([batch.advantage != 0 for batch in batches])  # type: ignore[misc]
    assert int(trained.sum()) > sum(int((each.weight != 0).sum()) for each in plain.sequences)
    assert 0 < int(pushed.sum()) <= round(0.25 * int(trained.sum())) + 1
    assert all(batch.old_logprob is None for batch in batches)


@pytest.mark.parametrize("needs_old", [True, False])
def test_passes_without_gradient_use_the_backend_and_chunks_of_the_run(
    needs_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, object]] = []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append((options["backend"], options["chunk_rows"]))
        return linear_logprob(*args, **options)

    monkeypatch.setattr(logprob_module, "linear_logprob", spy)
    algorithm = presets.grpo(beta=0.1)
    prepare(
        algorithm,
        make_step(algorithm),
        model=make_model(),
        reference=make_model(seed=1),
        temperature=TEMPERATURE,
        token_budget=4096,
        kernels=KernelsBlock(backend="torch", chunk_rows=3),
        needs_old=needs_old,
    )
    assert asked == [("torch", 3)] * (2 if needs_old else 1)
