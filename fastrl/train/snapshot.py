"""What a run must remember to go on exactly where it stopped, and how it is put into a checkpoint.

Data order and every sample are functions of (seed, ordinal), so the cursor is one number; nothing draws from a
global generator. Weights and moments are the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from fastrl.train.checkpoint import load_checkpoint, resume_point, save_checkpoint
from fastrl.train.distributed import from_first, is_first, told_tensors
from fastrl.train.run_directory import RunDirectory


class Stateful(Protocol):
    """What gives its state as a flat map of tensors and takes it back, as `MasterAdamW` does."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken.
        ordinal: prompts drawn, counted over all epochs; SFT derives its rows from the step.
        num_tokens: tokens of the prompts and completions, or of the rows, trained on so far; each counts once
            however often it is fed.
        kl_coef: KL coefficient of this moment, adaptive or raised by a signal; None while it is the configured one.
        lr_scale: factor of the learning rate that signals have left.
        rollbacks: times a signal has taken the run back; each continues with another seed.
    """

    step: int = 0
    ordinal: int = 0
    num_tokens: int = 0
    kl_coef: float | None = None
    lr_scale: float = 1.0
    rollbacks: int = 0


def save(
    directory: RunDirectory,
    progress: Progress,
    states: Mapping[str, Stateful],
    offsets: Mapping[str, int],
    *,
    keep: int | None,
) -> None:
    """Write `checkpoint-STEP/`, whole or not at all; a step that has one already is not saved again.

    Every rank must call it: rank 0 writes, and gets the state that others own.

    Args:
        states: what the run cannot make again, by name: "optimizer" with the weights, and others a recipe has.
        offsets: lengths of the log files, which a resumed run cuts back to.
        keep: newest checkpoints kept; None keeps all.
    """
    path = directory.path / f"checkpoint-{progress.step}"
    if from_first(path.exists, "a look for the checkpoint"):
        return
    state = {"progress": asdict(progress), "offsets": dict(offsets)}
    tensors = {name: owner.state_dict() for name, owner in states.items()}
    if is_first():
        save_checkpoint(directory.path, progress.step, tensors=tensors, state=state, keep=keep)


def restore(
    directory: RunDirectory, states: Mapping[str, Stateful], *, resume: str | None
) -> tuple[Progress, dict[str, int]]:
    """Load the checkpoint that `resume` means; a fresh start when there is none.

    Rank 0 reads and tells the others, however many there were when it was written.

    Args:
        states: as given to `save`; each gets back what it had.
        resume: "auto" for the newest whole one, a checkpoint directory, or None.

    Returns:
        The progress, and the lengths the log files are cut back to.
    """
    tensors: dict[str, dict[str, Tensor]] = {}

    def read() -> dict[str, Any] | None:
        checkpoint = resume_point(directory.path, resume)
        if checkpoint is None:
            return None
        found, state = load_checkpoint(checkpoint)
        if found.keys() != states.keys():
            raise ValueError(
                f"{checkpoint} holds the state of {', '.join(sorted(found))}, and this run has "
                f"{', '.join(sorted(states))}; resume with the recipe and the options it was started with"
            )
        tensors.update(found)
        return state

    state = from_first(read, "the checkpoint")
    if state is None:
        return Progress(), {}
    for name, owner in states.items():
        owner.load_state_dict(told_tensors(tensors.pop(name, {}), f"the state of {name}"))
    return Progress(**state["progress"]), state["offsets"]
