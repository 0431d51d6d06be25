"""From rewards to gradients through a real model: packing, order, accumulation and dropping change nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import pytest
import torch

from fastrl.algorithms import policy_loss_from_logprob, presets
from fastrl.data.pack import TokenSequence, pack, unpack
from fastrl.train import prepare as prepare_module
from fastrl.train.config import KernelsBlock
from fastrl.train.guards import NonFiniteError
from fastrl.train.model import model_head
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prepare import StepSequences, trained_stats
from fastrl.train.sequences import supervised_sequence
from fastrl.train.update import mean_loss, policy_batch_loss, supervised_batch_loss, update
from tests.algorithms.algorithms import NAMED
from tests.train.rounds import CONFIG, KERNELS, VOCABULARY, assert_same_learning, learned, make_model, make_step


def shuffled(step: StepSequences) -> StepSequences:
    return replace(step, sequences=random.Random(1).sample(step.sequences, len(step.sequences)))


@pytest.mark.parametrize("needs_old", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_packing_order_accumulation_and_chunks_change_no_gradient(
    name: str, needs_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = NAMED[name][0]
    step = make_step(algorithm)
    run = partial(learned, monkeypatch, algorithm, needs_old=needs_old)
    whole = run(step)
    assert len(whole.batches) == 1
    assert whole.metrics["grad_norm"] > 1e-3
    tight = run(step, token_budget=max(len(each.ids) for each in step.sequences) - 1)
    assert len(tight.batches) >= 4
    assert_same_learning(tight, whole)
    mixed = run(shuffled(step), token_budget=24, kernels=KernelsBlock(chunk_rows=5))
    assert 1 < len(mixed.batches) < len(tight.batches)
    assert_same_learning(mixed, whole)


@pytest.mark.parametrize("name", ["grpo_with_kl", "trl", "open_instruct", "reinforce_pp"])
def test_float32_gives_the_same_gradients_to_its_own_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = NAMED[name][0]
    step = make_step(algorithm)
    exact = learned(monkeypatch, algorithm, step)
    single = learned(monkeypatch, algorithm, shuffled(step), token_budget=24, dtype=torch.float32)
    for gradient_name, gradient in exact.gradients.items():
        error = (single.gradients[gradient_name].double() - gradient).norm() / gradient.norm()
        assert error < 1e-4, (gradient_name, error)


@pytest.mark.parametrize("name", NAMED)
def test_sequences_without_signal_are_dropped_and_the_gradients_stay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = NAMED[name][0]
    dropped = make_step(algorithm)
    monkeypatch.setattr(prepare_module, "needs_every_token", lambda _: True)
    kept = make_step(algorithm)
    # Group 2 has equal rewards; sequence 5 has no verdict and leaves in any case.
    is_dropping = algorithm.kl is None and algorithm.advantage is not NAMED["ppo"][0].advantage
    assert len(kept.sequences) == 10
    assert len(dropped.sequences) == (7 if is_dropping else 10)
    assert dropped.n_sequences == kept.n_sequences == 11
    monkeypatch.undo()
    full, part = learned(monkeypatch, algorithm, kept), learned(monkeypatch, algorithm, dropped)
    torch.testing.assert_close(part.metrics["loss"], full.metrics["loss"], rtol=1e-6, atol=1e-9)
    for parameter, gradient in full.gradients.items():
        torch.testing.assert_close(part.gradients[parameter], gradient, rtol=1e-6, atol=1e-9)


def test_sequences_without_signal_are_dropped_and_the_loss_stays_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = presets.dapo()
    model = make_model(dtype=torch.float32)
    dropped = make_step(algorithm)
    monkeypatch.setattr(prepare_module, "needs_every_token", lambda _: True)
    kept = make_step(algorithm)
    (whole,) = pack(kept.sequences, token_budget=4096)
    (part,) = pack(dropped.sequences, token_budget=4096)
    logprob, entropy = trained_stats(model, model_head(model, temperature=0.8), whole, KERNELS)
    assert whole.advantage is not None
    has_signal = [bool(piece.any()) for piece in unpack(whole.advantage, whole)]
    columns = [torch.cat(list(compress(unpack(x, whole), has_signal))) for x in (logprob, entropy)]
    assert len(columns[0]) == len(part.weight) < len(whole.weight)
    assert torch.equal(
        policy_loss_from_logprob(algorithm, logprob, entropy, whole).loss,
        policy_loss_from_logprob(algorithm, columns[0], columns[1], part).loss,
    )


def test_the_normaliser_counts_what_was_dropped() -> None:
    step = make_step(presets.grpo())
    # Ten completions have a verdict; the three of group 2 have no signal, and still count.
    weights = sorted(float(each.weight.sum()) for each in step.sequences)  # type: ignore[union-attr]
    assert weights == pytest.approx([1 / 10] * 7)


def test_without_a_micro_batch_nothing_moves() -> None:
    model = make_model(dtype=torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = MasterAdamW(model, weight_decay=0.1)
    metrics = update(
        optimizer,
        supervised_batch_loss(model, KERNELS, label_smoothing=0.0),
        [],
        CONFIG,
        lr=1.0,
        step=1,
    )
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1.0, "skipped_step": 1.0}
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(name.startswith("exp_avg") for name in optimizer.state_dict())


def rows(n: int) -> list[tuple[list[int], list[bool]]]:
    """Ragged rows of 2 to 9 tokens, of which a ragged part trains."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(n):
        length = 2 + (5 * i) % 8
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        start = 1 + i % (length - 1)
        found.append((ids, [t >= start for t in range(length)]))
    return found


def by_hand(model: Any, smoothing: float) -> torch.Tensor:
    """Mean over trained tokens of -(1 - a) log p[target] - a mean_v log p[v], one row at a time, no packing."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, is_trained in rows(9):
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if is_trained[t]:
                total = total - (1 - smoothing) * logp[t - 1, ids[t]] - smoothing * logp[t - 1].mean()
                count += 1
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("token_budget", [8, 13, 4096])
def test_the_supervised_loss_is_the_mean_over_trained_tokens_under_any_split(
    smoothing: float, token_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    expected = by_hand(model, smoothing)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    count = sum(sum(is_trained) for _, is_trained in rows(9))
    sequences = [supervised_sequence(ids, is_trained, weight=1 / count) for ids, is_trained in rows(9)]
    batches = pack(sequences, token_budget=token_budget)
    assert (len(batches) == 1) == (token_budget == 4096)
    batch_loss = supervised_batch_loss(model, KERNELS, label_smoothing=smoothing)
    assert mean_loss(batch_loss, batches)["loss"] == pytest.approx(expected.item(), rel=1e-6)
    optimizer = MasterAdamW(model)
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    metrics = update(optimizer, batch_loss, batches, CONFIG, lr=0.0, step=1)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for got, want in zip(optimizer.gradients().values(), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("policy", ["skip", "halt"])
def test_a_gradient_that_is_not_finite_moves_nothing(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(dtype=torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    batches = pack([supervised_sequence([1, 2, 3], [False, True, True], weight=0.5)], token_budget=8)
    run = partial(
        update,
        MasterAdamW(model),
        supervised_batch_loss(model, KERNELS, label_smoothing=0.0),
        batches,
        replace(CONFIG, on_nonfinite=policy),
        lr=1.0,
        step=7,
    )
    if policy == "halt":
        with pytest.raises(NonFiniteError, match="step 7: the gradient of"):
            run()
    else:
        assert run()["skipped_step"] == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_temperature_divides_the_logits_of_the_loss() -> None:
    model = make_model()
    ids = [3, 1, 4, 1, 5]
    step = TokenSequence(ids, [0.0] + [0.25] * 4, advantage=[1.0] * 5, sampler_logprob=[0.0] * 5)
    logp = (model(input_ids=torch.tensor([ids])).logits[0, :4] / 0.5).log_softmax(-1)
    loss = policy_batch_loss(model, presets.grpo(), KERNELS, temperature=0.5)
    entropy = mean_loss(loss, pack([step], token_budget=8))["entropy"]
    assert entropy == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-6)
