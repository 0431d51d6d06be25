"""Other places a run's metrics can go: TensorBoard, Trackio, Weights & Biases, each a function of step and metrics."""

from __future__ import annotations

import atexit
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Tracker = Callable[[int, Mapping[str, float]], None]


def open_tracker(name: str, run_dir: Path | str, config: Mapping[str, Any]) -> Tracker:
    """Start a run at a tracker. What the returned function logs is complete when the process ends.

    Args:
        name: "tensorboard", "trackio" or "wandb".
        run_dir: the run directory; its name becomes the run's name.
        config: what the tracker stores as the run's configuration.

    Raises:
        ValueError: another name.
        RuntimeError: the package is not installed.
    """
    if name not in _OPENERS:
        raise ValueError(f"unknown tracker {name!r}; report.to takes {', '.join(_OPENERS)}")
    return _OPENERS[name](Path(run_dir), config)


def _tensorboard(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    _package("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    as_code = json.dumps(config, indent=2, default=str).replace("\n", "\n    ")
    writer.add_text("config", f"    {as_code}", 0)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            writer.add_scalar(metric, value, step)
        writer.flush()

    return log


def _trackio(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    trackio = _package("trackio")
    trackio.init(project=os.environ.get("TRACKIO_PROJECT", "fastrl"), name=run_dir.name, config=dict(config))
    atexit.register(trackio.finish)
    return lambda step, metrics: trackio.log(dict(metrics), step=step)


def _wandb(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    wandb = _package("wandb")
    project = os.environ.get("WANDB_PROJECT", "fastrl")
    run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=dict(config))
    atexit.register(run.finish)
    return lambda step, metrics: run.log(dict(metrics), step=step)


_OPENERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise RuntimeError(f"report.to: {name} needs the package {name}: pip install {name}") from error
