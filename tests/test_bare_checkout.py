"""The kernel commands, the kernel tests and the benchmarks need torch, triton, numpy and pytest, and nothing else.

A machine with a GPU and without network has no more: here it is an environment of links to those distributions and
to what they require, and a copy of the files that git does not ignore.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BARE = ("torch", "triton", "numpy", "pytest")


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """Names of installed distributions: these, and what they require without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The interpreter of a bare environment and a bare checkout."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    base = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", base))
    for name in with_requirements(BARE):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(str(distribution(name).locate_file(top))).resolve()
            if not (site / top).exists():
                (site / top).symlink_to(source)
    checkout = tmp_path_factory.mktemp("checkout")
    list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name, follow_symlinks=False)
    return str(Path(sysconfig.get_path("scripts", "venv", base)) / "python"), checkout


def output(bare: tuple[str, Path], *arguments: str) -> str:
    python, checkout = bare
    kept = ("PATH", "HOME", "TMPDIR", "TRITON_CACHE_DIR", "OMP_NUM_THREADS", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [python, *arguments],
        cwd=checkout,
        env={**environment, "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_nothing_else_can_be_imported(bare: tuple[str, Path]) -> None:
    absent = ["transformers", "jsonargparse", "hypothesis", "safetensors", "rich", "yaml", "xdist", "pytest_timeout"]
    code = f"from importlib.util import find_spec; print([x for x in {absent} if find_spec(x)])"
    assert output(bare, "-c", code).strip() == "[]"


def test_the_kernel_commands_work(bare: tuple[str, Path]) -> None:
    listed = json.loads(output(bare, "-m", "fastrl.cli", "kernels", "list", "--json"))
    assert {"gae._gae", "linear_stats._product_partials"} <= {record["kernel"] for record in listed}
    (audited,) = json.loads(
        output(bare, "-m", "fastrl.cli", "kernels", "audit", "gae", "--targets", "sm_90", "--every", "1000", "--json")
    )
    assert audited["registers"] > 0
    checked = json.loads(output(bare, "-m", "fastrl.cli", "kernels", "check", "--device", "cpu", "--json"))
    assert {record["op"] for record in checked if record["milliseconds"]} >= {"gae", "linear_token_loss"}


def test_a_benchmark_row_runs(bare: tuple[str, Path], tmp_path: Path) -> None:
    output(bare, "-m", "bench", "group_advantage", "--device", "cpu", "--quick", "--results", str(tmp_path))
    (written,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert any(record.get("ms") for record in records)


def test_the_tests_of_kernels_and_ops_are_collected_and_run(bare: tuple[str, Path]) -> None:
    collected = output(bare, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert "tests/kernels/test_waist_kernels.py::test_on_a_gpu" in collected
    assert "tests/ops/test_linear_logprob.py::test_on_a_gpu" in collected
    files = ("tests/kernels/test_reverse_scan_kernel.py", "tests/ops/test_gemm.py")
    ran = output(bare, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert "hypothesis is not installed" in ran
    assert " passed" in ran
