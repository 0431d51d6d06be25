"""On-policy distillation: prompts -> the student's own completions -> divergence from the teacher -> optimizer.

Per row a coin with probability lmbda says who completes the prompt: the student as it is now, or else the data (with
seq_kd the teacher). Coins and samples are functions of (seed, place in the run), so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor

from fastrl.recipes.sft import packed
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.train.config import GKDConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.engine import opened_engine
from fastrl.train.exchange import generated_on_ranks
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.gkd_rows import GKDRow, load_gkd_rows
from fastrl.train.model_directory import context_length
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.shares import step_size
from fastrl.train.supervised import Example
from fastrl.train.teacher import live_teacher_loss, teacher_of
from fastrl.train.update import BatchLoss
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import LossOutput, Rollout, TokenBatch


def run(config: GKDConfig) -> int:
    """Train a student on its own completions with a teacher's distributions; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    of_student = contents_of(data=[config.train_dataset], model=config.model_name_or_path)
    contents = {**of_student, **contents_of(data=[], model=config.teacher_model_name_or_path)}
    record = asdict(config) | {"contents": contents}
    with (
        open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory,
        ExitStack() as resources,
    ):
        tokenizer = tokenizer_of(config)
        check_same_vocabulary(config, tokenizer, config.teacher_model_name_or_path, option="teacher_model_name_or_path")
        load = partial(
            load_gkd_rows,
            tokenizer=tokenizer,
            config=config,
            output_dir=config.output_dir,
            context=context_length(config.model_name_or_path),
        )
        train = load(config.train_dataset, with_completions=config.lmbda < 1 and not config.seq_kd)
        held_out = load(config.eval_dataset, with_completions=True) if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train))
        model = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        teacher = teacher_of(config, config.teacher_model_name_or_path)
        write_environment(directory.path, device)
        batch_loss = live_teacher_loss(model, teacher, config.kernels, beta=config.beta)
        student_engine = resources.enter_context(opened_engine(config, model, tokenizer))
        # The teacher never changes and seldom samples: it is no reason to start a second server.
        teacher_engine = BuiltinEngine(teacher, tokenizer, batch_size=config.rollout.batch_size)

        def stepped(examples: Sequence[Example], loss: BatchLoss) -> Step:
            batches = packed(examples, token_budget=config.packing.token_budget, device=device)
            return Step(batches, loss, n_tokens=sum(len(example.ids) for example in examples))

        def step_of(rows: Sequence[GKDRow]) -> Step:
            return stepped([row.example for row in rows if row.example is not None], batch_loss)

        def sampled_step(rows: Sequence[GKDRow], places: Sequence[int]) -> Step:
            student_engine.load_weights(model, places[0] // step_size(config))
            examples, facts = completed(config, student_engine, teacher_engine, rows, places)
            student_engine.rest()
            return stepped(examples, _with_facts(batch_loss, facts))

        with journal_of(config, directory, title="fastrl gkd", total_steps=total_steps) as journal:
            code = fit(
                config,
                directory,
                Rows(train, held_out, step_of, sampled_step),
                {"optimizer": optimizer_of(config, model)},
                journal=journal,
                device=device,
            )
        if code != 0:
            return code
        names = [Path(path).name for path in (config.model_name_or_path, config.teacher_model_name_or_path)]
        card = f"`{names[0]}` distilled on its own completions from `{names[1]}` with fastrl, {total_steps} steps."
        save_pretrained(model, tokenizer, directory.path / "model", card=card)
    return 0


def completed(
    config: GKDConfig, student: Engine, teacher: Engine, rows: Sequence[GKDRow], places: Sequence[int]
) -> tuple[list[Example], dict[str, list[float]]]:
    """Complete every row of a step as its coin says.

    Args:
        places: of the rows in the run, counted over all epochs.

    Returns:
        The sequences to learn from, whose completions are trained, and facts about each of them to log: `on_policy`,
        and NaN for completions of the data, `completions/length` and `completions/clipped_ratio`. Completions that an
        engine failed on are left out.
    """
    is_own = [request_seed(config.seed, place, 1) / 2**63 < config.lmbda for place in places]
    found: list[tuple[Example, dict[str, float]] | None] = [
        None if row.example is None else (row.example, _facts(None, own=False)) for row in rows
    ]
    for engine, own in ((student, True), (teacher, False)):
        chosen = [is_one == own and (own or config.seq_kd) for is_one in is_own]
        rollouts = _sampled(config, engine, list(compress(rows, chosen)), list(compress(places, chosen)))
        for index, rollout in zip(compress(range(len(rows)), chosen), rollouts, strict=True):
            found[index] = None if rollout.finish_reason == "error" else (_example(rollout), _facts(rollout, own=own))
    kept = [each for each in found if each is not None]
    names = _facts(None, own=False)
    return [example for example, _ in kept], {name: [facts[name] for _, facts in kept] for name in names}


def _sampled(config: GKDConfig, engine: Engine, rows: Sequence[GKDRow], places: Sequence[int]) -> list[Rollout]:
    if not rows:
        return []
    return generated_on_ranks(
        engine,
        [row.prompt_ids for row in rows],
        Sampling(max_completion_length=config.max_new_tokens, temperature=config.temperature),
        seeds=[request_seed(config.seed, place, 0) for place in places],
    )


def _example(rollout: Rollout) -> Example:
    n, m = len(rollout.prompt_ids), len(rollout.completion_ids)
    return Example((*rollout.prompt_ids, *rollout.completion_ids), (*[False] * n, *[True] * m))


def _facts(rollout: Rollout | None, *, own: bool) -> dict[str, float]:
    length = torch.nan if rollout is None else len(rollout.completion_ids)
    is_cut = torch.nan if rollout is None else float(rollout.finish_reason == "length")
    return {"on_policy": float(own), "completions/length": length, "completions/clipped_ratio": is_cut}


def _with_facts(batch_loss: BatchLoss, facts: Mapping[str, Sequence[float]]) -> BatchLoss:
    """The same loss, which also logs facts about the step's sequences."""

    def loss(batch: TokenBatch) -> LossOutput:
        items: dict[str, Tensor] = {
            name: torch.tensor(values, device=batch.sequence.device)[batch.sequence] for name, values in facts.items()
        }
        return replace(batch_loss(batch), item_metrics=items)

    return loss
