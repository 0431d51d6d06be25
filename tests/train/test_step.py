from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastrl.train.guards import NonFiniteError
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.step import optimizer_step

PARAMETERS = 12
BAD = [math.nan, math.inf, -math.inf]


def trained(dtype: torch.dtype) -> tuple[nn.Module, MasterAdamW]:
    """Twelve tensors after one good step, with the gradients of a second one waiting."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(PARAMETERS // 2)]).to(dtype)
    optimizer = MasterAdamW(model)
    x = torch.ones(2, 4, dtype=dtype)
    model(x).square().sum().backward()
    optimizer.step(1e-2)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    return model, optimizer


def snapshot(model: nn.Module, optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    weights = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    return weights | {name: value.clone() for name, value in optimizer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_in_any_gradient_skips_the_step_and_changes_no_bit(dtype: torch.dtype, bad: float) -> None:
    for place in range(PARAMETERS):
        model, optimizer = trained(dtype)
        before = snapshot(model, optimizer)
        name = list(optimizer.gradients())[place]
        optimizer.gradients()[name].view(-1)[-1] = bad
        result = optimizer_step(optimizer, torch.tensor(1.0), lr=1e-2, max_grad_norm=1.0, on_nonfinite="skip", step=7)
        assert result.skipped is not None
        assert f"the gradient of {name} has 1 of" in result.skipped
        after = snapshot(model, optimizer)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert optimizer.gradients() == {}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_halts_with_the_step_and_the_cause(bad: float) -> None:
    model, optimizer = trained(torch.float32)
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=rf"step 7: the loss is {bad}"):
        optimizer_step(optimizer, torch.tensor(bad), lr=1e-2, max_grad_norm=1.0, on_nonfinite="halt", step=7)
    after = snapshot(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_overflowing_norm_of_finite_gradients_is_called_that() -> None:
    _, optimizer = trained(torch.float32)
    for gradient in optimizer.gradients().values():
        gradient.fill_(3e38)
    result = optimizer_step(optimizer, torch.tensor(1.0), lr=1e-2, max_grad_norm=1.0, on_nonfinite="skip", step=0)
    assert result.skipped is not None
    assert "overflows" in result.skipped


def test_a_good_step_moves_the_weights_and_forgets_the_gradients() -> None:
    model, optimizer = trained(torch.float32)
    before = snapshot(model, optimizer)
    norm = optimizer.grad_norm()
    result = optimizer_step(optimizer, torch.tensor(1.0), lr=1e-2, max_grad_norm=1.0, on_nonfinite="halt", step=0)
    assert result.skipped is None
    assert torch.equal(result.grad_norm, norm)
    assert not torch.equal(before["model.0.weight"], model.state_dict()["0.weight"])
    assert optimizer.gradients() == {}
