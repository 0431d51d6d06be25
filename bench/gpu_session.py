"""One command for a GPU machine without network: tests, checks, benchmarks and tile timings, within a time budget.

    python bench/gpu_session.py --out DIR [--minutes 8] [--wheels FOLDER] [--dry-run]

Nothing but torch, triton and transformers is needed, and nothing is installed into the machine's Python; --wheels
unpacks the contenders that bench/offline.py packed, for this run alone. Each stage has a share of the time that is
left, and what it does not use goes to the next. Work is done in child processes, one record per line as soon as it is
known; a child that crashes, hangs or breaks the device is replaced and goes on with the next item. DIR then holds:

    log.txt       everything that was printed          session.json  the stages, their ends, device and versions
    check.jsonl   fastrl kernels check                 bench.jsonl   benchmark records, the most telling rows first
    tune.jsonl    each candidate's time                tuned.json    the fastest per (architecture, kernel, shape)

`--dry-run` does the same on a CPU in two to five minutes, at sizes that prove only that every line runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"tests": 0.3, "check": 0.3, "bench": 0.65, "tune": 1.0}  # of what is left when the stage begins
SILENCE = 100.0  # seconds without a record or a line of log after which a child counts as hung
RESERVE = 8.0  # seconds kept for writing the end


def main() -> int:
    """Run the session, or in a child one stage's items.

    Returns:
        0 when every stage ended by itself and found nothing, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--wheels", type=Path, help="folder of pieces made by `python bench/offline.py pack`")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from bench.offline import unpack

    out = options.out.resolve()  # children work in the repository's folder
    if options.child:
        child(options.child, options.skip, out, dry=options.dry_run)
        return 0
    if not 0 < options.minutes < 24 * 60:
        parser.error(f"--minutes must be above 0 and less than a day, got {options.minutes:g}")
    if out.is_file() or any((out / f"{stage}.jsonl").exists() for stage in SHARES):
        parser.error(f"--out {out} has results already or is a file; name a new folder, so that nothing is lost")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that children are ended, too
    started = time.monotonic()
    try:
        # dill pickles the contents of packages that are not in a folder of this name, and fails on pyarrow's.
        folder = out.parent / "contenders" / "site-packages"
        site = unpack(options.wheels, folder) if options.wheels else None
    except ValueError as error:
        parser.error(f"--wheels: {error}")
    seconds = 60 * options.minutes - (time.monotonic() - started)
    return session(out, seconds, dry=options.dry_run, site=site)


def session(out: Path, seconds: float, *, dry: bool, site: Path | None = None) -> int:
    """All stages, in time; session.json is rewritten after each.

    Args:
        site: folder of the contenders' packages; the machine's own come first.
    """
    stop = time.monotonic() + seconds - RESERVE
    environment = {**os.environ, "TRITON_INTERPRET": "1" if dry else "0", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH"), None if site is None else str(site)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    summary: dict[str, Any] = {"dry_run": dry, "minutes": seconds / 60, "stages": {}}
    for name in ("check", "bench", "tune"):
        (out / f"{name}.jsonl").write_text("")
    with (out / "log.txt").open("a", buffering=1) as log:
        for stage, share in SHARES.items():
            begin = time.monotonic()
            end = begin + share * max(0.0, stop - begin)
            print(f"== {stage}: {end - begin:.0f} s", file=log)
            run = tests if stage == "tests" else items
            summary["stages"][stage] = {
                **run(stage, out, end, log, environment, dry),
                "seconds": round(time.monotonic() - begin, 1),
            }
            (out / "session.json").write_text(json.dumps(summary, indent=1))
            print(f"{stage}: {json.dumps(summary['stages'][stage])}", flush=True)
    from bench.tune import best

    (out / "tuned.json").write_text(json.dumps(best(_records(out / "tune.jsonl")), indent=1))
    return 0 if all(stage["ok"] for stage in summary["stages"].values()) else 1


def tests(_: str, out: Path, end: float, log: Any, environment: dict[str, str], dry: bool) -> dict[str, Any]:
    """The tests that need a GPU, in four processes where pytest-xdist is there: most of their time is compilation."""
    folders = [folder for folder in ("tests/kernels", "tests/ops", "tests/train") if (ROOT / folder).is_dir()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", *folders]
    command += ["-p", "no:cacheprovider", "--durations", "10"]
    if dry:
        command += ["--collect-only"]
    elif find_spec("xdist") is not None:
        command += ["-n", "4"]
    process = _start(command, environment, log)
    try:
        code = _wait(process, end)
    finally:
        _kill(process)
    return {"ok": code == 0, "code": code}


def items(stage: str, out: Path, end: float, log: Any, environment: dict[str, str], dry: bool) -> dict[str, Any]:
    """Children work through a stage's items until the time is over; one that ends early is replaced."""
    path = out / f"{stage}.jsonl"
    skip, restarts, finished = 0, 0, False
    while not finished and time.monotonic() < end:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", stage, "--skip", str(skip)]
        process = _start([*command, "--out", str(out), *(["--dry-run"] if dry else [])], environment, log)
        try:
            code = _watch(process, (path, out / "log.txt"), end)
        finally:
            _kill(process)
        begun = [record["item_number"] for record in _records(path) if "item_number" in record]
        finished = code == 0
        # Without a new item the child cannot even start: three such and the stage is given up.
        skip, restarts = (max(begun) + 1, restarts) if begun and max(begun) >= skip else (skip, restarts + 1)
        if restarts >= 3:
            break
    bad = [record for record in _records(path) if record.get("problem") or record.get("item_failed")]
    return {"ok": finished and not bad, "finished": finished, "records": len(_records(path)), "problems": bad}


def child(stage: str, skip: int, out: Path, *, dry: bool) -> None:
    """In the child: the items from number `skip` on, each record appended to the stage's file at once."""
    import torch

    from bench.gpu_items import work
    from fastrl.kernels.tuning import architecture

    device = "cpu" if dry else "cuda"
    extra = {"device": "cpu", "architecture": "interpreted"}
    if device == "cuda":
        extra = {"device": torch.cuda.get_device_name(), "architecture": architecture(torch.device("cuda"))}
    with (out / f"{stage}.jsonl").open("a", buffering=1) as file:
        file.write("\n")  # the child before may have been killed in the middle of a line
        for number, (name, records) in enumerate(work(stage, device)):
            if number < skip:
                continue
            file.write(json.dumps({"item": name, "item_number": number}) + "\n")
            try:
                for record in records:
                    file.write(json.dumps({**record, **extra}) + "\n")
            except Exception as failure:  # written down; the other items go on
                file.write(json.dumps({"item": name, "item_failed": f"{type(failure).__name__}: {failure}"}) + "\n")
            if device == "cuda":
                torch.cuda.synchronize()  # a device that is broken raises here: the parent starts a fresh child
                torch.cuda.empty_cache()


def _start(command: list[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    # A session of its own, so that its children die with it.
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """The exit code; None when the time was over first."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        _kill(process)
        return None


def _watch(process: subprocess.Popen[bytes], paths: Sequence[Path], end: float) -> int | None:
    """Like `_wait`; a child that has written nothing into any of the files for SILENCE seconds is over, too."""
    sizes, heard = _sizes(paths), time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if _sizes(paths) != sizes:
            sizes, heard = _sizes(paths), now
        if now >= end or now - heard > SILENCE:
            _kill(process)
            return None
        time.sleep(0.2)
    return process.returncode


def _sizes(paths: Sequence[Path]) -> list[int]:
    return [path.stat().st_size for path in paths]


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself in the meantime
    process.wait()


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a child may have been killed in the middle of one."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
