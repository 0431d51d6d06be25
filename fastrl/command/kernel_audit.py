"""`fastrl kernels audit`: every listed configuration of every kernel, compiled for every chip; no GPU is needed.

Each `kernels/*.py` lists in `AUDIT` what its launchers may choose: `kernel`, `signature`, `constexprs`, `num_warps`,
`num_stages` and, where they apply, other compiler `options`, the only `targets` it runs on, and `tensor_core` where
the product must use such instructions. A type may end in ":16" (divisible by 16); pointers are aligned, as torch's
are. Compilation runs in worker processes with Triton's interpreter switched off.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A chip: what Triton calls it, threads per warp, and bytes of shared memory one program may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}
# Tensor-core instructions of PTX and of AMD's assembly.
TENSOR_CORE = re.compile(r"^\s*(?:@\S+\s+)?(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_|v_smfmac_)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Audited:
    """One configuration on one chip; the numbers are None when it does not compile.

    Attributes:
        kernel: file of kernels/ and device function, with a dot between them.
        config: its types, constants and warps.
        target: key of TARGETS.
        registers: of a thread.
        spills: bytes of a thread spilled to memory, stores and loads (on AMD registers of a thread).
        shared_bytes: of a program.
        stack: bytes of a thread's local memory.
        tensor_core: instructions in the assembly.
        problem: why it fails the audit; None when it passes.
    """

    kernel: str
    config: str
    target: str
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    stack: int | None = None
    tensor_core: int | None = None
    problem: str | None = None


def audit(
    modules: Sequence[str] = (),
    targets: Sequence[str] = (),
    *,
    every: int = 1,
    rotate: bool = False,
    jobs: int | None = None,
) -> list[Audited]:
    """Compile and measure.

    Args:
        modules: files of kernels/ by name; all when empty.
        targets: keys of TARGETS; all when empty.
        every: take each n-th configuration of a file: a sample in place of the whole.
        rotate: compile a configuration for one of its chips only, the next one for the next chip: a third of the work.
        jobs: worker processes; one per core by default.

    Returns:
        one record per configuration and chip, in the order of the files.

    Raises:
        ValueError: an unknown file or chip.
        RuntimeError: triton is not installed, or a worker died.
    """
    jobs = jobs or os.cpu_count() or 1
    task = {**_choice(modules, targets), "every": every, "rotate": rotate, "jobs": jobs}
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda job: _worker(json.dumps({**task, "job": job})), range(jobs)))
    found = [record for part in parts for record in part]
    return [Audited(**record) for _, record in sorted(found, key=lambda pair: pair[0])]


def listed(modules: Sequence[str] = (), targets: Sequence[str] = ()) -> list[Audited]:
    """What `audit` would compile, without numbers; raises as it does."""
    return [_named(*x) for x in _everything({**_choice(modules, targets), "every": 1, "rotate": False})]


def _choice(modules: Sequence[str], targets: Sequence[str]) -> dict[str, list[str]]:
    if find_spec("triton") is None:
        raise RuntimeError("the kernels need the module 'triton', which is not installed")
    chosen = list(modules) or known_modules()
    for kind, names, known in (("kernel file", chosen, known_modules()), ("target", targets, TARGETS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(known)}")
    return {"modules": chosen, "targets": list(targets) or list(TARGETS)}


def known_modules() -> list[str]:
    """The files of kernels/, by name."""
    folder = Path(__file__).resolve().parent.parent / "kernels"
    return sorted(path.stem for path in folder.glob("*.py"))


def _worker(task: str) -> list[tuple[int, dict[str, Any]]]:
    """The records of one worker process, with their places in the whole."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what launches do before Triton 3.10, said aloud
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "fastrl.command.kernel_audit", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"a compiling process ended with code {done.returncode}: {last[0]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def _work(task: Mapping[str, Any]) -> None:
    """In the worker: compile this job's share and print a line of JSON for each."""
    everything = _everything(task)
    for place in range(task["job"], len(everything), task["jobs"]):
        print(json.dumps([place, asdict(_audited(*everything[place]))]), flush=True)


def _everything(task: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """File, entry and target of each compilation."""
    found = []
    entries_of: Counter[str] = Counter()
    for module, entry in _entries(task["modules"], task["every"]):
        place = entries_of[entry["kernel"].__name__]
        entries_of[entry["kernel"].__name__] += 1
        targets = [target for target in task["targets"] if target in entry.get("targets", TARGETS)]
        if task["rotate"] and targets:
            # The second term breaks step with options that alternate in the lists.
            targets = [targets[(place + place // len(targets)) % len(targets)]]
        found += [(module, entry, target) for target in targets]
    return found


def _entries(modules: Sequence[str], every: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for module in modules:
        # A file without kernels (tables, shared device functions) has nothing to list.
        for entry in vars(import_module(f"fastrl.kernels.{module}")).get("AUDIT", ())[::every]:
            yield module, entry


def _named(module: str, entry: Mapping[str, Any], target: str) -> Audited:
    return Audited(f"{module}.{entry['kernel'].__name__}", _configuration(entry), target)


def _audited(module: str, entry: Mapping[str, Any], target: str) -> Audited:
    named = _named(module, entry, target)
    try:
        compiled = _compiled(entry, TARGETS[target])
    except Exception as error:  # what the compiler raises is the finding, whatever its type
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return _with(named, problem=f"does not compile: {lines[-1]}")
    measured = _of_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _of_nvidia(compiled, target)
    shared, limit = int(compiled.metadata.shared), TARGETS[target].shared_limit
    problems = []
    if measured["spills"]:
        problems.append(f"spills {measured['spills']}")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, the chip has {limit}")
    if entry.get("tensor_core") and not measured["tensor_core"]:
        problems.append("a product without tensor-core instructions")
    return _with(named, **measured, shared_bytes=shared, problem="; ".join(problems) or None)


def _with(record: Audited, **changes: Any) -> Audited:
    return Audited(**{**asdict(record), **changes})


def _configuration(entry: Mapping[str, Any]) -> str:
    """ "fp32 i64 BLOCK=1024 4 warps": pointed-to types, then the constants, then what the launcher sets."""
    types = dict.fromkeys(kind.strip("*").split(":")[0] for kind in entry["signature"].values() if kind[0] == "*")
    constants = [f"{key}={value}" for key, value in entry["constexprs"].items()]
    return " ".join([*types, *constants, f"{entry['num_warps']} warps", f"{entry['num_stages']} stages"])


def _compiled(entry: Mapping[str, Any], target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = entry["kernel"]
    kinds = {name: entry["signature"].get(name, "constexpr") for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, kind in enumerate(kinds.values()) if kind[0] == "*" or kind.endswith(":16")}
    source = ASTSource(
        fn=kernel,
        signature={name: kind.removesuffix(":16") for name, kind in kinds.items()},
        constexprs=dict(entry["constexprs"]),
        attrs=attributes,
    )
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"], **entry.get("options", {})}
    chip = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=chip, options=options)


def _of_nvidia(compiled: Any, target: str) -> dict[str, int]:
    """What ptxas reports when it assembles the kernel as Triton does."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx, tool = compiled.asm["ptx"], get_ptxas(TARGETS[target].arch)
    chip = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    flags = [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"]
    if int(tool.version.split(".")[0]) >= 13:
        flags.append("--regAllocOptLevel=2")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", *flags, f"--gpu-name={chip}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": _sum(r"Used (\d+) registers", report),
        "spills": _sum(r"(\d+) bytes spill (?:stores|loads)", report),
        "stack": _sum(r"(\d+) bytes stack frame", report),
        "tensor_core": len(TENSOR_CORE.findall(ptx)),
    }


def _of_amd(assembly: str) -> dict[str, int]:
    """What the metadata at the end of the assembly says."""
    stack = _sum(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    # Without a stack a spilled scalar sits in a lane of a vector register, not in memory.
    spilled = r"\.[sv]gpr_spill_count" if stack else r"\.vgpr_spill_count"
    return {
        "registers": _sum(r"\.vgpr_count:\s+(\d+)", assembly),
        "spills": _sum(rf"{spilled}:\s+(\d+)", assembly),
        "stack": stack,
        "tensor_core": len(TENSOR_CORE.findall(assembly)),
    }


def _sum(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
