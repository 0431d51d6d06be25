"""A command that torchrun has started in several processes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrl.command.settings import Refused
from fastrl.train.ranks import launched_ranks


def check_ranks(command: str, *, can_run: bool, able: Sequence[str]) -> None:
    """Refuse several processes for what runs in one.

    Args:
        command: name, and the flag that matters.
        can_run: it may.
        able: recipes that may.

    Raises:
        Refused: the launcher has started several, or says nonsense.
    """
    try:
        size = launched_ranks().size
    except ValueError as error:
        raise Refused(f"{command}: {error}") from error
    if size > 1 and not can_run:
        raise Refused(
            f"{command}: runs in one process, and the launcher has started {size}; start it without torchrun "
            f"(recipes that run on several: {', '.join(able)})"
        )


def name_of_rank(command: str) -> str:
    """The command, and which of several processes speaks."""
    ranks = launched_ranks()
    return f"{command} (rank {ranks.rank} of {ranks.size})" if ranks.size > 1 else command


def run_together(run: Callable[[Any], int | None], config: Any) -> int | None:
    """Run a recipe; one of several ranks meets the others before and parts from them afterwards."""
    if launched_ranks().size == 1:
        return run(config)
    from fastrl.train.distributed import joined

    with joined(config):
        return run(config)
