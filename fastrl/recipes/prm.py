"""A process reward model: solutions in steps -> packed tokens -> a score after each step -> binary cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.data.pack import unpack
from fastrl.losses.reward_model import brier, step_cross_entropy
from fastrl.report.preview import print_table
from fastrl.train.config import PRMConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, optimizer_of, score_model_of, tokenizer_of
from fastrl.train.model_directory import context_length
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.score_model import save_score_model, token_scores
from fastrl.train.shares import packed_for_ranks
from fastrl.train.stepwise import AGGREGATIONS, Solution, load_solutions, solution_sequence
from fastrl.types import LossOutput, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(config: PRMConfig) -> int:
    """Train a process reward model; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (`AutoModelForSequenceClassification`) under
    `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    contents = contents_of(data=[config.train_dataset], model=config.model_name_or_path)
    record = asdict(config) | {"contents": contents}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        context = context_length(config.model_name_or_path)
        load = partial(
            load_solutions, tokenizer=tokenizer, config=config, context=context, output_dir=config.output_dir
        )
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset) if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train))
        model = score_model_of(config)
        write_environment(directory.path, device)

        def step_of(rows: Sequence[Solution]) -> Step:
            return solution_step(model, rows, config, device=device, is_learning=torch.is_grad_enabled())

        with journal_of(config, directory, title="fastrl prm", total_steps=total_steps) as journal:
            code = fit(
                config,
                directory,
                Rows(train, held_out, step_of),
                {"optimizer": optimizer_of(config, model)},
                journal=journal,
                device=device,
            )
        if code != 0:
            return code
        card = f"Process reward model from `{Path(config.model_name_or_path).name}` with fastrl, {total_steps} steps."
        save_score_model(model, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: PRMConfig) -> int:
    """Print two solutions step by step with their labels; nothing is loaded beside the tokenizer."""
    tokenizer = tokenizer_of(config)
    context = context_length(config.model_name_or_path)
    solutions = load_solutions(config.train_dataset, tokenizer, config, context=context, output_dir=None)
    rows = []
    for solution in solutions[:2]:
        borders = [0, *(end + 1 for end in solution.ends)]  # the first piece has the prompt too
        steps = [repr(tokenizer.decode(solution.ids[start:end])) for start, end in pairwise(borders)]
        labels = [str(label).lower() for label in solution.is_right]
        rows.append(["\n".join(steps), "\n".join(labels), str(len(solution.ids))])
    print_table(f"{len(solutions)} solutions; two of them", ("prompt and steps", "labels", "tokens"), rows)
    return 0


def solution_step(
    model: PreTrainedModel, rows: Sequence[Solution], config: PRMConfig, *, device: torch.device, is_learning: bool
) -> Step:
    """Pack the solutions of one optimizer step; every labelled step of them has the same share of the loss.

    Args:
        is_learning: False adds the accuracy of whole solutions, and reads every step.
    """
    last_only = is_learning and config.train_on_last_step_only
    count = len(rows) if last_only else sum(len(row.ends) for row in rows)
    sequences = [solution_sequence(row, weight=1 / count, last_step_only=last_only) for row in rows]
    batches = packed_for_ranks(sequences, token_budget=config.packing.token_budget, device=device)
    is_right, start = labels_of(rows, device=device)

    def loss(batch: TokenBatch) -> LossOutput:
        scores = token_scores(model, batch)
        owner = torch.repeat_interleave(
            batch.sequence, batch.cu_seqlens.diff().long(), output_size=len(batch.position_ids)
        )
        label = is_right[start[owner] + batch.position_ids]
        metrics = {
            "accuracy": ((scores.detach() > 0) == label).float(),
            "brier": brier(scores.detach().sigmoid(), label),
        }
        items = {} if is_learning else {"solution_accuracy": solution_accuracy(scores, label, batch, config)}
        return LossOutput((batch.weight * step_cross_entropy(scores, label)).sum(), metrics, items)

    return Step(batches, loss, n_tokens=sum(len(row.ids) for row in rows))


def labels_of(rows: Sequence[Solution], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels of all solutions end to end, token by token, and the place where each solution starts.

    Returns:
        [N] bool, meaningful where a step ends; [S] int64.
    """
    lengths = [len(row.ids) for row in rows]
    is_right = torch.zeros(sum(lengths), dtype=torch.bool)
    starts = [0, *accumulate(lengths)][:-1]
    for first, row in zip(starts, rows, strict=True):
        for end, label in zip(row.ends, row.is_right, strict=True):
            is_right[first + end] = label
    return is_right.to(device), torch.tensor(starts, device=device)


def solution_accuracy(scores: Tensor, label: Tensor, batch: TokenBatch, config: PRMConfig) -> Tensor:
    """[S] 1 where the aggregated probability is above a half just when every step of the solution is right."""
    aggregate = AGGREGATIONS[config.aggregation]
    found = []
    for score, right, weight in zip(
        unpack(scores, batch), unpack(label, batch), unpack(batch.weight, batch), strict=True
    ):
        is_end = weight != 0
        found.append((aggregate(score[is_end].sigmoid()) > 0.5) == right[is_end].all())
    return torch.stack(found).float()
