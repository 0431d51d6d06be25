"""Log-probabilities of completions under a reference model: scored once, or step by step.

Scored once, nothing of the reference stays in memory: its numbers are looked up by the sequence's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrl.train.config import ReferenceConfig, TrainConfig
from fastrl.train.distributed import add_up
from fastrl.train.from_config import model_of, reference_of
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.lora import adapter_off
from fastrl.train.model import model_head
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import own_batches, packed_for_ranks
from fastrl.train.supervised import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 4096  # sequences packed at once: the batches of a whole data set would fill the device


@dataclass(frozen=True, slots=True)
class Reference:
    """What a policy is compared with.

    Attributes:
        logprob: completions -> [S] summed log-probability of their trained tokens, f32, nats; a constant.
        model: what computes them while the policy trains (the policy itself with LoRA); None when they are known.
    """

    logprob: Callable[[Sequence[Example]], Tensor]
    model: PreTrainedModel | None = None


def policy_and_reference(config: ReferenceConfig, known: Iterable[Example]) -> tuple[PreTrainedModel, Reference]:
    """Load the policy, and the reference as the configuration wants it.

    With `precompute_ref_log_probs` there is never more than one model in memory: another reference model is loaded,
    asked and forgotten before the policy is loaded, and without one the policy's starting weights are asked.

    Args:
        known: every completion the run will ask for.
    """
    path = config.ref_model_name_or_path
    if not config.precompute_ref_log_probs:
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        return policy, live_reference(config, policy, path)
    if path is not None:
        table = _table(_other_model(config, path), known, config)
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
    else:
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        table = _table(policy, known, config)
    device = policy.device
    return policy, Reference(lambda examples: torch.tensor([table[each] for each in examples], device=device))


def live_reference(
    config: TrainConfig, policy: PreTrainedModel, path: str | None, *, temperature: float = 1.0
) -> Reference:
    """A reference that is asked while the policy trains: a second model, or with LoRA the policy's own base.

    Args:
        path: directory of another model; None is the one the policy starts from.
        temperature: divides the logits.
    """
    model = reference_of(config, policy) if path is None else _other_model(config, path)
    return Reference(lambda examples: _without_adapter(model, examples, config, temperature), model)


@torch.no_grad()
def completion_logprob(
    model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig, *, temperature: float = 1.0
) -> Tensor:
    """[S] summed log-probability of each completion's trained tokens, f32, nats; a constant."""
    sequences = [supervised_sequence(each.ids, each.is_trained, weight=1.0) for each in examples]
    total = torch.zeros(len(sequences), device=model.device)
    batches = packed_for_ranks(sequences, token_budget=config.packing.token_budget, device=model.device)
    for batch in own_batches(batches):
        logprob, _ = trained_logprob(model, model_head(model, temperature=temperature), batch, config.kernels)
        total[batch.sequence] = sequence_sum(logprob, batch)
    add_up([total], "the log-probabilities of the completions")  # zeros where other ranks have the numbers
    return total


class MovingReference:
    """The weights of a reference that follows the policy (TR-DPO), for checkpoints and for the moves themselves."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def follow(self, policy: nn.Module, *, share: float) -> None:
        """Reference = share x policy + (1 - share) x reference, in float32.

        Source: Gorbatovski 2024, arXiv:2404.09656 (the soft update; a share of 1 is the hard one).
        """
        for name, theirs in policy.named_parameters():
            ours = self._weights[name]
            ours.copy_(torch.lerp(ours.float(), theirs.float(), share))

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> weight, aliasing the live ones."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, weight in self._weights.items():
            weight.copy_(state[name])


def _table(model: PreTrainedModel, known: Iterable[Example], config: TrainConfig) -> dict[Example, float]:
    examples = list(dict.fromkeys(known))
    table: dict[Example, float] = {}
    for first in range(0, len(examples), BLOCK):
        block = examples[first : first + BLOCK]
        table.update(zip(block, _without_adapter(model, block, config).tolist(), strict=True))
    return table


def _without_adapter(
    model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig, temperature: float = 1.0
) -> Tensor:
    with adapter_off(model):
        return completion_logprob(model, examples, config, temperature=temperature)


def _other_model(config: TrainConfig, path: str) -> PreTrainedModel:
    return model_of(replace(config, model_name_or_path=path, use_peft=False, load_in_4bit=False)).requires_grad_(False)
