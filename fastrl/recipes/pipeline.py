"""Stages of training in a row, resumable: what is done and unchanged is not done again.

A stage is done when its run ended with 0; the pipeline then notes a fingerprint of everything the stage depends on:
its options and the contents of every file and model it reads. When the pipeline runs again, a stage with the same
fingerprint is skipped, a half-done one goes on from its checkpoint, and one whose inputs changed starts afresh beside
its old directory, which is kept under another name.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from fastrl.recipes.tiny import with_tiny
from fastrl.report.preview import print_table
from fastrl.train.config.pipeline import REFERENCE, PipelineConfig, Stage
from fastrl.train.contents import digest, quoted
from fastrl.train.durable import write_text
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.run_directory import CONFIG_FILE, RunDirectory, hold_directory
from fastrl.train.validate import problems

LEDGER_FILE = "pipeline.json"
DATA_FILE = "data.jsonl"
SHOWN = ("loss", "reward", "rewards/accuracies", "eval/loss", "eval/reward", "eval/accuracy")
# Where a stage writes and what it shows: no result depends on them.
NOT_INPUTS = ("output_dir", "output_file", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit")


def run(config: PipelineConfig) -> int:
    """Take every stage that is not done; return 0, or the exit code of the stage that ended otherwise."""
    with hold_directory(Path(config.output_dir)) as directory:
        ledger = _read_ledger(directory.path)
        for number, stage in enumerate(config.stages.values(), 1):
            resolved = with_tiny(_resolved(stage.config, directory.path))
            inputs = fingerprint(stage.recipe, resolved)
            heading = f"stage {number}/{len(config.stages)} {stage.name} ({stage.recipe})"
            known = ledger.get(stage.name, {})
            is_there = (directory.path / stage.name).is_dir()
            if is_there and known.get("inputs") == inputs and known.get("is_done"):
                print(f"{heading}: unchanged, skipped")
                continue
            print(f"\n{heading}", flush=True)
            started = perf_counter()
            code = _take(stage, resolved, inputs, directory, ledger)
            if code == 0:
                ledger[stage.name] |= {"is_done": True, "seconds": round(perf_counter() - started, 2)}
                _write_ledger(directory.path, ledger)
            if code != 0 or directory.interrupted():
                print(f"{heading}: stopped with exit code {code or EXIT_INTERRUPTED}; run the pipeline again to go on")
                return code or EXIT_INTERRUPTED
        _print_summary(config, directory.path, ledger)
    return 0


def _take(stage: Stage, resolved: Any, inputs: str, directory: RunDirectory, ledger: dict[str, Any]) -> int:
    """Run one stage, from its checkpoint when it was begun with the same inputs, and afresh otherwise."""
    folder = directory.path / stage.name
    is_begun = ledger.get(stage.name, {}).get("inputs") == inputs
    # A stage killed between its last file and the ledger has nothing to go on from: a dataset is there whole.
    if not is_begun or (folder / DATA_FILE).exists():
        _set_aside(folder)
        ledger[stage.name] = {"recipe": stage.recipe, "inputs": inputs, "is_done": False}
    elif (folder / CONFIG_FILE).is_file():
        _rename_inputs(folder / CONFIG_FILE, ledger[stage.name].get("root", ""), directory.path)
    ledger[stage.name]["root"] = str(directory.path)
    _write_ledger(directory.path, ledger)
    if "resume_from_checkpoint" in {field.name for field in fields(resolved)} and folder.exists():
        resolved = replace(resolved, resume_from_checkpoint="auto")
    wrong = problems(resolved)
    if wrong:
        raise ValueError(f"stage {stage.name}: {wrong[0]}")
    code = int(import_module(stage.module).run(resolved) or 0)
    gc.collect()  # the stage's models, before the next one's are loaded
    return code


def fingerprint(recipe: str, config: Any) -> str:
    """A digest of all that a stage's result depends on; a path counts by what is in the file or model it names."""
    contents = {
        name: _contents(value)
        for name, value in _leaves(asdict(config))
        if name not in NOT_INPUTS and not name.startswith("report.")
    }
    return hashlib.sha256(json.dumps([recipe, contents], sort_keys=True).encode()).hexdigest()


def _leaves(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _contents(value: Any) -> Any:
    """What stands for a value: digests in place of paths."""
    if isinstance(value, list | tuple):
        return [_contents(each) for each in value]
    if not isinstance(value, str):
        return value
    place = value.removeprefix("verl:").partition(":")[0]
    path = Path(value if not place.endswith(".py") else place)
    if path.is_file():
        return [value.removeprefix(place) if place.endswith(".py") else path.suffix, digest(path)]
    if path.is_dir():
        return {file.name: digest(file) for file in sorted(path.iterdir()) if file.suffix in (".json", ".safetensors")}
    options = [each for each in quoted(value) if Path(each).exists()]
    return [value, [_contents(each) for each in options]] if options else value


def _resolved(config: Any, root: Path) -> Any:
    """The configuration with directories in place of `${NAME}`."""

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return REFERENCE.sub(lambda found: str(root / found[1]), value)
        if isinstance(value, tuple):
            return tuple(filled(each) for each in value)
        return _resolved(value, root) if is_dataclass(value) else value

    return replace(config, **{field.name: filled(getattr(config, field.name)) for field in fields(config)})


def _set_aside(folder: Path) -> None:
    """Give the directory of older inputs another name; nothing is deleted."""
    if not folder.exists():
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(old)
    print(f"{folder} was made from other inputs; it is now {old.name}")


def _rename_inputs(stored: Path, old: str, root: Path) -> None:
    """Give what a half-done run read from earlier stages its place in a pipeline directory that was moved.

    Its contents are the same: the fingerprint holds.
    """
    before, after = (json.dumps(str(each)).strip('"') for each in (old, root))
    if old and before != after:
        text = stored.read_text(encoding="utf-8")
        write_text(stored, text.replace(f'"{before}/', f'"{after}/'))


def _read_ledger(root: Path) -> dict[str, Any]:
    path = root / LEDGER_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_ledger(root: Path, ledger: dict[str, Any]) -> None:
    write_text(root / LEDGER_FILE, json.dumps(ledger, indent=1) + "\n")


def _print_summary(config: PipelineConfig, root: Path, ledger: dict[str, Any]) -> None:
    rows = [
        [stage.name, stage.recipe, f"{ledger[stage.name]['seconds']:.0f} s", _result(root / stage.name)]
        for stage in config.stages.values()
    ]
    print_table("the pipeline is done", ("stage", "recipe", "time", "result"), rows)


def _result(folder: Path) -> str:
    """What a stage ended with, in a few words: accuracies, rows, or the last numbers of its log."""
    if (folder / "eval.json").is_file():
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        rewards = {name: each for name, each in found.items() if "mean" in each}  # beside them, how episodes went
        return ", ".join(f"{name} {each['mean']:.3f} ± {each['standard_error']:.3f}" for name, each in rewards.items())
    if (origin := folder / f"{DATA_FILE}.provenance.json").is_file():
        counts = json.loads(origin.read_text(encoding="utf-8"))["counts"]
        return f"{counts['rows']} rows of {counts['completions']} completions"
    last: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    shown = [f"{name} {last[name]:.3g}" for name in SHOWN if name in last]
    return ", ".join(shown)
