"""The records that travel between the parts: a rollout, a packed batch, a loss, and the head they share.

Alignment rule: in a packed batch, index t is the prediction of `target[t]`. Labels are shifted in
`fastrl.data.pack` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, exactly as the engine made it; never retokenised.

    Attributes:
        prompt_ids: token ids fed before sampling.
        completion_ids: token ids sampled, the stop token included when one ended the completion.
        logprob: natural log-probability of each completion token under the distribution it was
            drawn from (temperature, top-k, top-p, min-p and penalties applied); same length.
        finish_reason: "stop" when an EOS token or a stop string ended it, "length" when the limit did,
            "error" when the engine failed (such a rollout is never trained and never scored).
        policy_version: version of the weights that sampled it; of those that began it, when they changed meanwhile.
        is_sampled: per completion token, False for tokens the policy did not choose (tool output);
            None when all were sampled. Only sampled tokens are trained.
        token_version: version of the weights that chose each completion token, when the weights changed while the
            completion was made; None when all were chosen by `policy_version`, the version that began it.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprob: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    is_sampled: tuple[bool, ...] | None = None
    token_version: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The linear map from hidden states to logits, with everything that changes the distribution.

    z = softcap_tanh(logit_scale * (hidden @ weight.T + bias)) / temperature; see `fastrl.ops.linear_logprob`.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Positions that sequences with a common beginning have in common; only one of each is fed to the model.

    Attributes:
        kept: [U] int64, the positions that are fed, ascending.
        place: [T] int64, the entry of `kept` that stands for each position.
        others: [T - U] int64, the positions that are not fed.
        several: [K] int64, the entries of `kept` that stand for more than their own position.
        summed: [T - U] int64, the entry of `several` that stands for each of `others`.
    """

    kept: Tensor
    place: Tensor
    others: Tensor
    several: Tensor
    summed: Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences packed end to end without padding; every [T] tensor follows the alignment rule.

    A sequence of n tokens contributes n - 1 positions: its last token is predicted, never fed.

    Attributes:
        input_ids: [T] int64 tokens fed.
        position_ids: [T] int64, restarting at 0 in each sequence.
        target: [T] int64, the token position t predicts.
        weight: [T] f32, the share of position t in the optimizer step's loss; 0 means not trained.
        cu_seqlens: [S + 1] int32, the borders of the sequences: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]).
        max_seqlen: length of the longest sequence.
        sequence: [S] int64, the place of each packed sequence in the list given to `pack`.
        advantage: [T] f32, constant.
        sampler_logprob: [T] f32 under the distribution that sampled (l_mu).
        old_logprob: [T] f32 under the policy that defines the ratio (l_old).
        ref_logprob: [T] f32 under the frozen reference (l_ref).
        old_value: [T] f32 the critic's value of the state in which target[t] is chosen, when it was sampled.
        returns: [T] f32 what the critic is fitted to: advantage plus old value, before whitening.
        shared: what the sequences have in common; None where that is too little. Only `hidden_states` looks at it:
            every tensor above has all T positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    target: Tensor
    weight: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    sequence: Tensor
    advantage: Tensor | None = None
    sampler_logprob: Tensor | None = None
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    old_value: Tensor | None = None
    returns: Tensor | None = None
    shared: SharedRows | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss that adds over micro-batches and ranks, and what to log about it.

    Attributes:
        loss: [] the weighted sum, differentiable.
        metrics: name -> [T] detached value per token; the trainer averages over trained tokens.
        item_metrics: name -> [K] detached value per item (pair, sequence, step), any K for each name; the trainer
            averages over all items of the optimizer step, NaN left out.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    item_metrics: Mapping[str, Tensor] = field(default_factory=dict)
