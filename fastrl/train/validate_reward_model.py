"""Rules of the recipes that train scoring models."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import PRMConfig, RewardConfig


def reward_problems(config: RewardConfig) -> Iterator[str]:
    """What a reward model cannot be trained with."""
    yield from _lengths(config)


def prm_problems(config: PRMConfig) -> Iterator[str]:
    """What a process reward model cannot be trained with."""
    yield from _lengths(config)
    if not config.step_separator:
        yield "step_separator: is empty, and a step's score is read at its last token; set one, such as a line break"
    if config.eval_dataset is None and config.aggregation != PRMConfig.aggregation:
        yield "aggregation: has no effect without eval_dataset; set that too"


def _lengths(config: RewardConfig | PRMConfig) -> Iterator[str]:
    if config.max_length is not None and config.packing.token_budget < config.max_length:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of max_length "
            f"{config.max_length}; raise it, or lower max_length"
        )
    if config.data.completion_template is not None:
        yield "data.completion_template: has no effect here: completions come as the rows have them; remove it"
