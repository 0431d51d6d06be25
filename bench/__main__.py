"""`python -m bench [ROW ...] [--quick] [--device cpu]`: check, time and record the rows of the registry."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.measure import FLOOR, disagreements, timings
from bench.records import put
from bench.registry import Row, Shape, all_rows

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("torch", "triton", "fastrl", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl")
SECONDS = {True: 3.0, False: 60.0}  # for the contenders of a shape together: quick or not
SEED = 0  # of every row's inputs
COLUMNS = ("median", "p10", "p90", "cold", "peak MiB", "TFLOP/s", "x floor", "error")
HEADER = " " * 28 + "".join(f"{name:>10}" for name in COLUMNS)


def main() -> None:
    """Run the rows named on the command line, all of them by default."""
    rows = all_rows()
    options = _options(rows)
    device = options.device
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    origin = provenance(device, quick=options.quick)
    for name in options.rows or rows:
        row = rows[name]
        shapes = row.quick_shapes if options.quick or device == "cpu" else row.shapes
        records = []
        for label, shape in shapes.items():
            print(f"\n{name}  {label} {shape}  {options.device} {dtype}".replace("torch.", ""))
            print(HEADER)
            for record in measured(row, shape, dtype=dtype, device=device, quick=options.quick):
                print(_line(record), flush=True)
                records.append({"row": name, "shape": {"name": label, "sizes": shape}, **record, **origin})
        put(options.results / f"{name}.{device}{'.quick' if options.quick else ''}.jsonl", records)


def measured(row: Row, shape: Shape, *, dtype: torch.dtype, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """One record per contender: its error, and its timing when it agrees with the specification."""
    dtype_name = str(dtype).removeprefix("torch.")
    try:
        errors = disagreements(row, shape, dtype=dtype, device=device)
    except RuntimeError as reason:  # the inputs cannot be made here: a data file is missing
        yield from ({"contender": name, "dtype": dtype_name, "cannot_run": str(reason)} for name in row.contenders)
        return
    baseline = next((x for x in errors.values() if isinstance(x, float)), 0.0)
    agreeing = [name for name, x in errors.items() if isinstance(x, float) and x <= baseline + row.slack]
    inputs = row.make_inputs(*shape, dtype=dtype, device=device)
    timed = timings(row, agreeing, inputs, device=device, repeats=9 if quick else 50, seconds=SECONDS[quick])
    useful = None if row.flops is None else row.flops(*shape)
    least = None if row.bytes is None else row.bytes(*shape, dtype.itemsize)
    floor = timed.pop(FLOOR, None)
    floor = None if isinstance(floor, str) else floor
    for name, found in errors.items():
        record: dict[str, Any] = {"contender": name, "dtype": dtype_name}
        if isinstance(found, str):
            yield {**record, "cannot_run": found}
        elif name not in timed:
            yield {**record, "max_error": found, "disagrees": True}
        elif isinstance(timing := timed[name], str):
            yield {**record, "max_error": found, "cannot_run": timing}
        else:
            ms = timing.ms
            rates = {
                "useful_tflops": None if useful is None else useful / ms / 1e9,
                "useful_gb_per_s": None if least is None else least / ms / 1e6,
                "floor_ratio": None if floor is None else ms / floor.ms,
            }
            yield {**record, "max_error": found, **rates, **asdict(timing)}


def provenance(device: str, *, quick: bool) -> dict[str, Any]:
    """What a number needs to be repeated: device, versions, commit, and whether the tree had changes."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{x: _version(x) for x in PACKAGES}},
        "cuda": torch.version.cuda,
        **(_gpu_state() if device == "cuda" else {}),
        "seed": SEED,
        "commit": _git("rev-parse", "HEAD"),
        "tree_has_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "quick": quick,
    }


def _options(rows: dict[str, Row]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="small shapes and 9 repeats")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSON lines")
    options = parser.parse_args()
    unknown = [name for name in options.rows if name not in rows]
    if unknown:
        parser.error(f"no row is called {unknown[0]!r}; there are {', '.join(rows)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def _line(record: dict[str, Any]) -> str:
    name = f"  {record['contender']:26}"
    if "cannot_run" in record:
        return f"{name}  cannot run: {record['cannot_run']}"
    if "disagrees" in record:
        return f"{name}  disagrees, not timed: error {record['max_error']:.1e}"
    peak = "-" if record["peak_gib"] is None else f"{1024 * record['peak_gib']:.1f}"
    rate = "-" if record["useful_tflops"] is None else f"{record['useful_tflops']:.3g}"
    ratio = "-" if record["floor_ratio"] is None else f"{record['floor_ratio']:.2f}"
    times = "".join(f"{record[x]:8.2f}ms" for x in ("ms", "ms_p10", "ms_p90", "cold_ms"))
    return f"{name}{times}{peak:>10}{rate:>10}{ratio:>10}{record['max_error']:>10.1e}"


def _gpu_state() -> dict[str, str | None]:
    """Driver and clocks as nvidia-smi gives them; None where there is no nvidia-smi."""
    fields = {"driver": "driver_version", "sm_clock": "clocks.sm", "memory_clock": "clocks.mem", "power": "power.limit"}
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except OSError:
        return dict.fromkeys(fields)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 else []
    return dict(zip(fields, values, strict=True)) if values else dict.fromkeys(fields)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    main()
