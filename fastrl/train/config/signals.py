"""Detectors of training gone wrong: thresholds and actions."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SignalsBlock:
    """Thresholds of the detectors and what each does; see docs/signals.md. null turns a detector off.

    Attributes:
        actions: detector -> warn, lower_lr, raise_kl, rollback or stop; those not named warn.
        window: logged steps that a detector averages, and waits before it acts again.
        verifier: metric of a held-out judgement that should rise with the reward.
        format_metric: metric of the reward for form.
        lr_factor: lower_lr multiplies the learning rate by this, from then on.
        kl_factor: raise_kl multiplies the KL coefficient by this, from then on.
        max_rollbacks: further ones stop the run.
        kl_blowup: KL to the reference, nats per token.
        entropy_collapse: entropy as a share of the first steps'.
        mode_collapse: share of completions that repeat one of their group, while the reward falls.
        sparse_reward: share of groups with equal rewards.
        reward_hacking: rise of the reward, in its standard deviations, that the verifier does not follow.
        length_hacking: correlation of the reward with length.
        format_hacking: rise of the reward for form that no other reward follows.
        clip_tail: share of tokens whose ratio is clipped.
        ratio_tail: share of tokens whose probability halved or doubled since they were sampled.
        reward_errors: share of completions that a reward fails on.
    """

    actions: dict[str, str] = field(default_factory=dict)
    window: int = 10
    verifier: str = "eval/reward"
    format_metric: str = "rewards/format/mean"
    lr_factor: float = 0.5
    kl_factor: float = 2.0
    max_rollbacks: int = 2
    kl_blowup: float | None = 1.0
    entropy_collapse: float | None = 0.1
    mode_collapse: float | None = 0.9
    sparse_reward: float | None = 0.9
    reward_hacking: float | None = 0.5
    length_hacking: float | None = 0.7
    format_hacking: float | None = 0.2
    clip_tail: float | None = 0.3
    ratio_tail: float | None = 0.05
    reward_errors: float | None = 0.02
