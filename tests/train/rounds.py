"""One round of rollouts with everything that goes wrong in real ones, for the whole way from rewards to gradients.

Ragged groups and lengths, tool output between sampled tokens, a truncated completion, a failed one, one without a
verdict, a group without signal, and a sampler that differs from the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastrl.algorithms import PolicyGradient
from fastrl.train import update as update_module
from fastrl.train.config import GRPOConfig, KernelsBlock
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prepare import StepSequences, prepare, step_sequences
from fastrl.train.step import StepResult
from fastrl.train.tiny import make_tiny_qwen3
from fastrl.train.update import policy_batch_loss, update
from fastrl.types import FinishReason, Rollout, TokenBatch

VOCABULARY = 17
NAN = float("nan")
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
REWARD = torch.tensor([1.0, 0.25, 0.0, 0.5, 2.0, NAN, 0.7, 0.7, 0.7, 1.5, -1.0])
LENGTH = (5, 3, 8, 4, 1, 6, 2, 5, 3, 7, 2)
PROMPT = (4, 2, 6, 3)
TEMPERATURE = 0.8
KERNELS = KernelsBlock()
CONFIG = GRPOConfig(model_name_or_path="", output_dir="", train_dataset="", max_grad_norm=0.0)


def make_rollouts() -> list[Rollout]:
    """Completion s has LENGTH[s] tokens; 2 and 7 hold tool output, 3 is truncated, 5 failed."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist())

    prompts = [ids(n) for n in PROMPT]
    finish: dict[int, FinishReason] = {3: "length", 5: "error"}
    return [
        Rollout(
            prompt_ids=prompts[int(GROUP[s])],
            completion_ids=ids(n),
            logprob=tuple((-2.8 + 0.2 * torch.randn(n, generator=generator)).tolist()),
            finish_reason=finish.get(s, "stop"),
            policy_version=0,
            is_sampled=tuple(t % 3 != 1 for t in range(n)) if s in (2, 7) else None,
        )
        for s, n in enumerate(LENGTH)
    ]


def make_model(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = make_tiny_qwen3(VOCABULARY, hidden_size=16, layers=2, intermediate_size=24, context=64, seed=seed).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, Qwen3RMSNorm):
                module.forward = partial(exact_norm, module)  # type: ignore[method-assign]
    return model  # type: ignore[no-any-return]


def exact_norm(module: Qwen3RMSNorm, x: Tensor) -> Tensor:
    """transformers' norm without its float32: sums that differ in order alone are then equal to 1e-15, not to 1e-7."""
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()  # type: ignore[no-any-return, operator]


def make_step(
    algorithm: PolicyGradient, *, is_kept: Tensor | None = None, keep_denominator: bool = False
) -> StepSequences:
    return step_sequences(
        algorithm,
        make_rollouts(),
        algorithm.advantage(REWARD, GROUP),
        GROUP,
        is_judged=REWARD.isfinite(),
        is_kept=torch.ones(len(LENGTH), dtype=torch.bool) if is_kept is None else is_kept,
        keep_denominator=keep_denominator,
    )


def moved(model: PreTrainedModel, by: float) -> None:
    """Every weight by a fixed noise: the policy some updates later."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class Learned:
    """What one update computed, with the weights left alone."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    batches: list[TokenBatch]


def learned(
    monkeypatch: pytest.MonkeyPatch,
    algorithm: PolicyGradient,
    step: StepSequences,
    *,
    token_budget: int = 4096,
    needs_old: bool = True,
    kernels: KernelsBlock = KERNELS,
    dtype: torch.dtype = torch.float64,
) -> Learned:
    """Prepare a step, move the policy, and take the gradients of an update."""
    model = make_model(dtype=dtype)
    batches = prepare(
        algorithm,
        step,
        model=model,
        reference=make_model(seed=1, dtype=dtype),
        temperature=TEMPERATURE,
        token_budget=token_budget,
        kernels=kernels,
        needs_old=needs_old,
    )
    moved(model, 0.03)
    gradients: dict[str, Tensor] = {}

    def recorded(optimizer: MasterAdamW, loss: Tensor, **_: object) -> StepResult:
        gradients.update(optimizer.gradients())
        return StepResult(optimizer.grad_norm(), None)

    monkeypatch.setattr(update_module, "optimizer_step", recorded)
    metrics = update(
        MasterAdamW(model),
        policy_batch_loss(model, algorithm, kernels, temperature=TEMPERATURE),
        batches,
        replace(CONFIG, kernels=kernels),
        lr=0.0,
        step=1,
    )
    return Learned(metrics, gradients, batches)


def assert_same_learning(got: Learned, expected: Learned, *, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    for name, value in expected.metrics.items():
        torch.testing.assert_close(
            got.metrics[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert got.metrics.keys() == expected.metrics.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            got.gradients[name], gradient, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
