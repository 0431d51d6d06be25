"""TRL's head arguments over the waist, against plain autograd in float64; TRL itself is not needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.integrations.trl_head import FusedHead, HeadCall, TokenRule, head_call

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MAPS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0},
    "temperature and scale": {"temperature": 0.7, "final_logit_softcapping": None, "logit_scale": 0.5},
    "capped": {"temperature": 0.7, "final_logit_softcapping": 3.0, "logit_scale": 1.3},
}


def inputs(
    dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator).to(weight_dtype or dtype).requires_grad_()
    bias = torch.randn(53, generator=generator).to(weight_dtype or dtype).requires_grad_()
    target = torch.randint(0, 53, (37,), generator=generator)
    return hidden, weight, bias, target


def apply(
    head: FusedHead,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    outputs: tuple[str, ...] = ALL,
    **options: Any,
) -> tuple[Any, ...]:
    return head.apply(hidden, weight, bias, target, options.pop("temperature", 1.0), 32768, outputs=outputs, **options)


def truth(
    leaves: Sequence[Tensor],
    target: Tensor,
    temperature: float,
    final_logit_softcapping: float | None,
    logit_scale: float,
) -> tuple[Tensor, ...]:
    hidden, weight, bias = leaves
    z = (hidden.double() @ weight.double().T + bias.double()) * logit_scale
    if final_logit_softcapping is not None:
        z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
    logp = (z / temperature).log_softmax(-1)
    logprob = logp.gather(-1, target[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return logprob, entropy, (2 * logp).logsumexp(-1), (z / temperature).mean(-1), z.argmax(-1) == target


def grads(found: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    logprob, entropy, *_ = found
    rows = torch.linspace(-1, 2, len(logprob))
    return torch.autograd.grad((rows * logprob).sum() + (entropy**2).sum(), leaves)


@pytest.mark.parametrize("cache_gib", [None, 0.0])
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_five_outputs_and_three_gradients_are_those_of_float64(
    options: dict[str, Any], cache_gib: float | None
) -> None:
    hidden, weight, bias, target = inputs()
    found = apply(FusedHead(cache_gib=cache_gib), hidden, weight, bias, target, **options)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = truth(leaves, target, **options)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == (torch.bool if want.dtype == torch.bool else torch.float32)
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)
    assert [x.requires_grad for x in found] == [True, True, False, False, False]
    for got, want in zip(grads(found, (hidden, weight, bias)), grads(expected, leaves), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_outputs_nobody_asked_for_are_none() -> None:
    logprob, *others = apply(FusedHead(), *inputs(), outputs=("log_probs",))
    assert logprob.shape == (37,)
    assert others == [None] * 4


def test_the_first_of_equal_logits_is_the_top() -> None:
    hidden, weight, *_ = inputs()
    twice = torch.cat([weight[:26], weight[:26]]).detach()
    first = (hidden @ twice.T).argmax(-1)
    _, _, _, _, is_top = FusedHead().apply(hidden, twice, None, first, 1.0, 32768)
    _, _, _, _, is_second = FusedHead().apply(hidden, twice, None, (first + 26) % 52, 1.0, 32768)
    assert is_top is not None
    assert is_second is not None
    assert is_top.all()
    assert not is_second.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_to_float64_as_their_inputs_allow(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = inputs(dtype)
    found = apply(FusedHead(), hidden, weight, bias, target)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = truth(leaves, target, **MAPS["plain"])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-4)
    for got, want in zip(grads(found, (hidden, weight, bias)), grads(expected, leaves), strict=True):
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_autocast_rounds_the_operands_and_not_the_sum_of_the_weights_gradient() -> None:
    hidden, weight, bias, target = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(FusedHead(), hidden, weight, bias, target)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    leaf = bias.detach().double().requires_grad_()
    expected = truth([*rounded, leaf], target, **MAPS["plain"])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-4)
    got, want = grads(found, (hidden, weight)), grads(expected, rounded)
    assert [x.dtype for x in got] == [torch.float32, torch.float32]
    # Each term of the sum was rounded to bfloat16, which errs both ways; the sum was not.
    error = (got[1].double() - want[1]).abs().max() / want[1].abs().max()
    assert error < torch.finfo(torch.bfloat16).eps
    assert not torch.equal(got[1], got[1].bfloat16().float())


def test_a_second_backward_gives_the_same_gradient_under_autocast() -> None:
    hidden, weight, bias, target = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob = apply(FusedHead(), hidden, weight, bias, target)[0]
    first = torch.autograd.grad(logprob.sum(), weight, retain_graph=True)[0]
    second = torch.autograd.grad(logprob.sum(), weight)[0]
    assert torch.equal(first, second)


def test_a_weight_that_zero_3_cut_is_refused() -> None:
    hidden, weight, bias, target = inputs()
    cut: Any = weight
    cut.ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match="ZeRO-2"):
        apply(FusedHead(), hidden, weight, bias, target)


@pytest.mark.parametrize("cache_gib", [-1.0, math.inf, math.nan, "1", [1.0]])
def test_options_that_the_op_would_refuse_are_refused_at_once(cache_gib: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_gib must be a number of GiB.*, got "):
        FusedHead(cache_gib=cache_gib)


def test_a_call_scores_its_rows_only() -> None:
    hidden, weight, bias, target = inputs()
    scored = torch.arange(37) % 3 == 0
    plain = apply(FusedHead(), hidden, weight, bias, target)
    with head_call(HeadCall(scored)):
        found = apply(FusedHead(), hidden, weight, bias, target)
    for got, want in zip(found, plain, strict=True):
        torch.testing.assert_close(got, want.where(scored, torch.zeros_like(want)))
    rows = torch.linspace(-1, 2, 37).where(scored, 0)
    for got, want in zip(
        torch.autograd.grad((rows * found[0]).sum(), (hidden, weight, bias)),
        torch.autograd.grad((rows * plain[0]).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_call_with_a_rule_gives_the_loss_and_log_probabilities_cut_from_the_model() -> None:
    hidden, weight, bias, target = inputs()
    scored = torch.arange(37) % 3 != 0
    rows = torch.linspace(-1, 2, 37)
    of_scored = rows[scored]

    def rule(logprob: Tensor, entropy: Tensor, at: Tensor) -> Tensor:
        return of_scored[at] * logprob.exp() - 0.1 * entropy

    with head_call(HeadCall(scored, rule)) as call:
        logprob, entropy, *_ = apply(FusedHead(), hidden, weight, bias, target)
    plain = apply(FusedHead(), hidden, weight, bias, target)
    expected: Tensor = ((rows * plain[0].exp() - 0.1 * plain[1]) * scored).sum()
    torch.testing.assert_close(call.loss, expected)
    torch.testing.assert_close(logprob, plain[0].detach() * scored)
    # They are leaves of their own: what a loss built on them asks of them is compared with the rule's own gradient.
    assert all(x is None for x in torch.autograd.grad(logprob.sum(), (hidden, weight, bias), allow_unused=True))
    assert call.given is not None
    assert call.loss is not None
    of_logprob, of_entropy = torch.autograd.grad((3 * logprob).sum() + (2 * entropy).sum(), call.given)
    assert of_logprob.tolist() == [3.0] * int(scored.sum())
    assert of_entropy.tolist() == [2.0] * int(scored.sum())
    got = torch.autograd.grad(call.loss, (hidden, weight, bias))
    want = torch.autograd.grad(expected, (hidden, weight, bias))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_rows_that_trl_left_out_already_are_not_left_out_twice() -> None:
    hidden, weight, bias, target = inputs()
    scored = torch.arange(37) % 3 != 0
    with head_call(HeadCall(scored)):
        logprob, *_ = apply(FusedHead(), hidden[scored], weight, bias, target[scored])
    torch.testing.assert_close(logprob, apply(FusedHead(), hidden, weight, bias, target)[0][scored])


@pytest.mark.parametrize("rule", [None, lambda logprob, entropy, at: -logprob], ids=["log-probabilities", "rule"])
def test_nothing_scored_is_a_loss_of_zero_with_a_gradient(rule: TokenRule | None) -> None:
    hidden, weight, bias, target = inputs()
    with head_call(HeadCall(torch.zeros(37, dtype=torch.bool), rule)) as call:
        logprob, *_ = apply(FusedHead(), hidden, weight, bias, target)
    loss = logprob.sum() if rule is None else call.loss
    assert loss == 0
    assert loss is not None
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_a_call_that_no_head_served_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="patch"), head_call(HeadCall(torch.ones(3, dtype=torch.bool))):
        pass


def test_an_unknown_backend_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="backend must be one of reference"):
        FusedHead(backend="cuda")
