"""`fastrl report signals RUN`: what the detectors say of a run's log, and what the run did about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fastrl.command.settings import Refused

USAGE = "usage: fastrl report signals RUN"


def run(arguments: Sequence[str]) -> int:
    """Print the signals of a run, recomputed from its log with its own thresholds; return 0, or 1 when any fired."""
    match list(arguments):
        case ["-h" | "--help"]:
            print(f"{USAGE}\n\nRUN is the output_dir of a run. Exit code 1 when a detector fired.")
            return 0
        case ["signals", path]:
            return _signals(Path(path))
    raise Refused(USAGE)


def _signals(path: Path) -> int:
    from fastrl.train.attend import actions_of, audit, causes_of, unseen
    from fastrl.train.config import SignalsBlock

    config = path / "run.json"
    stored = json.loads(config.read_text(encoding="utf-8")).get("signals", {}) if config.is_file() else {}
    known = {field.name for field in fields(SignalsBlock)}
    block = SignalsBlock(**{name: value for name, value in stored.items() if name in known})
    try:
        found = audit(path, block)
    except ValueError as error:
        raise Refused(str(error)) from error
    for name in dict.fromkeys(signal.name for signal in found):
        print(f"{name} (threshold {vars(block)[name]:g})")
        for signal in found:
            if signal.name == name:
                print(f"  step {signal.step}: {signal.text}")
        print("  may be: " + "\n          ".join(causes_of(name)))
    for step, name, action in actions_of(path):
        print(f"step {step}: the run answered {name} with {action}")
    if not found:
        print("no detector fires on this log; that is no proof of health")
    for text in unseen(path, block):
        print(f"cannot judge: {text}")
    return 1 if found else 0
