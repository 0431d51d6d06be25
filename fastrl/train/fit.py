"""The optimizer steps of a run over rows that are all there before it starts: the loop of every offline recipe.

A recipe says what a step is: rows of the data -> packed batches whose weights are shares of that step, and the loss
they go through. Order, learning rate, log, evaluation, checkpoints and interruption are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from time import perf_counter
from typing import Generic, TypeVar

import torch

from fastrl.report.journal import Journal
from fastrl.train.config import TrainConfig
from fastrl.train.device import peak_gib
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.order import row_at
from fastrl.train.run_directory import RunDirectory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.shares import step_size
from fastrl.train.snapshot import Progress, Stateful, restore, save
from fastrl.train.update import BatchLoss, mean_loss, update
from fastrl.types import TokenBatch

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step (or one evaluation) learns from.

    Attributes:
        batches: packed micro-batches; every weight is a share of the whole step.
        loss: of one of them. Constants of the step's items (margins, labels) are closed over and found by
            `batch.sequence`, the places of the packed sequences in the list given to `pack`.
        n_tokens: tokens of all its sequences.
    """

    batches: list[TokenBatch]
    loss: BatchLoss
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Rows(Generic[Row]):
    """The data of a run.

    Attributes:
        train: rows to learn from, in file order.
        held_out: rows to evaluate on; may be empty.
        step_of: rows -> a step. Evaluation calls it with all held-out rows, under no_grad.
        sampled_step: rows and their places in the run, counted over all epochs -> a step to learn from, for recipes
            that sample first: seeds made of places are those of a run that was never stopped. None: `step_of`.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    step_of: Callable[[Sequence[Row]], Step]
    sampled_step: Callable[[Sequence[Row], Sequence[int]], Step] | None = None


def fit(
    config: TrainConfig,
    directory: RunDirectory,
    rows: Rows[Row],
    states: Mapping[str, Stateful],
    *,
    journal: Journal,
    device: torch.device,
    constants: Mapping[str, float] | None = None,
) -> int:
    """Take every step of the run, from where its checkpoint left off; arguments as `steps`.

    Returns:
        0 when all steps are taken, EXIT_INTERRUPTED when a signal asked to stop; the state is saved in both cases.
    """
    for _ in steps(config, directory, rows, states, journal=journal, device=device, constants=constants):
        pass
    return EXIT_INTERRUPTED if directory.interrupted() else 0


def steps(
    config: TrainConfig,
    directory: RunDirectory,
    rows: Rows[Row],
    states: Mapping[str, Stateful],
    *,
    journal: Journal,
    device: torch.device,
    constants: Mapping[str, float] | None = None,
) -> Iterator[Progress]:
    """Take the steps of the run one by one, for recipes in which something else follows the weights.

    Args:
        states: what a checkpoint holds, by name; "optimizer" takes the steps.
        journal: of this run; opened by the caller, cut back here to what the checkpoint has seen.
        constants: numbers logged with every step, such as rows cut short.

    Yields:
        The progress after each step, logged and not yet evaluated or saved: what is done to `states` now is saved.
    """
    batch_size, end, total_steps = length_of(config, len(rows.train))
    warmup = warmup_length(total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio)
    progress, offsets = restore(directory, states, resume=config.resume_from_checkpoint)
    journal.truncate_to(offsets)
    optimizer = states["optimizer"]
    assert isinstance(optimizer, MasterAdamW)
    while progress.step < total_steps:
        started = perf_counter()
        first = progress.step * batch_size
        ordinals = range(first, min(first + batch_size, end))
        drawn = [rows.train[row_at(i, n=len(rows.train), seed=config.seed)] for i in ordinals]
        step = rows.step_of(drawn) if rows.sampled_step is None else rows.sampled_step(drawn, ordinals)
        rate = learning_rate_at(
            progress.step,
            peak=config.learning_rate,
            kind=config.lr_scheduler_type,
            warmup_steps=warmup,
            total_steps=total_steps,
        )
        metrics = update(optimizer, step.loss, step.batches, config, lr=rate, step=progress.step + 1)
        progress = replace(progress, step=progress.step + 1, num_tokens=progress.num_tokens + step.n_tokens)
        seconds = perf_counter() - started
        metrics |= {
            "num_tokens": progress.num_tokens,
            "epoch": ordinals.stop / len(rows.train),
            "step_time": seconds,
            "tokens_per_second": step.n_tokens / seconds,
            "memory/peak_gib": peak_gib(device),
            **(constants or {}),
        }
        is_last = progress.step == total_steps
        journal.write(progress.step, metrics, is_shown=is_last or progress.step % config.logging_steps == 0)
        yield progress
        if rows.held_out and (is_last or (config.eval_steps and progress.step % config.eval_steps == 0)):
            evaluate(rows, journal, progress)
        if is_last or directory.interrupted() or progress.step % config.save_steps == 0:
            save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
        if directory.interrupted():
            return


def evaluate(rows: Rows[Row], journal: Journal, progress: Progress) -> None:
    """Log the loss and the metrics of the held-out rows, under `eval/`."""
    with torch.no_grad():
        step = rows.step_of(rows.held_out)
    metrics = mean_loss(step.loss, step.batches)
    journal.write(progress.step, {f"eval/{name}": value for name, value in metrics.items()})


def length_of(config: TrainConfig, n_rows: int) -> tuple[int, int, int]:
    """Rows of a step, rows visited in the whole run, and its steps.

    Every rank is a device. An epoch-counted run ends with a short batch rather than in a next epoch.
    """
    batch_size = step_size(config)
    end = config.max_steps * batch_size if config.max_steps > 0 else ceil(config.num_train_epochs * n_rows)
    return batch_size, end, ceil(end / batch_size)
