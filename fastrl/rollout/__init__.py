"""Sampling completions: the engine protocol and the engines that meet it."""

from __future__ import annotations

from fastrl.rollout.engine import Engine, Sampling, check_sampling

__all__ = ["Engine", "Sampling", "check_sampling"]
