"""What a signal does to a run: warn, lower the learning rate, raise the KL, go back to an earlier checkpoint, stop.

Detectors see what the log holds, and what they did is in the progress, the log and the checkpoint: a resumed run does
the same things at the same steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastrl.report.detect import Limits
from fastrl.report.history import History
from fastrl.report.journal import Journal
from fastrl.report.log import METRICS_FILE, SIGNALS_FILE, read_log
from fastrl.report.signals import DETECTORS, Signal, is_due, signals_in
from fastrl.train.checkpoint import set_aside_from
from fastrl.train.config import OnPolicyConfig, SignalsBlock
from fastrl.train.distributed import from_first, is_first
from fastrl.train.run_directory import RunDirectory
from fastrl.train.snapshot import Progress, Stateful, restore, save


class SignalError(RuntimeError):
    """A signal whose action ends the run; its checkpoint has been saved."""


def limits_of(block: SignalsBlock) -> Limits:
    """What the detectors compare with, from the configuration."""
    given = {
        "kl_blowup": block.kl_blowup,
        "entropy_collapse": block.entropy_collapse,
        "mode_collapse": block.mode_collapse,
        "sparse_reward": block.sparse_reward,
        "reward_hacking": block.reward_hacking,
        "length_hacking": block.length_hacking,
        "format_hacking": block.format_hacking,
        "clip_tail": block.clip_tail,
        "ratio_tail": block.ratio_tail,
        "reward_errors": block.reward_errors,
    }
    thresholds = {name: value for name, value in given.items() if value is not None}
    return Limits(thresholds, block.window, block.verifier, block.format_metric)


def attended(
    config: OnPolicyConfig,
    directory: RunDirectory,
    journal: Journal,
    progress: Progress,
    states: Mapping[str, Stateful],
    *,
    kl_coef: float,
) -> Progress:
    """Run the detectors on what has been logged, log those that fire, and do what the configuration says.

    Args:
        progress: after the round; nothing of it has been saved yet.
        states: as given to `save`; a rollback puts back what they held.
        kl_coef: the configured KL coefficient, which `raise_kl` starts from.

    Returns:
        The progress to go on from.

    Raises:
        SignalError: the action is stop; or rollback, and there is no checkpoint or rollback left.
    """
    block = config.signals

    def look() -> list[dict[str, Any]]:
        found = signals_in(journal.history.curves, limits_of(block), step=progress.step)
        return [
            asdict(each) for each in found if is_due(each, journal.last_signals.get(each.name), window=block.window)
        ]

    due = [Signal(**each) for each in from_first(look, "a look at the log")]  # the first rank's, which has it
    by_action: dict[str, Signal] = {}
    for signal in due:
        action = block.actions.get(signal.name, "warn")
        journal.write_signal(signal, action)
        by_action.setdefault(action, signal)
    if "lower_lr" in by_action:
        progress = replace(progress, lr_scale=progress.lr_scale * block.lr_factor)
    if "raise_kl" in by_action:
        coef = kl_coef if progress.kl_coef is None else progress.kl_coef
        progress = replace(progress, kl_coef=coef * block.kl_factor)
    if "stop" in by_action:
        save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
        raise SignalError(_sentence(by_action["stop"], "Mend the cause, or change `signals`, and pass --resume auto"))
    if "rollback" in by_action:
        return _rolled_back(config, directory, journal, progress, states, by_action["rollback"])
    return progress


def _rolled_back(
    config: OnPolicyConfig,
    directory: RunDirectory,
    journal: Journal,
    progress: Progress,
    states: Mapping[str, Stateful],
    signal: Signal,
) -> Progress:
    """The progress of the newest checkpoint before the signal's onset, to go on from with another seed.

    Later checkpoints become `checkpoint-N.rolled-back`, the log since then `metrics.rolled-back-K.jsonl`. A run that is
    killed before its next checkpoint goes through the same steps and the same rollback again.
    """
    if progress.rollbacks >= config.signals.max_rollbacks:
        save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
        raise SignalError(_sentence(signal, f"It would be rollback {progress.rollbacks + 1}; max_rollbacks stops here"))
    if not from_first(lambda: set_aside_from(directory.path, signal.since), "the checkpoints to go back to"):
        save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
        raise SignalError(
            _sentence(signal, f"No checkpoint before step {signal.since} to go back to; lower save_steps next time")
        )
    restored, offsets = restore(directory, states, resume="auto")
    number = progress.rollbacks + 1
    if is_first():
        shutil.copyfile(directory.path / METRICS_FILE, directory.path / f"metrics.rolled-back-{number}.jsonl")
        # The log of signals goes on: it is what tells of the steps that were taken back.
        journal.truncate_to({**offsets, SIGNALS_FILE: journal.offsets()[SIGNALS_FILE]})
    return replace(restored, rollbacks=number, lr_scale=progress.lr_scale, kl_coef=progress.kl_coef)


def _sentence(signal: Signal, remedy: str) -> str:
    return f"step {signal.step}: {signal.name}: {signal.text} (threshold {signal.threshold:g}). {remedy}"


def audit(run_dir: Path, block: SignalsBlock) -> list[Signal]:
    """The signals of a finished or running run, from its log alone, line by line as a run would have seen them.

    Raises:
        ValueError: the directory has no log.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {METRICS_FILE}; name the output_dir of a run")
    history, last, found = History(), dict[str, int](), []
    limits = limits_of(block)
    for line in read_log(path):
        history.add(line["step"], {name: x for name, x in line.items() if name not in ("step", "time")})
        for signal in signals_in(history.curves, limits, step=line["step"]):
            if is_due(signal, last.get(signal.name), window=block.window):
                last[signal.name] = signal.step
                found.append(signal)
    return found


def unseen(run_dir: Path, block: SignalsBlock) -> Sequence[str]:
    """The detectors that are on and lack a metric in this run's log, so that their silence says nothing."""
    logged = {name for line in read_log(run_dir / METRICS_FILE) for name in line}
    needs = {name: DETECTORS[name].needs for name in limits_of(block).thresholds}
    needs |= {"reward_hacking": (*DETECTORS["reward_hacking"].needs, block.verifier)}
    needs |= {"format_hacking": (block.format_metric,)}
    return [
        f"{name} (no {', '.join(sorted(missing))})"
        for name, metrics in needs.items()
        if name in limits_of(block).thresholds and (missing := set(metrics) - logged)
    ]


def actions_of(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, detector, action) of every signal that a run answered with more than a warning."""
    path = run_dir / SIGNALS_FILE
    lines = read_log(path) if path.is_file() else []
    return [(line["step"], line["name"], line["action"]) for line in lines if line["action"] != "warn"]


def causes_of(name: str) -> tuple[str, ...]:
    """What may be behind a detector's signal, the likeliest first."""
    return DETECTORS[name].causes
