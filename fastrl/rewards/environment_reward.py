"""The reward that an environment gives its own episode, as one more reward column."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.rewards.finished import FinishedEnvironment
from fastrl.rewards.protocol import promises


@promises(in_process=True)
def environment_reward(environments: Sequence[FinishedEnvironment]) -> list[float | Exception | None]:
    """Each environment's get_reward(); its failure is a failure of this item."""
    values: list[float | Exception | None] = []
    for environment in environments:
        try:
            values.append(environment.get_reward())
        except RuntimeError as error:
            values.append(error)
    return values
