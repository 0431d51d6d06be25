"""`fastrl env sandbox` says which layers hold."""

from __future__ import annotations

import pytest

from fastrl.cli import main
from fastrl.rewards.sandbox import layers as layers_module
from fastrl.rewards.sandbox import self_test as self_test_module
from fastrl.rewards.sandbox.layers import Layers

ALL = Layers("/usr/bin/python3", ("/usr/lib",), "/usr/bin/bwrap", drops_uid=True, landlock=True, seccomp=True)


def lines_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layers: Layers,
    leaks: dict[str, list[str]],
) -> tuple[int, dict[str, str]]:
    from fastrl.rewards.sandbox import sandbox as sandbox_module

    monkeypatch.setattr(layers_module, "found_layers", lambda: layers)
    for module in (self_test_module, sandbox_module):
        monkeypatch.setattr(module, "self_test", lambda *_: dict(leaks))
    code = main(["env", "sandbox"])
    printed = capsys.readouterr().out.splitlines()
    return code, {line.split()[0]: line.split(maxsplit=1)[1] for line in printed}


def test_every_layer_that_holds_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = lines_for(monkeypatch, capsys, ALL, {})
    assert code == 0
    holding = dict.fromkeys(("uid", "bwrap", "landlock", "seccomp", "rlimits"), "holds")
    assert lines == {"python": "/usr/bin/python3", **holding, "strict": "works", "weaker": "works"}


def test_a_missing_layer_has_its_remedy_and_a_leak_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_bwrap = Layers("/usr/bin/python3", ("/usr/lib",), drops_uid=True, landlock=True, seccomp=True)
    code, lines = lines_for(monkeypatch, capsys, without_bwrap, {})
    assert code == 1
    assert lines["bwrap"].startswith("missing: apt-get install bubblewrap")
    assert lines["strict"].startswith("refuses: the sandbox lacks bwrap")
    assert lines["weaker"] == "works without bwrap"
    code, lines = lines_for(monkeypatch, capsys, ALL, {"seccomp": ["unshare works"]})
    assert code == 1
    assert lines["seccomp"] == "leaks: unshare works"
    assert lines["strict"] == lines["weaker"] == "refuses: the sandbox does not hold: seccomp: unshare works"
    code, lines = lines_for(monkeypatch, capsys, ALL, {"start": ["INFRA: no"]})
    assert lines["landlock"] == "unknown"


def test_other_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "sandbx"]) == 2
    assert "usage: fastrl env [--json] | sandbox" in capsys.readouterr().err
