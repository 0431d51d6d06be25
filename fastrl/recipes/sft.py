"""Supervised fine-tuning: rows -> token sequences -> packed batches -> cross entropy over the waist -> optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fastrl.losses.supervised import dft, nll
from fastrl.report.preview import print_table
from fastrl.train.config import SFTConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.train.supervised import Example, load_examples
from fastrl.train.update import supervised_batch_loss
from fastrl.types import TokenBatch


def run(config: SFTConfig) -> int:
    """Train a model on supervised rows; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    contents = contents_of(data=[config.train_dataset], model=config.model_name_or_path)
    record = asdict(config) | {"contents": contents}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        load = partial(load_examples, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train.rows))
        model = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        write_environment(directory.path, device)
        batch_loss = supervised_batch_loss(
            model,
            config.kernels,
            token_loss=dft if config.loss_type == "dft" else nll,
            label_smoothing=config.label_smoothing,
        )

        def step_of(rows: Sequence[Example]) -> Step:
            batches = packed(rows, token_budget=config.packing.token_budget, device=device)
            return Step(batches, batch_loss, n_tokens=sum(len(row.ids) for row in rows))

        with journal_of(config, directory, title="fastrl sft", total_steps=total_steps) as journal:
            code = fit(
                config,
                directory,
                Rows(train.rows, held_out, step_of),
                {"optimizer": optimizer_of(config, model)},
                journal=journal,
                device=device,
                constants={"truncated_rows": train.n_truncated},
            )
        if code != 0:
            return code
        card = f"Supervised fine-tuning of `{Path(config.model_name_or_path).name}` with fastrl, {total_steps} steps."
        save_pretrained(model, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: SFTConfig) -> int:
    """Print how two rows are tokenised and which tokens train; nothing is loaded beside the tokenizer."""
    tokenizer = tokenizer_of(config)
    examples = load_examples(config.train_dataset, tokenizer, config, output_dir=None)
    rows = []
    for example in examples.rows[:2]:
        parts = [
            tokenizer.decode(
                [token for token, is_on in zip(example.ids, example.is_trained, strict=True) if is_on == on]
            )
            for on in (False, True)
        ]
        rows.append([*map(repr, parts), str(len(example.ids)), str(sum(example.is_trained))])
    header = ("fed, not trained", "trained", "tokens", "trained tokens")
    print_table(f"{len(examples.rows)} rows; two of them", header, rows)
    return 0


def packed(rows: Sequence[Example], *, token_budget: int, device: torch.device) -> list[TokenBatch]:
    """Pack the rows of one optimizer step; every trained token weighs 1 / (trained tokens of the step)."""
    count = sum(sum(row.is_trained) for row in rows)
    sequences = [supervised_sequence(row.ids, row.is_trained, weight=1 / count) for row in rows]
    return packed_for_ranks(sequences, token_budget=token_budget, device=device)
