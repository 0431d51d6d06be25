from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from fastrl.report import open_tracker


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_one_sentence_with_the_command(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=f"{name} needs the package {name}: pip install {name}"):
        open_tracker(name, tmp_path, {})


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown tracker 'mlflow'; report\.to takes tensorboard, trackio, wandb"):
        open_tracker("mlflow", tmp_path, {})


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    log = open_tracker("tensorboard", tmp_path, {"learning_rate": 1e-6})
    log(1, {"reward": 0.25, "loss": 2.0})
    log(2, {"reward": 0.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


def test_wandb_and_trackio_get_the_run_its_configuration_and_each_step(monkeypatch, tmp_path):
    calls = []

    def init(**options):
        calls.append(("init", options))
        return fake

    fake = SimpleNamespace(init=init, log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: None)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
        open_tracker(name, tmp_path / "my-run", {"seed": 1})(3, {"reward": 0.5})
    shared = {"project": "fastrl", "name": "my-run", "config": {"seed": 1}}
    assert calls == [
        ("init", {**shared, "dir": str(tmp_path / "my-run")}),
        (3, {"reward": 0.5}),
        ("init", shared),
        (3, {"reward": 0.5}),
    ]
