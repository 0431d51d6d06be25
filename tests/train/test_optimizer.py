from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastrl.train.optimizer import MasterAdamW


def two_layers(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_the_first_step_moves_every_weight_by_the_learning_rate_against_its_sign() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = MasterAdamW(model, weight_decay=0.5)
    model.weight.grad = torch.tensor([[3.0, -4.0]])
    norm = optimizer.step(0.1, max_grad_norm=0.0)
    assert norm == 5.0
    # AdamW's first step is lr * sign(g); decay takes 0.1 * 0.5 * 1 from each weight.
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1 - 0.1 - 0.05, 1 + 0.1 - 0.05]]))


def test_steps_equal_the_formula_in_float64() -> None:
    model = nn.Linear(3, 1, bias=False)
    w = model.weight.detach().double().clone()
    optimizer = MasterAdamW(model, betas=(0.8, 0.95), epsilon=1e-3, weight_decay=0.1)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 6):
        g = torch.tensor([[0.3 * t, -2.0, 5.0 - t]]).double()
        model.weight.grad = g.float()
        optimizer.step(0.01, max_grad_norm=1.5)
        g = g * min(1.0, 1.5 / (float(g.norm()) + 1e-6))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.01 * (m / (1 - 0.8**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-3) + 0.1 * w)
    torch.testing.assert_close(model.weight.detach().double(), w, atol=1e-6, rtol=1e-6)


def test_norms_and_biases_do_not_decay() -> None:
    model = two_layers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    MasterAdamW(model, weight_decay=0.5).step(0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.ndim == 2 else 1.0))


def test_updates_too_small_for_bfloat16_accumulate_in_the_master_weights() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    optimizer = MasterAdamW(model)
    for step in range(1, 3001):
        (model.weight * 2).sum().backward()
        optimizer.step(1e-6)
        optimizer.zero_grad()
        if step == 1000:
            assert model.weight.item() == 1.0  # 0.999 rounds to 1 in bfloat16, whose next value is 0.99609375
    assert model.weight.item() == 0.99609375  # the master is at 0.997
    assert optimizer.state_dict()["master.weight"].item() == pytest.approx(
        0.997, abs=1e-4
    )  # float32 rounds each step too


def test_micro_batches_of_a_bfloat16_model_accumulate_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = MasterAdamW(model)
    for slope in (1.0, *[2.0**-9] * 4):  # each too small to change 1 in bfloat16
        (model.weight * slope).sum().backward()
    assert optimizer.gradients()["weight"].item() == 1.0 + 4 * 2.0**-9
    assert model.weight.grad is None


def test_tied_weights_are_one_parameter_and_frozen_ones_are_none() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "frozen": nn.Linear(2, 2)})
    model["head"].weight = model["embed"].weight
    model["frozen"].requires_grad_(False)
    optimizer = MasterAdamW(model)
    model["head"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    assert list(optimizer.gradients()) == ["embed.weight"]
    assert list(optimizer.state_dict()) == ["master.embed.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_bit_for_bit(dtype: torch.dtype) -> None:
    def train(model: nn.Module, optimizer: MasterAdamW, steps: int) -> None:
        for _ in range(steps):
            model(inputs(dtype)).square().sum().backward()
            optimizer.step(1e-3, max_grad_norm=1.0)
            optimizer.zero_grad()

    whole = two_layers(dtype)
    optimizer = MasterAdamW(whole, weight_decay=0.1)
    train(whole, optimizer, 3)
    saved = {name: value.clone() for name, value in optimizer.state_dict().items()}
    train(whole, optimizer, 3)

    resumed = two_layers(dtype, seed=9)  # other weights: the state must bring them
    restored = MasterAdamW(resumed, weight_decay=0.1)
    restored.load_state_dict(saved)
    train(resumed, restored, 3)
    for expected, got in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got)
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])


def test_the_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = two_layers()
    optimizer = MasterAdamW(model)
    before = [p.detach().clone() for p in model.parameters()]
    good = {name: value + 1 for name, value in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match=r"has master\.3\.weight, which this model does not train"):
        optimizer.load_state_dict(good | {"master.3.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"master\.2\.bias of the optimizer state must be \[2\], got \[3\]"):
        optimizer.load_state_dict(good | {"master.2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"incomplete for 2\.bias"):
        optimizer.load_state_dict({name: value for name, value in good.items() if name != "master.2.bias"})
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_nothing_to_train_and_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        MasterAdamW(two_layers().requires_grad_(False))
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float16; train in float32 or bfloat16"):
        MasterAdamW(two_layers(torch.float16))
