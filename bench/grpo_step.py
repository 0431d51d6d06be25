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
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.__main__ import ROOT, provenance, write
from bench.grpo_step_trl import MODES, TRLRun, trl_first_step
from fastrl.recipes.grpo import learn, set_up
from fastrl.report.journal import Journal
from fastrl.report.log import METRICS_FILE
from fastrl.train.collect import collect_round
from fastrl.train.config import GRPOConfig, ReportBlock
from fastrl.train.export import save_pretrained
from fastrl.train.model import load_tokenizer
from fastrl.train.order import row_at
from fastrl.train.snapshot import Progress
from fastrl.train.tiny import make_tiny_qwen3

CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz.,?"
EOS, PAD = "<eos>", "<pad>"
GROUPS, GENERATIONS, LENGTH = 8, 8, 32  # prompts of a step, completions of each, tokens of each
SEED = 0
UNTIMED_STEPS, BLOCK = 2, 4  # the first steps of each side; then steps of one side before the other's turn
AGREEMENT = 1e-3  # relative, of reward, loss and gradient norm on the same completions, in float32


@dataclass(frozen=True, slots=True)
class Case:
    """The size of a model; its vocabulary is the characters, its prompts have 6 tokens."""

    hidden: int
    layers: int
    heads: int


CASES = {"D=128, 4 layers": Case(128, 4, 4), "D=64, 2 layers": Case(64, 2, 4)}


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step in milliseconds: all of it, and the part spent sampling."""

    ms: float
    rollout_ms: float


def vowel_share(completions: Sequence[str], **columns: object) -> list[float]:
    """Reward of both contenders: vowels, weighed by place so that ties in a group are rare; in [0, 1]."""
    total = LENGTH * (LENGTH + 1) / 2
    return [sum(i for i, letter in enumerate(text, 1) if letter in "aeiou") / total for text in completions]


def write_task(folder: Path, case: Case, *, steps: int) -> None:
    """Write `model/` and `prompts.jsonl`: different prompts of one length, enough for `steps`."""
    tokenizer = _tokenizer()
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=case.hidden,
        layers=case.layers,
        heads=case.heads,
        intermediate_size=2 * case.hidden,
        context=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_embeddings=False,
        seed=SEED,
    )
    # Equal lengths by construction: coordinate 0 of the residual stream is the same positive number everywhere, and
    # the heads of EOS and padding read nothing else, with a large negative weight. Nobody ever samples them.
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
        head = model.get_output_embeddings().weight
        head[[tokenizer.eos_token_id, tokenizer.pad_token_id]] = 0.0
        head[[tokenizer.eos_token_id, tokenizer.pad_token_id], 0] = -100.0
    save_pretrained(model, tokenizer, folder / "model", card="A tiny Qwen3 with random weights that never stops.")
    prompts = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)][: GROUPS * steps]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


class FastRLRun:
    """Owner of a fastrl run that is advanced in turns: the loop of `fastrl.recipes.grpo.run` without checkpoints."""

    def __init__(self, folder: Path, output_dir: Path, *, steps: int) -> None:
        self.config = GRPOConfig(
            model_name_or_path=str(folder / "model"),
            output_dir=str(output_dir),
            train_dataset=str(folder / "prompts.jsonl"),
            seed=SEED,
            max_steps=steps,
            per_device_train_batch_size=GROUPS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            learning_rate=1e-5,
            reward_funcs=("bench.grpo_step:vowel_share",),
            parity="trl",
            logging_steps=10,
            device="cpu",
            report=ReportBlock(panel=False),
        )
        self.setup = set_up(self.config, load_tokenizer(folder / "model", chat_template=None))
        self.journal = Journal(output_dir, title="", total_steps=steps, live=False, config={})
        self.progress = Progress()
        self.completions: list[tuple[int, ...]] = []  # of the last step, group by group
        self.lengths: list[int] = []

    def step(self) -> StepTime:
        """Take one step, as the recipe does."""
        started = perf_counter()
        setup = self.setup
        setup.sampler.engine.load_weights(setup.policy, self.progress.step)
        experience, ordinal = collect_round(
            setup.sampler, setup.prompts, first_ordinal=self.progress.ordinal, groups=setup.groups, max_rounds=0
        )
        progress = replace(self.progress, ordinal=ordinal)
        self.progress = learn(self.config, setup, self.journal, experience, progress)
        seconds = perf_counter() - started
        self.completions = [rollout.completion_ids for rollout in experience.rollouts]
        self.lengths += map(len, self.completions)
        return StepTime(1e3 * seconds, 1e3 * experience.seconds["rollout"])

    def prompts(self) -> list[str]:
        """The text of the prompts in the order in which the run visits them."""
        pool = self.setup.prompts
        return [str(pool[row_at(i, n=len(pool), seed=SEED)].prompt) for i in range(len(pool))]

    def close(self) -> None:
        self.journal.close()


def check_agreement(folder: Path) -> dict[str, float]:
    """Let both take a step on the completions that fastrl sampled; return the relative difference of what they log.

    Raises:
        RuntimeError: they do not compute the same step, so comparing their times would mean nothing.
    """
    run = FastRLRun(folder, folder / "check", steps=1)
    run.step()
    run.close()
    logged = json.loads((folder / "check" / METRICS_FILE).read_text())
    shape = (GROUPS, GENERATIONS, LENGTH)
    theirs = trl_first_step(folder, run.prompts(), run.completions, reward=vowel_share, shape=shape)
    names = ("reward", "reward_std", "loss", "grad_norm")
    gaps = {name: abs(logged[name] - theirs[name]) / max(1e-3, abs(theirs[name])) for name in names}
    if max(gaps.values()) > AGREEMENT:
        sides = {name: (logged[name], theirs[name]) for name in names}
        raise RuntimeError(f"fastrl and TRL disagree on the same completions: {sides}")
    return gaps


def measured(case: Case, *, modes: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Train with each contender in turns of BLOCK steps; one record per contender, fastrl first in every turn.

    Args:
        modes: how TRL generates; [] measures fastrl alone.
        steps: timed steps of each contender, a multiple of BLOCK.
    """
    total = UNTIMED_STEPS + steps
    records = []
    for mode in modes or [None]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_task(folder, case, steps=total)
            gaps = check_agreement(folder) if mode is not None else {}
            fastrl = FastRLRun(folder, folder / "fastrl", steps=total)
            ours = [fastrl.step() for _ in range(UNTIMED_STEPS)]
            if mode is None:
                ours += [fastrl.step() for _ in range(steps)]
                fastrl.close()
                return [_record("fastrl", ours, fastrl.lengths)]

            def turn(ours: list[StepTime] = ours, fastrl: FastRLRun = fastrl) -> None:
                ours.extend(fastrl.step() for _ in range(BLOCK))

            trl = TRLRun(mode, turn=turn, block=BLOCK, untimed=UNTIMED_STEPS)
            theirs = trl.train(
                folder, fastrl.prompts(), reward=vowel_share, steps=total, shape=(GROUPS, GENERATIONS, LENGTH)
            )
            fastrl.close()
        pair = [
            _record("fastrl", ours, fastrl.lengths),
            _record(f"trl, {mode}", [StepTime(*step) for step in theirs], trl.lengths),
        ]
        for record in pair:
            record["times_faster"] = pair[1]["ms"] / pair[0]["ms"]
            record["relative_difference_on_same_completions"] = gaps
        records += pair
    return records


def _record(contender: str, steps: Sequence[StepTime], lengths: Sequence[int]) -> dict[str, Any]:
    """Medians over the timed steps; every completion must have the full length, or the work was not the same."""
    if set(lengths) != {LENGTH}:
        raise RuntimeError(f"{contender}: completions have {min(lengths)} .. {max(lengths)} tokens, not {LENGTH} each")
    timed = steps[UNTIMED_STEPS:]
    milliseconds = [step.ms for step in timed]
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {
        "contender": contender,
        "dtype": "float32",
        "ms": statistics.median(milliseconds),
        "ms_p10": deciles[0],
        "ms_p90": deciles[-1],
        "repeats": len(timed),
        "ms_rollout": statistics.median(step.rollout_ms for step in timed),
        "ms_rest": statistics.median(step.ms - step.rollout_ms for step in timed),
        "completion_tokens_per_step": len(lengths) // len(steps) * LENGTH,
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate((*CHARACTERS, EOS, PAD))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)


def _line(record: dict[str, Any]) -> str:
    times = "".join(f"{record[name]:9.1f}" for name in ("ms", "ms_p10", "ms_p90", "ms_rollout", "ms_rest"))
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
    steps = -(-options.steps // BLOCK) * BLOCK
    has_trl = find_spec("trl") is not None
    if not has_trl:
        print("TRL is not installed (pip install 'trl==1.16.0'): measuring fastrl alone")
    records = []
    for label in options.case:
        print(f"\n{label}: {GROUPS} prompts x {GENERATIONS} completions x {LENGTH} tokens, {options.threads} threads")
        print(f"  {'milliseconds a step':24}{'median':>9}{'p10':>9}{'p90':>9}{'rollout':>9}{'rest':>9}")
        shape = {"name": label, "sizes": asdict(CASES[label])}
        for record in measured(CASES[label], modes=options.trl if has_trl else [], steps=steps):
            print(_line(record), flush=True)
            if record["contender"].startswith("trl"):
                print(f"  fastrl is {record['times_faster']:.2f} times as fast")
            records.append({"row": "grpo_step", "shape": shape, **record, **provenance("cpu", quick=False)})
    write(options.results / "grpo_step.cpu.jsonl", records)


if __name__ == "__main__":
    main()
