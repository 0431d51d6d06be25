"""What a run must remember to go on exactly where it stopped, and how it is put into a checkpoint.

Data order and every sample are functions of (seed, ordinal), so the cursor is one number; nothing draws from a
global generator. Weights and moments are the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from fastrl.train.checkpoint import load_checkpoint, resume_point, save_checkpoint
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

    Args:
        states: what the run cannot make again, by name: "optimizer" with the weights, and others a recipe has.
        offsets: lengths of the log files, which a resumed run cuts back to.
        keep: newest checkpoints kept; None keeps all.
    """
    if (directory.path / f"checkpoint-{progress.step}").exists():
        return
    state = {"progress": asdict(progress), "offsets": dict(offsets)}
    tensors = {name: owner.state_dict() for name, owner in states.items()}
    save_checkpoint(directory.path, progress.step, tensors=tensors, state=state, keep=keep)


def restore(
    directory: RunDirectory, states: Mapping[str, Stateful], *, resume: str | None
) -> tuple[Progress, dict[str, int]]:
    """Load the checkpoint that `resume` means; a fresh start when there is none.

    Args:
        states: as given to `save`; each gets back what it had.
        resume: "auto" for the newest whole one, a checkpoint directory, or None.

    Returns:
        The progress, and the lengths the log files are cut back to.
    """
    checkpoint = resume_point(directory.path, resume)
    if checkpoint is None:
        return Progress(), {}
    tensors, state = load_checkpoint(checkpoint)
    if tensors.keys() != states.keys():
        raise ValueError(
            f"{checkpoint} holds the state of {', '.join(sorted(tensors))}, and this run has "
            f"{', '.join(sorted(states))}; resume with the recipe and the options it was started with"
        )
    for name, owner in states.items():
        owner.load_state_dict(tensors[name])
    return Progress(**state["progress"]), state["offsets"]
