"""Agents: an environment with tools, stepped by the policy while it samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EnvironmentBlock:
    """What the policy may call, and what ends an episode; see docs/agents.md. Nothing is called when it is empty.

    Attributes:
        factory: `package.module:Class` or `file.py:Class`, with literal options in parentheses; TRL's
            environment_factory. Its public methods are tools.
        tools: further tools: calculator, search(corpus=FILE), python, or `package.module:function`.
        max_tool_calling_iterations: most turns whose calls are run; None leaves it to max_completion_length, which
            bounds an episode's tokens, those of tools included.
        episode_seconds: an episode that has taken longer has no further turn; None is no limit, and the only setting
            with which a run repeats exactly.
        tool_timeout_seconds: for the tool calls of one turn, for reset and for get_reward.
        workers: processes in which tools run at the same time; None is one per core, 0 runs environments in the
            trainer's own process, where nothing stops one that hangs.
        reward_weight: of the environment's own get_reward() in the sum of rewards.
        turn_advantage_weight: factor of each turn's own advantage, of what get_turn_reward() said, beside that of the
            episode; 0 gives every turn the episode's.
        turn_gamma: discount per turn of what later turns earned.
    """

    factory: str | None = None
    tools: tuple[str, ...] = ()
    max_tool_calling_iterations: int | None = None
    episode_seconds: float | None = None
    tool_timeout_seconds: float = 10.0
    workers: int | None = None
    reward_weight: float = 1.0
    turn_advantage_weight: float = 0.0
    turn_gamma: float = 1.0
