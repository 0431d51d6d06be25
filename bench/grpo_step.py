"""One GRPO step, rollouts included: fastrl's recipe against TRL's `GRPOTrainer`, same model, prompts, lengths, reward.

    python -m bench.grpo_step [--case NAME ...] [--trl MODE ...] [--steps 24] [--threads N]

A plain script rather than a row, because the contenders draw different tokens. What can be compared is, before
anything is timed: TRL is given fastrl's completions of the first batch, and both must report the same reward, loss
and gradient norm. Then both train in one process, in turns of a few steps. A step is timed from begin to begin:
sampling, decoding, judging, packing or padding, the update, the metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from transformers.utils import logging

from bench.__main__ import ROOT, provenance
from bench.grpo_step_task import CASES, SEED, Case, fastrl_config, reward_of, trl_settings, write_task
from bench.grpo_step_trl import MODES, TRLRun, trl_first_step
from bench.records import put
from fastrl.recipes.grpo import learn
from fastrl.report.journal import Journal
from fastrl.report.log import METRICS_FILE
from fastrl.train.collect import collect_round
from fastrl.train.model import load_tokenizer
from fastrl.train.order import row_at
from fastrl.train.policy_setup import set_up
from fastrl.train.snapshot import Progress

UNTIMED_STEPS, BLOCK = 2, 4  # the first steps of each side; then steps of one side before the other's turn
SAME_LENGTHS = 0.05  # relative difference allowed in sampled tokens; 24 steps of random lengths differ by 2 % or so
COLUMNS = ("ms", "ms_p10", "ms_p90", "ms_rollout", "ms_rest", "ms_cpu")
AGREEMENT = 1e-3  # relative, of reward, loss and gradient norm on the same completions, in float32


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step in milliseconds: all of it, the part spent sampling, and what the processor worked on it.

    On a machine that others use too, the wall clock of two contenders is comparable in pairs only; processor time
    stays what it is.
    """

    ms: float
    rollout_ms: float
    cpu_ms: float


class FastRLRun:
    """Owner of a fastrl run that is advanced in turns: the loop of `fastrl.recipes.grpo.run` without checkpoints."""

    def __init__(self, folder: Path, output_dir: Path, case: Case, *, steps: int) -> None:
        self.config = fastrl_config(folder, output_dir, case, steps=steps)
        self.resources = ExitStack()  # of an engine that holds nothing
        tokenizer = load_tokenizer(folder / "model", chat_template=None)
        self.setup = set_up(self.config, tokenizer, self.resources)
        self.journal = Journal(output_dir, title="", total_steps=steps, live=False, config={})
        self.progress = Progress()
        self.completions: list[tuple[int, ...]] = []  # of the last step, group by group
        self.lengths: list[int] = []

    def step(self) -> StepTime:
        """Take one step, as the recipe does."""
        started, worked = perf_counter(), process_time()
        setup = self.setup
        setup.sampler.engine.load_weights(setup.policy, self.progress.step)
        experience, ordinal = collect_round(
            setup.sampler, setup.prompts, first_ordinal=self.progress.ordinal, groups=setup.groups, max_rounds=0
        )
        progress = replace(self.progress, ordinal=ordinal)
        self.progress = learn(self.config, setup, self.journal, experience, progress)
        seconds, cpu_seconds = perf_counter() - started, process_time() - worked
        self.completions = [rollout.completion_ids for rollout in experience.rollouts]
        self.lengths += map(len, self.completions)
        return StepTime(1e3 * seconds, 1e3 * experience.seconds["rollout"], 1e3 * cpu_seconds)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the prompt file in the order in which the run visits them."""
        prompts = self.setup.prompts
        visited = [prompts[row_at(i, n=len(prompts), seed=SEED)] for i in range(len(prompts))]
        return [{"prompt": prompt.prompt, **prompt.columns} for prompt in visited]

    def close(self) -> None:
        self.journal.close()


def check_agreement(folder: Path, case: Case) -> dict[str, float]:
    """Let both take a step on the completions that fastrl sampled; return the relative difference of what they log.

    Raises:
        RuntimeError: they do not compute the same step, so comparing their times would mean nothing.
    """
    run = FastRLRun(folder, folder / "check", case, steps=1)
    run.step()
    run.close()
    logged = json.loads((folder / "check" / METRICS_FILE).read_text())
    theirs = trl_first_step(
        folder, run.rows(), run.completions, reward=reward_of(case), groups=case.groups, settings=trl_settings(case)
    )
    names = ("reward", "reward_std", "loss", "grad_norm")
    gaps = {name: abs(logged[name] - theirs[name]) / max(1e-3, abs(theirs[name])) for name in names}
    if max(gaps.values()) > AGREEMENT:
        sides = {name: (logged[name], theirs[name]) for name in names}
        raise RuntimeError(f"fastrl and TRL disagree on the same completions: {sides}")
    return gaps


def measured(case: Case, *, mode: str | None, steps: int) -> list[dict[str, Any]]:
    """Train with both contenders in turns of BLOCK steps, fastrl first in every turn; one record for each.

    Args:
        mode: how TRL generates; None measures fastrl alone.
        steps: timed steps of each contender, a multiple of BLOCK.
    """
    total = UNTIMED_STEPS + steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, case, steps=total)
        gaps = {} if mode is None else check_agreement(folder, case)
        fastrl = FastRLRun(folder, folder / "fastrl", case, steps=total)
        ours = [fastrl.step() for _ in range(UNTIMED_STEPS)]
        if mode is None:
            ours += [fastrl.step() for _ in range(steps)]
            fastrl.close()
            return [_record("fastrl", case, ours, fastrl.lengths)]

        def turn() -> None:
            ours.extend(fastrl.step() for _ in range(BLOCK))

        trl = TRLRun(mode, turn=turn, block=BLOCK, untimed=UNTIMED_STEPS)
        trl.train(folder, fastrl.rows(), reward=reward_of(case), steps=total, settings=trl_settings(case))
        fastrl.close()
    theirs = [StepTime(*times) for times in trl.times]
    pair = [
        _record("fastrl", case, ours, fastrl.lengths),
        _record(f"trl, {mode}", case, theirs, trl.lengths),
    ]
    tokens = [record["completion_tokens_per_step"] for record in pair]
    if abs(tokens[0] / tokens[1] - 1) > SAME_LENGTHS:
        raise RuntimeError(f"the contenders sampled {tokens} tokens a step, so their times cannot be compared")
    speedup = {
        "times_faster": pair[1]["ms"] / pair[0]["ms"],
        "times_faster_cpu": pair[1]["ms_cpu"] / pair[0]["ms_cpu"],
        "relative_difference_on_same_completions": gaps,
    }
    return [record | speedup for record in pair]


def _record(contender: str, case: Case, steps: Sequence[StepTime], lengths: Sequence[int]) -> dict[str, Any]:
    """Medians over the timed steps."""
    if not case.stops and set(lengths) != {case.length}:
        found = f"{min(lengths)} .. {max(lengths)} tokens"
        raise RuntimeError(f"{contender}: completions have {found}, not {case.length} each")
    timed = steps[UNTIMED_STEPS:]
    milliseconds = [step.ms for step in timed]
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {
        "contender": contender,
        "dtype": "float32",
        "ms": statistics.median(milliseconds),
        "ms_p10": deciles[0],
        "ms_p90": deciles[-1],
        "ms_rollout": statistics.median(step.rollout_ms for step in timed),
        "ms_rest": statistics.median(step.ms - step.rollout_ms for step in timed),
        "ms_cpu": statistics.median(step.cpu_ms for step in timed),
        "repeats": len(timed),
        "completion_tokens_per_step": sum(lengths) / len(steps),
    }


def _line(record: dict[str, Any]) -> str:
    times = "".join(f"{record[name]:9.1f}" for name in COLUMNS)
    return f"  {record['contender']:24}{times}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grpo_step", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--trl", nargs="+", choices=MODES, default=["dynamic"], help="how TRL generates")
    parser.add_argument("--steps", type=int, default=24, help=f"timed steps of each side, rounded up to {BLOCK}s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    steps = -(-options.steps // BLOCK) * BLOCK
    has_trl = find_spec("trl") is not None
    if not has_trl:
        print("TRL is not installed (pip install 'trl==1.16.0'): measuring fastrl alone")
    origin = provenance("cpu", quick=False) | {"seed": SEED}
    origin["versions"] |= {name: version(name) for name in ("transformers", "trl") if name != "trl" or has_trl}
    records = []
    for label in options.case:
        case = CASES[label]
        size = f"{case.groups} prompts x {case.generations} completions x {case.length} tokens"
        print(f"\n{label}: {size}, {options.threads} threads")
        print(f"  {'milliseconds a step':24}" + "".join(f"{name[3:] or 'median':>9}" for name in COLUMNS))
        shape = {"name": label, "sizes": asdict(case)}
        for mode in options.trl if has_trl else [None]:
            for record in measured(case, mode=mode, steps=steps):
                print(_line(record), flush=True)
                records.append({"row": "grpo_step", "shape": shape, **record, **origin})
            if mode is not None:
                last = records[-1]
                print(f"  fastrl: {last['times_faster']:.2f} x, in processor time {last['times_faster_cpu']:.2f} x")
    put(options.results / "grpo_step.cpu.jsonl", records)


if __name__ == "__main__":
    main()
