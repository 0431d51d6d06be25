"""A training step of SFT and of DPO on prepared rows: `python -m bench.supervised_step [CASE ...]`.

Random weights, completions of lognormal lengths; DPO has its reference's log-probabilities beforehand. Every contender
takes the same optimizer step from the same rows, in turns, with learning rate 0. The ablations leave out one thing
each, as in `bench.training_step`; TRL's own trainer, plain and patched, takes the step where TRL is installed: its rows
are padded to the longest and cut into micro-batches of as many rows as `micro_tokens` holds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from bench.__main__ import ROOT, provenance
from bench.records import put
from bench.training_cases import SMALL, plain_model, random_model
from bench.training_step import AGREE, added, check, peak_gib, timed
from bench.trl_contender import any_tokenizer
from fastrl.plan.lengths import Lengths
from fastrl.plan.shape import SHAPES, ModelShape
from fastrl.recipes.dpo import dpo_batch_loss
from fastrl.train.config import DPOConfig, KernelsBlock, SFTConfig
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.pairs import n_chosen_tokens, pack_pairs
from fastrl.train.preference_rows import Pair
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.train.supervised import Example
from fastrl.train.update import supervised_batch_loss, update

Step = Callable[[], dict[str, float]]
DEFAULT, EAGER = KernelsBlock(), KernelsBlock(backend="reference")
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a step.

    Attributes:
        method: what is trained.
        rows: completions of the step; DPO's pairs are two each.
        micro_tokens: most tokens of a micro-batch.
    """

    method: Literal["sft", "dpo"]
    shape: ModelShape
    rows: int
    lengths: Lengths
    micro_tokens: int


def _gpu(method: Literal["sft", "dpo"], name: str, rows: int) -> Case:
    return Case(method, SHAPES[name], rows, Lengths(prompt=200, median=400, longest=1848), 16_384)


GPU_CASES = {
    "sft, qwen3-0.6b, 2k": _gpu("sft", "qwen3-0.6b", 64),
    "dpo, qwen3-0.6b, 2k": _gpu("dpo", "qwen3-0.6b", 32),
    "sft, qwen3-1.7b, 2k": _gpu("sft", "qwen3-1.7b", 64),
}
_SHORT = Lengths(prompt=24, median=60, longest=232)
QUICK = ("sft, D=256, V=8192", "dpo, D=256, V=8192")
CPU_CASES = {
    "sft, D=256, V=8192": Case("sft", SMALL, 24, _SHORT, 1024),
    "dpo, D=256, V=8192": Case("dpo", SMALL, 24, _SHORT, 1024),
    "sft, D=256, V=512": Case("sft", replace(SMALL, vocab=512), 24, _SHORT, 1024),
}


def main() -> None:
    """Run the cases named on the command line, all of the machine's kind by default."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = GPU_CASES if device == "cuda" else CPU_CASES
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {'; '.join(cases)}")
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9, and on a CPU two cases")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in cases]
    if unknown:
        parser.error(f"no case is called {unknown[0]!r}; there are {'; '.join(cases)}")
    origin = provenance(device, quick=options.quick)
    for name in options.cases or (QUICK if options.quick and device == "cpu" else cases):
        print(f"\n{name}", flush=True)
        place = {"row": "supervised_step", "shape": {"name": name, "sizes": sizes(cases[name])}}
        found = []
        for record in measured(cases[name], device=device, repeats=3 if options.quick else 9):
            print(_line(record), flush=True)
            found.append({**place, **record, **origin})
        put(options.results / f"supervised_step.{device}.jsonl", found)


def measured(case: Case, *, device: str, repeats: int, seconds: float = float("inf")) -> Iterator[dict[str, Any]]:
    """One record per contender that agrees with the first; of another one, why it was not timed.

    Args:
        seconds: as in `bench.training_step`.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make: dict[str, Any] = {"shape": case.shape, "lengths": case.lengths, "dtype": dtype, "device": device}
    model = random_model(**make)
    optimizer = MasterAdamW(model)
    rows = examples(case)
    ours: Callable[..., dict[str, float]] = partial(_step, case, model, optimizer, rows)
    steps: dict[str, Step] = {"fastrl": ours, "eager head": partial(ours, kernels=EAGER)}
    if case.method == "sft":
        steps |= {
            "no packing": partial(ours, is_packed=False),
            "neither": partial(ours, is_packed=False, kernels=EAGER),
        }
    peers, reasons = added(lambda: _trl_steps(case, rows, partial(plain_model, **make)))
    steps |= peers
    reasons |= check(steps, AGREE[dtype])
    times = timed(steps, repeats, device, seconds, reasons)
    tokens = sum(len(row.ids) for row in rows)
    for name, samples in times.items():
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        yield {
            "contender": name,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": statistics.median(samples),
            "ms_p10": deciles[0],
            "ms_p90": deciles[-1],
            "repeats": len(samples),
            "tokens_per_second": 1e3 * tokens / statistics.median(samples),
            "peak_gib": peak_gib(steps[name], device),
        }
    dtype_name = str(dtype).removeprefix("torch.")
    yield from ({"contender": name, "dtype": dtype_name, "not_timed": reason} for name, reason in reasons.items())


def examples(case: Case) -> list[Example]:
    """Rows of the lengths' quantiles in shuffled order, random tokens; a pair shares its prompt."""
    generator = torch.Generator().manual_seed(0)
    quantiles = case.lengths.completions()
    picked = [quantiles[(2 * i + 1) * len(quantiles) // (2 * case.rows)] for i in range(case.rows)]
    rows: list[Example] = []
    prompt: tuple[int, ...] = ()
    for place, i in enumerate(torch.randperm(case.rows, generator=generator).tolist()):
        n = max(1, round(picked[i]))
        ids = torch.randint(2, case.shape.vocab, (case.lengths.prompt + n,), generator=generator).tolist()
        if case.method == "sft" or place % 2 == 0:
            prompt = tuple(ids[: case.lengths.prompt])
        rows.append(Example((*prompt, *ids[len(prompt) :]), (False,) * len(prompt) + (True,) * n))
    return rows


def _step(
    case: Case,
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    rows: list[Example],
    *,
    is_packed: bool = True,
    kernels: KernelsBlock = DEFAULT,
) -> dict[str, float]:
    paths: dict[str, Any] = {"model_name_or_path": "", "output_dir": "", "train_dataset": ""}
    if case.method == "sft":
        count = sum(sum(row.is_trained) for row in rows)
        sequences = [supervised_sequence(row.ids, row.is_trained, weight=1 / count) for row in rows]
        groups = [sequences] if is_packed else [[each] for each in sequences]
        batches = [
            batch
            for group in groups
            for batch in packed_for_ranks(group, token_budget=case.micro_tokens, device=model.device)
        ]
        supervised = SFTConfig(max_grad_norm=1.0, **paths)
        return update(optimizer, supervised_batch_loss(model, kernels), batches, supervised, lr=0.0, step=1)
    pairs = [Pair(chosen, rejected) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
    config = DPOConfig(max_grad_norm=1.0, kernels=kernels, **paths)
    batches = pack_pairs(pairs, token_budget=case.micro_tokens, device=model.device)
    loss = dpo_batch_loss(model, config, reference(rows).to(model.device), n_chosen_tokens=n_chosen_tokens(pairs))
    return update(optimizer, loss, batches, config, lr=0.0, step=1)


def reference(rows: list[Example]) -> Tensor:
    """[2P] log-probabilities of a made-up reference: uniform over 1,000 tokens."""
    return torch.tensor([-6.9 * sum(row.is_trained) for row in rows])


def _trl_steps(case: Case, rows: list[Example], make_model: Callable[[], PreTrainedModel]) -> dict[str, Step]:
    """TRL's trainer, plain and patched; one model serves both."""
    if find_spec("trl") is None:
        return {}
    from datasets import Dataset
    from trl import DPOConfig as Preferences  # type: ignore[import-not-found]
    from trl import DPOTrainer, SFTTrainer
    from trl import SFTConfig as Supervised

    from fastrl.integrations.trl import patch, unpatch

    model = make_model()
    is_gpu = model.device.type == "cuda"
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not is_gpu,
        "bf16": is_gpu,
        "learning_rate": 0.0,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    given: dict[str, Any] = {"model": model, "processing_class": any_tokenizer()}
    unpatch()
    if case.method == "sft":
        data = Dataset.from_list([{"prompt": "2 3 4", "completion": " 5 6"}] * 8)
        trainer = SFTTrainer(args=Supervised(**shared), train_dataset=data, **given)
    else:
        data = Dataset.from_list([{"prompt": "2 3 4", "chosen": " 5 6", "rejected": " 8 9"}] * 8)
        trainer = DPOTrainer(args=Preferences(precompute_ref_log_probs=True, **shared), train_dataset=data, **given)
    optimizer = trainer.create_optimizer()
    batches = _sft_batches(case, rows) if case.method == "sft" else _dpo_batches(case, rows)
    batches = [({k: v.to(model.device) for k, v in batch.items()}, share) for batch, share in batches]
    count = torch.tensor(sum(sum(row.is_trained) for row in rows))

    def step(swap: Callable[[], Any]) -> dict[str, float]:
        swap()
        model.train()
        loss = 0.0
        for batch, share in batches:
            part = trainer.compute_loss(model, dict(batch), num_items_in_batch=count if share is None else None)
            part = part if share is None else part * share
            part.backward()
            loss += part.detach()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        unpatch()
        return {"loss": float(loss), "grad_norm": float(norm)}

    return {"TRL": partial(step, unpatch), "TRL, patched": partial(step, patch)}


def _sft_batches(case: Case, rows: list[Example]) -> list[tuple[dict[str, Tensor], float | None]]:
    """Micro-batches as TRL's collator pads them, to their own longest."""
    found: list[tuple[dict[str, Tensor], float | None]] = []
    size = max(1, case.micro_tokens // max(len(row.ids) for row in rows))
    for start in range(0, len(rows), size):
        batch = _padded(rows[start : start + size])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED)
        found.append(({**batch, "labels": labels}, None))
    return found


def _dpo_batches(case: Case, rows: list[Example]) -> list[tuple[dict[str, Tensor], float | None]]:
    """Micro-batches of chosen rows above rejected ones, and each one's share of the pairs."""
    found: list[tuple[dict[str, Tensor], float | None]] = []
    of_reference = reference(rows)
    size = 2 * max(1, case.micro_tokens // (2 * max(len(row.ids) for row in rows)))
    for start in range(0, len(rows), size):
        part, scores = rows[start : start + size], of_reference[start : start + size]
        batch = _padded([*part[::2], *part[1::2]])
        batch |= {"ref_chosen_logps": scores[::2], "ref_rejected_logps": scores[1::2]}
        found.append((batch, len(part) / len(rows)))
    return found


def _padded(rows: list[Example]) -> dict[str, Tensor]:
    ids = [torch.tensor(row.ids) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "completion_mask": pad_sequence([torch.tensor(row.is_trained).long() for row in rows], batch_first=True),
    }


def sizes(case: Case) -> dict[str, float]:
    """The case's numbers, for its records."""
    shape = {name: getattr(case.shape, name) for name in ("hidden", "layers", "intermediate", "vocab")}
    lengths = {name: getattr(case.lengths, name) for name in ("prompt", "median", "longest")}
    return {**shape, "rows": case.rows, "micro_tokens": case.micro_tokens, **lengths}


def _line(record: dict[str, Any]) -> str:
    if "not_timed" in record:
        return f"  {record['contender']:20}  not timed: {record['not_timed']}"
    rate = f"{record['ms']:10.1f} ms{record['tokens_per_second']:12,.0f} tokens/s"
    return f"  {record['contender']:20}{rate}{record['peak_gib']:10.3f} GiB"


if __name__ == "__main__":
    main()
