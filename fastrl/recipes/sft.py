"""Supervised fine-tuning: rows -> token sequences -> packed batches -> cross entropy over the waist -> optimizer."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter

import torch

from fastrl.data.pack import pack
from fastrl.report.journal import Journal
from fastrl.report.preview import print_table
from fastrl.train.config import SFTConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, compute_dtype, peak_gib, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.order import row_at
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.sequences import supervised_sequence
from fastrl.train.snapshot import restore, save
from fastrl.train.supervised import Example, load_examples
from fastrl.train.update import mean_loss, supervised_batch_loss, update
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
        tokenizer = load_tokenizer(
            config.model_name_or_path,
            chat_template=config.data.chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        load = partial(load_examples, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        end = _rows_to_visit(config, len(train.rows), batch_size)
        total_steps = ceil(end / batch_size)
        model = load_model(
            config.model_name_or_path,
            dtype=compute_dtype(config.dtype),
            device=device,
            attn_implementation=config.attn_implementation,
            gradient_checkpointing=config.gradient_checkpointing,
            trust_remote_code=config.trust_remote_code,
        )
        optimizer = MasterAdamW(
            model,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        write_environment(directory.path, device)
        journal = Journal(
            directory.path,
            title="fastrl sft",
            total_steps=total_steps,
            live=config.report.panel,
            trackers=config.report.to,
            config=asdict(config),
        )
        with journal:
            state, offsets = restore(directory, optimizer, resume=config.resume_from_checkpoint)
            journal.truncate_to(offsets)
            batch_loss = supervised_batch_loss(config.kernels, label_smoothing=config.label_smoothing)
            warmup = warmup_length(total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio)
            while state.step < total_steps:
                started = perf_counter()
                first = state.step * batch_size
                ordinals = range(first, min(first + batch_size, end))
                rows = [train.rows[row_at(i, n=len(train.rows), seed=config.seed)] for i in ordinals]
                batches = packed(rows, token_budget=config.packing.token_budget, device=device)
                rate = learning_rate_at(
                    state.step,
                    peak=config.learning_rate,
                    kind=config.lr_scheduler_type,
                    warmup_steps=warmup,
                    total_steps=total_steps,
                )
                metrics = update(
                    model, optimizer, batch_loss, batches, config, temperature=1.0, lr=rate, step=state.step + 1
                )
                tokens = sum(len(row.ids) for row in rows)
                state = replace(state, step=state.step + 1, num_tokens=state.num_tokens + tokens)
                seconds = perf_counter() - started
                metrics |= {
                    "num_tokens": state.num_tokens,
                    "epoch": ordinals.stop / len(train.rows),
                    "step_time": seconds,
                    "tokens_per_second": tokens / seconds,
                    "memory/peak_gib": peak_gib(device),
                    "truncated_rows": train.n_truncated,
                }
                is_last = state.step == total_steps
                journal.write(state.step, metrics, is_shown=is_last or state.step % config.logging_steps == 0)
                if held_out and (is_last or (config.eval_steps and state.step % config.eval_steps == 0)):
                    evaluated = mean_loss(
                        model, batch_loss, packed(held_out, token_budget=config.packing.token_budget, device=device)
                    )
                    journal.write(state.step, {f"eval/{name}": value for name, value in evaluated.items()})
                if is_last or directory.interrupted() or state.step % config.save_steps == 0:
                    save(directory, state, optimizer, journal.offsets(), keep=config.save_total_limit)
                if directory.interrupted():
                    return EXIT_INTERRUPTED
        card = f"Supervised fine-tuning of `{Path(config.model_name_or_path).name}` with fastrl, {total_steps} steps."
        save_pretrained(model, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: SFTConfig) -> int:
    """Print how two rows are tokenised and which tokens train; nothing is loaded beside the tokenizer."""
    tokenizer = load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )
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


def packed(rows: list[Example], *, token_budget: int, device: torch.device) -> list[TokenBatch]:
    """Pack the rows of one optimizer step; every trained token weighs 1 / (trained tokens of the step)."""
    count = sum(sum(row.is_trained) for row in rows)
    sequences = [supervised_sequence(row.ids, row.is_trained, weight=1 / count) for row in rows]
    return pack(sequences, token_budget=token_budget, device=device)


def _rows_to_visit(config: SFTConfig, n_rows: int, batch_size: int) -> int:
    """Count the rows of the whole run; an epoch-counted run ends with a short batch rather than in a next epoch."""
    return config.max_steps * batch_size if config.max_steps > 0 else ceil(config.num_train_epochs * n_rows)
