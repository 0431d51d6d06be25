"""Runs a host's own tests with fastrl's names swapped in.

    python tests/hosts/run.py liger --checkout path/to/Liger-Kernel          the host's tests
    python tests/hosts/run.py liger                                          no checkout: our own vectors
    python tests/hosts/run.py trl --env path/to/venv -- -k dpo               an environment of yours; pytest options

Test files are read where they lie and copied nowhere. A pytest plugin of this folder (`fastrl_host_<host>`) replaces
the host's names before its tests import them. What cannot run is listed by name with the reason.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "build" / "hosts"


@dataclass(frozen=True, slots=True)
class Host:
    """A peer whose tests are run.

    Attributes:
        requirements: for pip, besides torch and pytest.
        tests: paths inside a checkout.
        vectors: our own tests, relative to the root, where there is no checkout.
        source: folder of a checkout that goes onto the path; None where the package is installed.
        cannot: path -> why no machine without a GPU runs it.
        vectors_run_it: whether our own tests run the peer too, in its environment; else they need nothing of it.
    """

    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    vectors: tuple[str, ...]
    source: str | None = None
    cannot: tuple[tuple[str, str], ...] = ()
    vectors_run_it: bool = False


CHUNKED = tuple(
    f"test/chunked_loss/test_{name}_loss.py" for name in ("grpo", "dpo", "orpo", "cpo", "simpo", "kto", "jsd")
)
LINEAR = ("grpo_loss", "fused_linear_cross_entropy", "fused_linear_scaled_cross_entropy")
TRL_TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
HOSTS = {
    "liger": Host(
        ("liger-kernel>=0.8.2", "transformers>=4.57,<6"),
        (*CHUNKED, *(f"test/transformers/test_{name}.py" for name in LINEAR)),
        ("tests/integrations/liger",),
    ),
    "trl": Host(
        ("trl>=1.16,<2", "peft>=0.18", "parameterized"),
        tuple(f"tests/test_{name}.py" for name in ("kernels", "utils", *(f"{x}_trainer" for x in TRL_TRAINERS))),
        tuple(f"tests/integrations/test_trl{part}.py" for part in ("", "_head", "_logits", "_packing", "_runs")),
        vectors_run_it=True,
    ),
    "prime_rl": Host(
        ("transformers>=4.57,<6", "loguru", "jaxtyping", "beartype", "setproctitle", "psutil", "wandb"),
        ("tests/unit/train/rl/test_fused_lm_head.py",),
        ("tests/integrations/test_prime_rl.py",),
        source="src",
    ),
    "verl": Host(
        ("transformers>=4.57,<6", "omegaconf", "tensordict", "codetiming", "hydra-core", "ray", "torchdata"),
        ("tests/utils/test_linear_cross_entropy.py",),
        ("tests/integrations/test_verl.py",),
        source=".",
        cannot=(
            ("tests/utils/test_linear_cross_entropy.py", "every case allocates on CUDA, and pytest collects none"),
        ),
    ),
}


def main() -> int:
    """Parse, make the environment, run, report."""
    own, rest = (sys.argv[1:], [])
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=sorted(HOSTS))
    parser.add_argument("--checkout", type=Path, help="the peer's repository; without it our own vectors are run")
    parser.add_argument("--env", type=Path, help="a virtual environment with the peer; else one is made in build/hosts")
    arguments = parser.parse_args(own)
    host = HOSTS[arguments.host]
    if arguments.checkout is None:
        print(f"no --checkout of {arguments.host} was given: running our own vectors, {', '.join(host.vectors)}")
        return _vectors(arguments.host, host, arguments.env, rest)
    checkout = arguments.checkout.resolve()
    missing = [test for test in host.tests if not (checkout / test).is_file()]
    for test in missing:
        print(f"cannot run  {test}: not in this checkout")
    for test, reason in host.cannot:
        print(f"cannot run  {test}: {reason}")
    tests = [test for test in host.tests if test not in {*missing, *(name for name, _ in host.cannot)}]
    if not tests:
        print(f"running our own vectors instead, {', '.join(host.vectors)}")
        return _vectors(arguments.host, host, arguments.env, rest)
    python = _python(arguments.host, host, arguments.env)
    path = [] if host.source is None else [checkout / host.source]
    plugin = ["-p", f"fastrl_host_{arguments.host}", "-p", "no:cacheprovider"]
    return _pytest(python, checkout, tests, path, [*plugin, *rest])


def _vectors(name: str, host: Host, given: Path | None, options: list[str]) -> int:
    """Our own tests, by the Python that runs this where they need nothing of the peer."""
    is_own = given is None and not host.vectors_run_it
    python = Path(sys.executable) if is_own else _python(name, host, given)
    return _pytest(python, ROOT, host.vectors, [], options)


def _python(name: str, host: Host, given: Path | None) -> Path:
    return (given or _environment(name, host)) / "bin" / "python"


def _environment(name: str, host: Host) -> Path:
    """A virtual environment with the peer, made the first time."""
    folder = ENVIRONMENTS / name
    if (folder / "complete").exists():
        return folder
    print(f"installing {', '.join(host.requirements)} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = ["torch==2.13.0", "numpy", "pytest", "hypothesis", *host.requirements]  # one call: no second, CUDA, torch
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    (folder / "complete").touch()
    return folder


def _pytest(
    python: Path, folder: Path, tests: tuple[str, ...] | list[str], path: list[Path], options: list[str]
) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "result.xml"
        search = os.pathsep.join(str(x) for x in (ROOT, Path(__file__).parent, *path))
        environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-m", "pytest", "-q", "--tb=line", f"--junitxml={record}", *tests, *options]
        code = subprocess.run(command, cwd=folder, env=environment).returncode
        if not record.exists():
            print("pytest did not run: see above")
            return code
        return _report(record)


def _report(record: Path) -> int:
    """Counts, and by name what failed and what could not run; cases of one test and one reason in one line."""
    failed, cannot, passed = Counter[str](), Counter[tuple[str, str]](), 0
    for case in ElementTree.parse(record).iter("testcase"):
        name = f"{case.get('classname')}::{(case.get('name') or '').split('[')[0]}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed[name] += 1
        elif skipped is not None:
            cannot[name, (skipped.get("message") or "").splitlines()[0]] += 1
        else:
            passed += 1
    for (name, reason), count in sorted(cannot.items()):
        print(f"cannot run  {name} x {count}: {reason}")
    for name, count in sorted(failed.items()):
        print(f"failed      {name} x {count}")
    print(f"{passed} passed, {sum(failed.values())} failed, {sum(cannot.values())} cannot run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
