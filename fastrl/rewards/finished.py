"""What reward functions are handed of an environment whose episode is over, wherever it lived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FinishedEnvironment:
    """What is left of an environment after its episode, for reward functions that name `environments`.

    Its public attributes that JSON can hold are there as they were at the end; of its methods only `get_reward`.

    Args:
        record: {"state": {attribute: value}, "reward": number, None or {"fault": text}}.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        vars(self).update(record["state"])
        self._reward = record["reward"]

    def get_reward(self) -> float | None:
        """What the environment's own get_reward returned; raises what it raised, as text."""
        if isinstance(self._reward, Mapping):
            raise RuntimeError(self._reward["fault"])
        return None if self._reward is None else float(self._reward)
