"""The CUDA sources compile for every chip, without spills; what needs torch's CUDA headers compiles as C++."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed here")


def known_chips() -> str:
    return subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout


@needs_nvcc
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_a_cuda_source_compiles_for_every_chip_without_spills(name, tmp_path):
    chips = [chip for chip in ("80", "90", "100") if f"sm_{chip}" in known_chips().split()]
    target = tmp_path / "object.o"
    command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "csrc" / name), "-o", str(target)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 0
    assert all(f"for 'sm_{chip}'" in done.stderr for chip in chips)
    kernels = done.stderr.split("Compiling entry function '")[1:]
    ours = [kernel for kernel in kernels if "3cub" not in kernel.split("'")[0]]  # CUB's sort is the toolkit's affair
    assert ours
    assert {number for kernel in ours for number in re.findall(r"(\d+) bytes spill", kernel)} == {"0"}


@needs_nvcc
def test_the_registration_of_the_cuda_ops_compiles_against_torch_and_the_toolkit(tmp_path):
    headers = Path(torch.__file__).parent / "include"
    command = [NVCC, "-std=c++20", "-DUSE_CUDA", "-Xcompiler", "-Wall,-Werror", "-I", str(headers)]
    command += ["-c", str(ROOT / "csrc" / "cuda.cpp"), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_setup_builds_no_cuda_where_torch_has_none(tmp_path):
    pytest.importorskip("setuptools")
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA here")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastrl" / "kernels").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/was_called\n")
    compiler.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
        "CC": "/bin/false",
        "CXX": "/bin/false",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was_called").exists()
