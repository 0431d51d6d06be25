"""The four parts of RLHF - policy, reference, reward model, critic - as models of their own or as parts of fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastrl.report.preview import print_table
from fastrl.train.config import PPOConfig
from fastrl.train.device import GIB, compute_dtype, pick_device
from fastrl.train.from_config import model_of, optimizer_of, reference_of
from fastrl.train.logprob import trained_logprob
from fastrl.train.lora import adapter, adapter_off, add_lora, is_of_adapter
from fastrl.train.lora_files import adapter_head, load_adapter
from fastrl.train.model import hidden_states, load_model, model_head
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.ppo_losses import head_values
from fastrl.train.score_model import load_score_model, token_scores
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PerToken = Callable[[TokenBatch], Tensor]
CRITIC, REWARD = "critic", "reward"  # adapters beside the policy's


@dataclass(frozen=True, slots=True)
class Roles:
    """Who answers what about a packed batch, and who is trained.

    Attributes:
        policy: the model that is trained and sampled from.
        logprob: [T] under the policy, at the run's temperature.
        ref_logprob: [T] under the reference; None without a KL.
        reward: [T] score of every prefix under the reward model; None without one.
        value: [T] the critic's; differentiable.
        value_head: the critic, where it is one more head on the policy's backbone.
        optimizer: of the policy, and of value_head where there is one.
        critic_optimizer: of a critic with parameters of its own.
        parameters: role -> the parameters it uses, shared ones included.
    """

    policy: PreTrainedModel
    logprob: PerToken
    ref_logprob: PerToken | None
    reward: PerToken | None
    value: PerToken
    value_head: nn.Linear | None
    optimizer: MasterAdamW
    critic_optimizer: MasterAdamW | None
    parameters: Mapping[str, Sequence[Tensor]]


def roles_of(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Roles:
    """Load what the configuration asks for.

    With use_peft there is one base: the policy is its adapter, the reference the base alone, the critic another
    adapter with a value head, and so is a reward model whose directory is an adapter's.

    Raises:
        ValueError: a directory without the head it needs, or a model with another vocabulary.
    """
    for key, path in (
        ("sft_model_path", config.sft_model_path),
        ("reward_model_path", config.reward_model_path),
        ("value_model_path", config.value_model_path),
    ):
        check_same_vocabulary(config, tokenizer, path, option=key)
    policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
    parameters: dict[str, list[Tensor]] = {"policy": list(policy.parameters())}
    ref_logprob = reward = None
    if config.kl_coef > 0:
        reference = _reference(config, policy)
        ref_logprob = _logprob_of(config, reference, is_reference=True)
        parameters["reference"] = _base_parameters(reference)
    value_head = None
    if config.share_backbone:
        value_head = fresh_value_head(policy)
        critic = _Scorer(
            _values_of_head(policy, value_head), [*policy.base_model.parameters(), value_head.weight], None
        )
        optimizer = optimizer_of(config, nn.ModuleDict({"policy": policy, "value_head": value_head}))
    else:
        optimizer = optimizer_of(config, policy)  # before other adapters: it owns what is trained now
        critic = _adapter_critic(config, policy) if config.use_peft else _own_critic(config)
    if config.reward_model_path is not None:
        judge = _reward_model(config, policy, config.reward_model_path)
        reward = judge.scores
        parameters["reward model"] = judge.parameters
    return Roles(
        policy=policy,
        logprob=_logprob_of(config, policy),
        ref_logprob=ref_logprob,
        reward=reward,
        value=critic.scores,
        value_head=value_head,
        optimizer=optimizer,
        critic_optimizer=None if critic.trained is None else optimizer_of(config, critic.trained),
        parameters=parameters | {"critic": critic.parameters},
    )


@dataclass(frozen=True, slots=True)
class _Scorer:
    """A backbone with a scalar head: what it says, the parameters it uses, the module with those that are trained."""

    scores: PerToken
    parameters: list[Tensor]
    trained: nn.Module | None


def _own_critic(config: PPOConfig) -> _Scorer:
    """From its own checkpoint or the reward model's; without either, the policy's backbone and a new head."""
    path = config.value_model_path or config.reward_model_path
    model = _score_model(
        config,
        path or config.model_name_or_path,
        gradient_checkpointing=config.gradient_checkpointing,
        new_head=None if path else 0.0,
    )
    return _Scorer(_scores_of(model), list(model.parameters()), model)


def _adapter_critic(config: PPOConfig, policy: PreTrainedModel) -> _Scorer:
    """One more adapter of the policy's base: a reward model's adapter and head, else fresh ones."""
    path = config.value_model_path or config.reward_model_path
    head = fresh_value_head(policy)
    if path is not None and is_adapter(path):
        load_adapter(policy, path, name=CRITIC, is_trainable=True)
        head.load_state_dict({"weight": adapter_head(path)})
    else:
        add_lora(
            policy,
            r=config.lora_r,
            alpha=config.lora_alpha,
            seed=config.seed + 1,  # not the policy's own random values
            target_modules=config.lora_target_modules,
            name=CRITIC,
        )
    own = {name.replace(".", "/"): p for name, p in policy.named_parameters() if is_of_adapter(name, CRITIC)}
    trained = nn.ParameterDict({**own, "value_head": head.weight})
    return _adapter_scorer(policy, CRITIC, head, trained)


def _reward_model(config: PPOConfig, policy: PreTrainedModel, path: str) -> _Scorer:
    if not is_adapter(path):
        model = _score_model(config, path).requires_grad_(False)
        return _Scorer(_scores_of(model), list(model.parameters()), None)
    if not config.use_peft:
        raise ValueError(
            f"reward_model_path: {path} is an adapter, which needs the frozen base that use_peft keeps; "
            "set use_peft, or name the reward model's merged directory (model, beside it)"
        )
    head = fresh_value_head(policy).requires_grad_(False)
    load_adapter(policy, path, name=REWARD)
    head.load_state_dict({"weight": adapter_head(path)})
    return _adapter_scorer(policy, REWARD, head, None)


def _adapter_scorer(policy: PreTrainedModel, name: str, head: nn.Linear, trained: nn.Module | None) -> _Scorer:
    def scores(batch: TokenBatch) -> Tensor:
        with adapter(policy, name):
            return head_values(head, hidden_states(policy, batch))

    own = [p for key, p in policy.named_parameters() if is_of_adapter(key, name)]
    return _Scorer(scores, [*_base_parameters(policy), *own, head.weight], trained)


def _base_parameters(model: PreTrainedModel) -> list[Tensor]:
    """Those of no adapter."""
    return [p for key, p in model.named_parameters() if not (".lora_A." in key or ".lora_B." in key)]


def is_adapter(path: str) -> bool:
    """Whether a directory holds a LoRA adapter and not a model."""
    return (Path(path) / "adapter_config.json").is_file()


def fresh_value_head(model: PreTrainedModel) -> nn.Linear:
    """A scalar head that starts from no opinion: float32 zeros, on the model's device."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, device=model.device)
    nn.init.zeros_(head.weight)
    return head


def own_bytes(parameters: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """Role -> bytes of the parameters that no role before it has; their sum is what the models take."""
    seen: set[int] = set()
    result = {}
    for role, tensors in parameters.items():
        fresh = {id(tensor): tensor for tensor in tensors if id(tensor) not in seen}
        seen |= fresh.keys()
        result[role] = sum(tensor.numel() * tensor.element_size() for tensor in fresh.values())
    return result


def print_roles(parameters: Mapping[str, Sequence[Tensor]]) -> None:
    """Print each model's size and what it adds to memory; optimizer states and activations come on top."""
    rows = []
    for role, added in own_bytes(parameters).items():
        used = {id(tensor): tensor for tensor in parameters[role]}.values()
        total = sum(tensor.numel() * tensor.element_size() for tensor in used)
        weights = "own" if added == total else "shared" if added == 0 else f"{100 * added / total:.2g} % own"
        rows.append([role, f"{sum(t.numel() for t in used):,}", f"{added / GIB:.3g}", weights])
    print_table("models", ("role", "parameters", "GiB added", "weights"), rows)


def _reference(config: PPOConfig, policy: PreTrainedModel) -> PreTrainedModel:
    if config.sft_model_path is None:
        return reference_of(config, policy)
    model = load_model(
        config.sft_model_path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        layers=config.kernels.layers,
    )
    return model.requires_grad_(False)


def _score_model(
    config: PPOConfig, path: str, *, gradient_checkpointing: bool = False, new_head: float | None = None
) -> PreTrainedModel:
    return load_score_model(
        path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        attn_implementation=config.attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        layers=config.kernels.layers,
        new_head=new_head,
    )


def _logprob_of(config: PPOConfig, model: PreTrainedModel, *, is_reference: bool = False) -> PerToken:
    def logprob(batch: TokenBatch) -> Tensor:
        as_it_started: AbstractContextManager[None] = adapter_off(model) if is_reference else nullcontext()
        with as_it_started:
            head = model_head(model, temperature=config.temperature)
            return trained_logprob(model, head, batch, config.kernels)[0]

    return logprob


def _scores_of(model: PreTrainedModel) -> PerToken:
    return lambda batch: token_scores(model, batch)


def _values_of_head(model: PreTrainedModel, head: nn.Linear) -> PerToken:
    return lambda batch: head_values(head, hidden_states(model, batch))
