"""fastrl._C: what it registers, what it refuses, what happens without it, and how setup.py builds or goes without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastrl.ops.backend
from fastrl.ops.gae import gae
from fastrl.ops.group_advantage import group_advantage
from fastrl.ops.reverse_scan import reverse_scan

ROOT = Path(__file__).resolve().parents[1]
IS_BUILT = find_spec("fastrl._C") is not None
if IS_BUILT:
    import_module("fastrl._C")  # registers torch.ops.fastrl.*
built = pytest.mark.skipif(not IS_BUILT, reason="fastrl._C is not built here")

CALLS = {
    "reverse_scan": lambda backend: reverse_scan(torch.ones(3), torch.ones(3), torch.tensor([0, 3]), backend=backend),
    "gae": lambda backend: (
        gae(
            torch.ones(3),
            torch.zeros(3),
            torch.tensor([0, 3]),
            torch.ones(3, dtype=torch.bool),
            lam=1.0,
            backend=backend,
        ).advantage
    ),
    "group_advantage": lambda backend: group_advantage(
        torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3).long(), eps=0.0, backend=backend
    ),
}
RESULTS = {"reverse_scan": [3.0, 2.0, 1.0], "gae": [3.0, 2.0, 1.0], "group_advantage": [-1.0, 0.0, 1.0]}


@built
@pytest.mark.parametrize("op", CALLS)
def test_native_is_what_runs_on_cpu_when_it_is_built(op, monkeypatch):
    calls = []
    packet = getattr(torch.ops.fastrl, op)
    monkeypatch.setattr(torch.ops.fastrl, op, lambda *inputs: calls.append(op) or packet(*inputs))
    assert CALLS[op](None).tolist() == RESULTS[op]
    assert calls == [op]


@pytest.mark.parametrize("op", CALLS)
def test_without_the_extension_the_default_is_torch_and_asking_for_native_raises(op, monkeypatch):
    monkeypatch.setattr(fastrl.ops.backend, "_extension_is_loaded", lambda: False)
    assert CALLS[op](None).tolist() == RESULTS[op]
    with pytest.raises(RuntimeError, match=f"backend 'native' of {op} needs the compiled extension 'fastrl._C'"):
        CALLS[op]("native")


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_many_sequences_are_shared_out_among_threads_without_a_trace(threads):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 400, (500,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    x = torch.randn(int(cu_seqlens[-1]), generator=generator, dtype=torch.float64)
    decay = torch.rand(len(x), generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = reverse_scan(x, decay, cu_seqlens, backend="native")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, reverse_scan(x, decay, cu_seqlens, backend="torch"), rtol=1e-12, atol=1e-12)


@built
def test_direct_calls_with_wrong_memory_raise_instead_of_reading_it():
    ones, cut = torch.ones(4), torch.tensor([0, 4])
    scan = torch.ops.fastrl.reverse_scan
    for inputs, message in (
        ((ones, torch.ones(3), cut), "decay must be a contiguous CPU vector of length 4"),
        ((ones, torch.ones(8)[::2], cut), "decay must be a contiguous"),
        ((ones, ones.double(), cut), "expected scalar type Float"),
        ((ones, ones, torch.tensor([0, 5])), "cu_seqlens must rise from 0 to 4"),
        ((ones, ones, torch.tensor([0, 3, 2, 4])), "cu_seqlens must rise from 0 to 4"),
        ((ones, ones, cut.int()), "expected scalar type Long"),
        ((ones.long(), ones.long(), cut), "expected scalar type Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            scan(*inputs)
    with pytest.raises(RuntimeError, match="group must be"):
        torch.ops.fastrl.group_advantage(ones, torch.zeros(3).long(), 1, 1, 1, 1e-4)


@pytest.fixture
def checkout(tmp_path):
    """What setup.py needs of the tree, to be broken freely."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastrl" / "kernels").mkdir(parents=True)
    return tmp_path


def run_setup(folder, *arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_a_broken_compiler_ends_in_a_pure_install_with_one_line(checkout):
    pytest.importorskip("setuptools")
    done = run_setup(checkout, "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installing without the native CPU ops (the C++ build failed") == 1
    assert not list((checkout / "fastrl").glob("_C*"))


def test_a_symlink_checked_out_as_a_file_stops_the_install_with_the_remedy(checkout):
    pytest.importorskip("setuptools")
    (checkout / "fastrl" / "kernels").rmdir()
    (checkout / "fastrl" / "kernels").write_text("../kernels")
    done = run_setup(checkout, "build_ext")
    assert done.returncode != 0
    assert "git config core.symlinks true" in done.stderr.splitlines()[-1]
