"""The fields of the recipes that sample from the policy they train and judge what it says."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrl.train.config.blocks import RewardsBlock, RolloutBlock
from fastrl.train.config.environment import EnvironmentBlock
from fastrl.train.config.signals import SignalsBlock
from fastrl.train.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class OverlongBlock:
    """DAPO's soft overlong punishment: 0 until `max_completion_length - buffer`, then linear down to -penalty.

    Attributes:
        buffer: tokens before the limit in which the punishment grows; 0 turns it off.
        penalty: the punishment at the limit, in units of reward.
    """

    buffer: int = 0
    penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(TrainConfig):
    """Completions of the policy itself, judged while it trains.

    Attributes:
        reward_funcs: names of built-in rewards, or `package.module:function`.
        reward_weights: one per reward function; None weighs all by 1.
        reward_gates: reward -> the reward that must hold for it to count, as {exact_match: format} or
            {exact_match: tag_count > 0.5}; where it does not hold the reward counts 0.
        reward_schedule: reward -> factor of its weight by optimizer step, linear between points, as
            {format: "0: 1, 100: 0.2"}.
        num_generations: completions per prompt (G).
        max_completion_length: most tokens of a completion.
        temperature: divides the logits when sampling and when training.
        top_p: sample from the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: sample from the k most likely tokens; 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability; 0 keeps all.
        repetition_penalty: makes tokens that occurred already less likely; 1 is none.
        stop: texts that end a completion.
        overlong: soft punishment of long completions.
        rollout: how completions are sampled.
        rewards: how reward functions run.
        environment: tools that the policy may call while it samples.
        signals: detectors of training gone wrong, and what they do.
    """

    reward_funcs: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    reward_gates: dict[str, str] = field(default_factory=dict)
    reward_schedule: dict[str, str] = field(default_factory=dict)
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    overlong: OverlongBlock = OverlongBlock()
    rollout: RolloutBlock = RolloutBlock()
    rewards: RewardsBlock = RewardsBlock()
    environment: EnvironmentBlock = EnvironmentBlock()
    signals: SignalsBlock = SignalsBlock()
