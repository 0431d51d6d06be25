"""`fastrl env` tells the truth about this machine."""

from __future__ import annotations

import json
import platform
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastrl.command import environment as module
from fastrl.command.environment import OPTIONAL, REQUIRED, as_json, as_text, environment

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[ <>=;\[]", requirement)[0] for requirement in requirements}


def test_the_packages_it_looks_for_are_those_of_pyproject() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(REQUIRED) == names(PROJECT["dependencies"])
    assert set(OPTIONAL) == set(extras) - {"docs", "test"}
    for extra, packages in OPTIONAL.items():
        assert set(packages) == names(extras[extra])


def test_it_reports_versions_devices_and_the_backend_of_every_op() -> None:
    found = json.loads(as_json(environment()))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["native_extension"] == (find_spec("fastrl._C") is not None)
    assert {"linear_logprob", "gae"} <= found["backends"]["cpu"].keys()
    assert set(found["backends"]["cpu"].values()) <= {"torch", "native"}


def test_the_text_has_a_line_for_each_thing_and_a_remedy_for_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bwrap", lambda: None)
    monkeypatch.setattr(module, "_version", lambda name: None if name == "peft" else "1.2.3")
    lines = as_text(environment()).splitlines()
    assert any(re.fullmatch(r"torch +1\.2\.3", line) for line in lines)
    assert any(re.fullmatch(r"extra peft +peft -  \(pip install 'fastrl\[peft\]'\)", line) for line in lines)
    assert any(re.fullmatch(r"extra data +datasets 1\.2\.3, pyarrow 1\.2\.3", line) for line in lines)
    assert any(re.fullmatch(r"linear_logprob on cpu +(torch|native)", line) for line in lines)
    assert any(re.fullmatch(r"sandbox +bwrap is not installed: apt install bubblewrap", line) for line in lines)


def test_a_tool_that_is_absent_fails_or_hangs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    assert module._output("fastrl-no-such-tool") is None
    assert module._output("false") is None
    assert module._output("sleep", "5") is None
    assert module._output("echo", "hi") == "hi"
