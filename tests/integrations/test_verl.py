"""verl's names against logits in float64, its averaging by a stand-in, and a vocabulary on two ranks."""

from __future__ import annotations

import os
import socket
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from fastrl.integrations import verl

N, D, V = 7, 6, 20


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (1, N))


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (hidden[0] @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, labels[0][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(outputs: tuple[Tensor, ...], *leaves: Tensor) -> tuple[Tensor, ...]:
    upstream = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in outputs]
    return torch.autograd.grad(outputs, leaves, upstream)


def test_linear_cross_entropy_is_logprob_and_entropy_of_the_logits() -> None:
    hidden, weight, labels = inputs()
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    got, expected = verl.linear_cross_entropy(hidden, weight, labels, 1.5), by_hand(*exact, labels, 1.5)
    for one, other in zip(
        (*got, *gradients(got, hidden, weight)), (*expected, *gradients(expected, *exact)), strict=True
    ):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_reductions_are_of_the_log_probabilities() -> None:
    hidden, weight, labels = inputs()
    logprob, entropy = verl.linear_cross_entropy(hidden, weight, labels)
    for name, expected in (("sum", logprob.sum()), ("mean", logprob.mean())):
        got = verl.linear_cross_entropy(hidden, weight, labels, 1.0, name)
        torch.testing.assert_close(got, (expected, entropy))
    with pytest.raises(ValueError, match="reduction must be"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")


@pytest.mark.parametrize("shape", [(1, N), (N,)])
def test_fused_linear_for_ppo_keeps_shape_and_dtype(shape: tuple[int, ...]) -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    logprob, entropy = verl.FusedLinearForPPO(chunk_size=3)(
        hidden.reshape(*shape, D), weight, labels.reshape(shape).int(), temperature=0.7
    )
    assert logprob.shape == entropy.shape == shape
    assert logprob.dtype == entropy.dtype == torch.bfloat16
    expected = by_hand(hidden.double(), weight.double(), labels, 0.7)
    torch.testing.assert_close(logprob.flatten().double(), expected[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(entropy.flatten().double(), expected[1], rtol=1e-2, atol=1e-2)


class Config(SimpleNamespace):
    """What the losses read of verl's ActorConfig."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def config(**changes: Any) -> Config:
    numbers = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, "global_batch_info": {"dp_size": 2}}
    return Config(**numbers | changes)


def token_mean(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, dp_size: int) -> Tensor:
    assert loss_agg_mode == "token-mean"
    return (loss_mat * loss_mask).sum() / loss_mask.sum() * dp_size


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    host = ModuleType("verl.trainer.ppo.core_algos")
    host.agg_loss = token_mean  # type: ignore[attr-defined]
    host.register_policy_loss = lambda name: lambda function: found.__setitem__(name, function)  # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    verl.register()
    return found


def test_every_surrogate_is_registered(registry: dict[str, Any]) -> None:
    assert list(registry) == ["fastrl_clipped", "fastrl_cispo", "fastrl_sapo", "fastrl_reinforce"]


def test_clipped_is_verls_vanilla_loss(registry: dict[str, Any]) -> None:
    # ratios e^0.5 = 1.6487 over the clip 1.28, 1, and 10 whose negative advantage meets the dual clip 3
    log_prob = torch.tensor([[0.5, 0.0, 2.302585]], requires_grad=True)
    advantage, mask = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    loss, metrics = registry["fastrl_clipped"](torch.zeros(1, 3), log_prob, advantage, mask, config=config())
    torch.testing.assert_close(loss, torch.tensor((-1.28 - 2.0 + 3.0) / 3 * 2))
    loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([[0.0, -2.0 / 3 * 2, 0.0]]))
    assert metrics["actor/ppo_kl"] == pytest.approx(-(0.5 + 2.302585) / 3)


def test_the_samplers_weights_multiply_and_masked_tokens_count_nothing(registry: dict[str, Any]) -> None:
    log_prob, advantage = torch.zeros(1, 3), torch.ones(1, 3)
    weights, mask = torch.tensor([[0.5, 2.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    arguments = (torch.zeros(1, 3), log_prob, advantage, mask, "token-mean", config(), weights)
    assert registry["fastrl_clipped"](*arguments)[0] == pytest.approx(-(0.5 + 2.0) / 2 * 2)
    assert registry["fastrl_reinforce"](*arguments)[0] == 0


def test_a_loss_without_the_actors_config_or_with_a_wrong_dual_clip_is_refused(registry: dict[str, Any]) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="needs the actor's config"):
        registry["fastrl_sapo"](x, x, x, x)
    with pytest.raises(ValueError, match="clip_ratio_c"):
        registry["fastrl_clipped"](x, x, x, x, config=config(clip_ratio_c=0.5))


def on_a_rank(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    hidden, weight, labels = inputs(torch.float64)
    part = weight.detach()[rank * V // 2 : (rank + 1) * V // 2].clone().requires_grad_()
    got = verl.linear_cross_entropy(hidden, part, labels, 0.7, "none", dist.group.WORLD)
    d_hidden, d_part = gradients(got, hidden, part)
    dist.all_reduce(d_hidden)  # as verl's models do outside its kernel
    expected = by_hand(hidden, weight, labels, 0.7)
    whole_hidden, whole_weight = gradients(expected, hidden, weight)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(d_hidden, whole_hidden)
    torch.testing.assert_close(d_part, whole_weight[rank * V // 2 : (rank + 1) * V // 2])
    dist.destroy_process_group()


def test_two_ranks_with_half_a_vocabulary_each_add_up_as_verls_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_a_rank, (port,), nprocs=2)


def test_without_verl_register_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"needs verl.*pip install verl"):
        verl.register()


def test_a_reduction_may_be_in_capitals() -> None:
    hidden, weight, labels = inputs(torch.float32)
    mean = verl.linear_cross_entropy(hidden, weight, labels, reduction="mean")[0]
    assert verl.linear_cross_entropy(hidden, weight, labels, reduction="MEAN")[0] == mean


@pytest.mark.parametrize("name", ["fastrl_clipped", "fastrl_cispo", "fastrl_sapo", "fastrl_reinforce"])
def test_nan_under_the_mask_reaches_nothing(name: str, registry: dict[str, Any]) -> None:
    log_prob = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    old, mask = torch.tensor([[-1.5, -2.0, float("nan")]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss, metrics = registry[name](old, log_prob, torch.ones(1, 3), mask, config=config())
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.isfinite().all()
    assert loss.isfinite()
    assert metrics["actor/ppo_kl"] == pytest.approx(-0.25)


@pytest.mark.parametrize("bounds", [{"clip_ratio_low": 0.1}, {}], ids=["a floor of its own", "clip_ratio"])
def test_cispo_holds_the_ratio_between_both_bounds(bounds: dict[str, float], registry: dict[str, Any]) -> None:
    # ratios e^-0.5 = 0.6065 under the floor, 1, and e^0.5 = 1.6487 over the cap of 1.28
    log_prob = torch.tensor([[-0.5, 0.0, 0.5]], requires_grad=True)
    x = torch.zeros(1, 3)
    loss, _ = registry["fastrl_cispo"](x, log_prob, torch.ones(1, 3), torch.ones(1, 3), config=config(**bounds))
    loss.backward()
    floor = 1 - bounds.get("clip_ratio_low", 0.2)
    torch.testing.assert_close(log_prob.grad, -torch.tensor([[floor, 1.0, 1.28]]) / 3 * 2)
