"""A training step of TRL's trainers with and without fastrl: forward, loss, backward on the same prepared batch.

    python -m bench.trl_step [--case NAME ...] [--repeats 9] [--threads 1]

A plain script rather than a row, as it needs TRL. Contenders take turns step by step on one batch, and must agree
on the loss and on the head's gradient before anything is timed. Sampling is left out: patching does not touch it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from bench.__main__ import ROOT, provenance
from bench.records import put
from fastrl.integrations.trl import FastDPOTrainer, FastGRPOTrainer, patch, unpatch
from fastrl.testing import MemoryMeter
from fastrl.train.tiny import make_tiny_qwen3

AGREEMENT = 1e-4  # of losses and of the norm of the head's gradient, relative


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained.

    Attributes:
        method: "sft", "dpo" or "grpo".
        vocabulary, hidden, layers: of the model.
        sequences: in a batch (pairs count twice).
        prompt, completion: most tokens; lengths are spread evenly between a quarter and all of that.
    """

    method: str
    vocabulary: int
    hidden: int
    layers: int
    sequences: int
    prompt: int
    completion: int


CASES = {
    "sft, small head": Case("sft", 4096, 256, 4, 8, 32, 96),
    "sft, large head": Case("sft", 32768, 256, 2, 8, 32, 96),
    "dpo, large head": Case("dpo", 32768, 256, 2, 8, 32, 96),
    "grpo, small head": Case("grpo", 4096, 256, 4, 8, 32, 96),
    "grpo, large head": Case("grpo", 32768, 256, 2, 8, 32, 96),
}


class Contender:
    """Owns a trainer and its batch, and runs steps of it."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        self.name = name
        self.swap: Callable[[], Any] = unpatch if name == "trl" else patch
        self.swap()
        self.trainer = _trainer(case, folder, is_packed="packed" in name)
        self.batch = _batch(case, self.trainer)
        self.trainer.model.train()

    def step(self) -> float:
        """Forward, loss, backward; the loss."""
        self.swap()
        self.trainer.model.zero_grad(set_to_none=True)
        loss = self.trainer.compute_loss(self.trainer.model, dict(self.batch), num_items_in_batch=None)
        loss.backward()
        return float(loss.detach())

    def timed(self) -> tuple[float, float]:
        """Milliseconds of a step, wall and processor."""
        started, worked = perf_counter(), process_time()
        self.step()
        return 1e3 * (perf_counter() - started), 1e3 * (process_time() - worked)

    def peak_mib(self) -> float:
        """Most memory that a step's tensors hold at once, the head's gradient included."""
        with MemoryMeter(*self.trainer.model.parameters()) as meter:
            self.step()
        return float(meter.peak_bytes) / 2**20

    def head_gradient(self) -> float:
        return float(self.trainer.model.get_output_embeddings().weight.grad.norm())


def measured(case: Case, repeats: int) -> list[dict[str, Any]]:
    """All contenders of a case, in turns."""
    names = ["trl", "trl, patched"] + ["fastrl's trainer, packed"] * (case.method != "sft")
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, case, Path(folder)) for name in names]
        found = [(each.step(), each.head_gradient()) for each in contenders]
        for each, values in zip(contenders, found, strict=True):
            if any(abs(a - b) > AGREEMENT * (1e-3 + abs(b)) for a, b in zip(values, found[0], strict=True)):
                raise RuntimeError(f"{each.name} has loss and gradient {values}, TRL {found[0]}")
        times = [[each.timed() for each in contenders] for _ in range(repeats)]
        peaks = [each.peak_mib() for each in contenders]
    unpatch()
    records = []
    for i, each in enumerate(contenders):
        wall, worked = (statistics.median(row[i][kind] for row in times) for kind in (0, 1))
        records.append(
            {
                "contender": each.name,
                "dtype": "float32",
                "ms": wall,
                "ms_cpu": worked,
                "ms_cpu_p10": min(row[i][1] for row in times),
                "times_faster_cpu": statistics.median(row[0][1] / row[i][1] for row in times),
                "peak_mib": peaks[i],
                "repeats": repeats,
            }
        )
    return records


def _trainer(case: Case, folder: Path, *, is_packed: bool) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    make_tiny_qwen3(
        case.vocabulary, hidden_size=case.hidden, layers=case.layers, eos_token_id=1, pad_token_id=0, seed=0
    ).save_pretrained(folder / "model")
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(case.vocabulary)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")
    shared = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": case.sequences,
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    words = [{"prompt": "2 3 4", "completion": " 5 6 7 8"}] * 8
    if case.method == "sft":
        return SFTTrainer(args=SFTConfig(**shared), train_dataset=Dataset.from_list(words), **given)
    if case.method == "dpo":
        pairs = [{"prompt": "2 3 4", "chosen": " 5 6 7", "rejected": " 8 9"}] * 8
        kind = FastDPOTrainer if is_packed else DPOTrainer
        return kind(args=DPOConfig(**shared), train_dataset=Dataset.from_list(pairs), **given)
    config = GRPOConfig(num_generations=case.sequences, max_completion_length=case.completion, **shared)
    kind = FastGRPOTrainer if is_packed else GRPOTrainer
    rows = Dataset.from_list([{"prompt": "2 3 4"}] * 8)
    return kind(
        args=config, train_dataset=rows, reward_funcs=lambda completions, **_: [0.0] * len(completions), **given
    )


def _batch(case: Case, trainer: Any) -> dict[str, Any]:
    """What TRL's collators make, of random tokens: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(0)
    s = case.sequences

    def tokens(longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = torch.linspace(longest / 4, longest, s).long()
        ids = torch.randint(2, case.vocabulary, (s, longest), generator=generator)
        mask = (torch.arange(longest) < length[torch.randperm(s, generator=generator)][:, None]).long()
        return ids * mask, mask

    prompt, prompt_mask = (x.flip(1) for x in tokens(case.prompt))
    completion, mask = tokens(case.completion)
    if case.method == "grpo":
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
        return {
            "prompt_ids": prompt,
            "prompt_mask": prompt_mask,
            "completion_ids": completion,
            "completion_mask": mask,
            "advantages": torch.randn(s, generator=generator),
            "num_items_in_batch": mask.sum(),
        }
    # Prompt and completion of full prompts: these collators pad on the right alone.
    prompt = torch.randint(2, case.vocabulary, prompt.shape, generator=generator)
    ids = torch.cat([prompt, completion], 1)
    attention = torch.cat([torch.ones_like(prompt), mask], 1)
    completion_mask = torch.cat([torch.zeros_like(prompt), mask], 1)
    if case.method == "sft":
        return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(completion_mask == 0, -100)}
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion_mask}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trl_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    origin = provenance("cpu", quick=False)
    origin["versions"] |= {name: version(name) for name in ("transformers", "trl")}
    records = []
    for label in options.case:
        for record in measured(CASES[label], options.repeats):
            times = f"{record['ms_cpu']:9.0f} ms of processor {record['times_faster_cpu']:6.2f}x"
            print(f"{label:18} {record['contender']:26} {times} {record['peak_mib']:8.0f} MiB", flush=True)
            records.append(
                {"row": "trl_step", "shape": {"name": label, "sizes": asdict(CASES[label])}, **record, **origin}
            )
    put(options.results / "trl_step.cpu.jsonl", records)


if __name__ == "__main__":
    main()
