"""Hosts with and without fastrl: Liger's chunked losses against ours, transformers' Trainer plain and applied.

    python -m bench.hosts [--device cpu]        needs liger-kernel and transformers; TRL's row is bench/trl_step.py

A program of its own rather than rows of the registry, because hosts may be absent. Liger is not compiled: on a CPU its
compilation is not what its users run, and its Triton kernels do not run there at all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from bench.__main__ import HEADER, ROOT, _line, measured, provenance
from bench.records import put
from bench.registry import Row
from fastrl.integrations import liger as ours

STEPS, TURNS = 6, 5
SIZES = {"small": (8, 64, 128, 8192), "wide": (8, 64, 256, 32000)}  # sequences, tokens, D, V


def head_inputs(b: int, t: int, d: int, v: int, *, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """hidden [B, T, D], weight [V, D], the reference's two, target [B, T] with a quarter of its tokens ignored."""
    torch.manual_seed(0)
    shapes = ((b, t, d), (v, d), (b, t, d), (v, d))
    drawn = [torch.randn(*shape, dtype=dtype, device=device) / (d**0.5 if len(shape) == 2 else 1) for shape in shapes]
    target = torch.randint(0, v, (b, t), device=device)
    target[:, : t // 4] = -100
    return *drawn, target


def dpo(module: Any) -> Callable[..., Tensor]:
    """DPO of a package with Liger's names, as a function of the inputs."""
    loss = module.LigerFusedLinearDPOLoss(compiled=False)
    return lambda h, w, rh, rw, target: loss(w, h, target, ref_input=rh, ref_weight=rw)[0]


def grpo(module: Any) -> Callable[..., Tensor]:
    """GRPO of a package with Liger's names."""
    loss = module.LigerFusedLinearGRPOLoss(compiled=False, beta=0.0, use_ref_model=False)

    def run(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, target: Tensor) -> Tensor:
        advantage = torch.linspace(-1, 1, len(h), dtype=h.dtype, device=h.device)
        value: Tensor = loss(h, w, target.clamp(min=0), (target != -100).to(h.dtype), advantage)[0]
        return value

    return run


def liger_records(device: str) -> list[dict[str, Any]]:
    """Both losses at both sizes, forward and backward; ours in float64 says who is right."""
    from liger_kernel import chunked_loss as theirs

    found = []
    for name, make in (("liger_dpo", dpo), ("liger_grpo", grpo)):
        contenders = {"liger": make(theirs), "fastrl": make(ours)}
        row = Row(name=name, make_inputs=head_inputs, spec=make(ours), contenders=contenders, shapes=SIZES,
                  quick_shapes=SIZES, differentiable=(0, 1))  # fmt: skip
        for label, shape in SIZES.items():
            print(f"\n{name}  {label} {shape}  {device}\n{HEADER}")
            for record in measured(row, shape, dtype=torch.float32, device=device, quick=True):
                print(_line({"useful_tflops": None, "floor_ratio": None, **record}), flush=True)
                found.append({"row": name, "shape": {"name": label, "sizes": shape}, **record})
    return found


def trainer_records(device: str) -> list[dict[str, Any]]:
    """A step of the Trainer with and without, in turns; the model is small beside its head."""
    import transformers

    from fastrl.integrations.transformers import apply_fastrl

    found = []
    for label, vocabulary in (("small", 8192), ("wide", 32000)):
        times: dict[str, list[tuple[float, float]]] = {"transformers": [], "fastrl": []}
        for _ in range(TURNS):
            for name, taken in times.items():
                transformers.set_seed(0)
                config = transformers.Qwen3Config(
                    vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                )  # fmt: skip
                model = transformers.Qwen3ForCausalLM(config)
                if name == "fastrl":
                    apply_fastrl(model)
                taken.append(_trainer_step(transformers, model, vocabulary, device))
        for name, taken in times.items():
            record = {
                "row": "transformers_trainer",
                "shape": {"name": label, "sizes": (8, 64, 128, vocabulary)},
                "contender": name,
                "dtype": "float32",
                "ms": statistics.median(wall for wall, _ in taken),
                "ms_cpu": statistics.median(cpu for _, cpu in taken),
                "repeats": TURNS,
            }
            spent = f"{record['ms']:9.1f} ms, {record['ms_cpu']:9.1f} ms of processor"
            print(f"transformers_trainer  {label}  {name:14}{spent}")
            found.append(record)
    return found


def _trainer_step(transformers: Any, model: Any, vocabulary: int, device: str) -> tuple[float, float]:
    """Milliseconds of one step, by the wall and of the processor; the first step of a Trainer is left out."""
    data = [{"input_ids": [(i * 31 + k) % vocabulary for k in range(64)]} for i in range(8 * (STEPS + 1))]
    for row in data:
        row["labels"] = row["input_ids"]
    marks: list[tuple[float, float]] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((perf_counter(), process_time()))

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS + 1, per_device_train_batch_size=8, report_to=[], save_strategy="no",
            use_cpu=device == "cpu", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    wall, cpu = (1000 * (last - first) / STEPS for first, last in zip(marks[0], marks[-1], strict=True))
    return wall, cpu


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.hosts", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    origin = provenance(options.device, quick=True)
    records = [*trainer_records(options.device), *liger_records(options.device)]
    put(options.results / f"hosts.{options.device}.jsonl", [{**record, **origin} for record in records])


if __name__ == "__main__":
    main()
