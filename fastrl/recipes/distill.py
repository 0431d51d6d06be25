"""Distillation on fixed rows: rows -> packed batches -> divergence from a teacher over the waist -> optimizer.

The teacher reads every batch too, or its most likely tokens were stored once by `fastrl teacher`; then only the student
is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.ops import TopTokens
from fastrl.recipes.sft import packed
from fastrl.train.config import DistillConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.supervised import Example, load_examples
from fastrl.train.teacher import (
    live_teacher_loss,
    stored_teacher_loss,
    teacher_of,
    vocabulary_digest,
)
from fastrl.train.top_tokens_file import StoredTeacher, read_top_tokens
from fastrl.train.update import BatchLoss
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import TokenBatch

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}

RowsLoss = Callable[[Sequence[Example]], BatchLoss]


def run(config: DistillConfig) -> int:
    """Train a student on a teacher's distributions; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    teacher = config.teacher_model_name_or_path
    contents = contents_of(data=[config.train_dataset, config.teacher_logprobs], model=config.model_name_or_path)
    if teacher is not None:
        contents = {**contents, **contents_of(data=[], model=teacher)}
    record = asdict(config) | {"contents": contents}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        check_same_vocabulary(config, tokenizer, teacher, option="teacher_model_name_or_path")
        load = partial(load_examples, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        stored = _stored(config, tokenizer, train.rows, held_out)
        _, _, total_steps = length_of(config, len(train.rows))
        model = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        loss_of = _loss_of(config, model, stored)
        write_environment(directory.path, device)

        def step_of(rows: Sequence[Example]) -> Step:
            batches = packed(rows, token_budget=config.packing.token_budget, device=device)
            return Step(batches, loss_of(rows), n_tokens=sum(len(row.ids) for row in rows))

        with journal_of(config, directory, title=f"fastrl distill ({config.loss})", total_steps=total_steps) as journal:
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
        source = Path(teacher or config.teacher_logprobs or "").name
        card = f"`{Path(config.model_name_or_path).name}` distilled from `{source}` with fastrl, {total_steps} steps."
        save_pretrained(model, tokenizer, directory.path / "model", card=card)
    return 0


def _stored(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> StoredTeacher | None:
    """What was stored of the teacher, with something for every row; None with a live one."""
    if config.teacher_logprobs is None:
        return None
    stored = read_top_tokens(
        config.teacher_logprobs, temperature=config.temperature, vocabulary=vocabulary_digest(tokenizer)
    )
    stored.check(train, source=config.train_dataset)
    stored.check(held_out, source=config.eval_dataset or "")
    return stored


def _loss_of(config: DistillConfig, model: PreTrainedModel, stored: StoredTeacher | None) -> RowsLoss:
    """The loss of a step's batches, from its rows; a live teacher is loaded here."""
    beta = BETA.get(config.loss, 0.5 if config.beta is None else config.beta)
    if stored is None:
        assert config.teacher_model_name_or_path is not None
        teacher = teacher_of(config, config.teacher_model_name_or_path)
        live = live_teacher_loss(
            model, teacher, config.kernels, beta=beta, temperature=config.temperature, alpha=config.alpha
        )
        return lambda rows: live

    def loss_of(rows: Sequence[Example]) -> BatchLoss:
        def of_batch(batch: TokenBatch) -> TopTokens:
            tokens = stored.of([rows[index] for index in batch.sequence.tolist()])
            return TopTokens(*(x.to(batch.input_ids.device) for x in tokens))

        return stored_teacher_loss(
            model, config.kernels, of_batch, beta=beta, temperature=config.temperature, alpha=config.alpha
        )

    return loss_of
