"""A reward model: preferences -> packed completions -> a score at the end of each -> Bradley-Terry -> optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.losses.reward_model import bradley_terry, brier, centering, expected_calibration_error
from fastrl.report.preview import print_table
from fastrl.train.config import RewardConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, optimizer_of, score_model_of, tokenizer_of
from fastrl.train.model_directory import context_length
from fastrl.train.provenance import write_environment
from fastrl.train.rankings import Ranking, load_rankings, n_tokens
from fastrl.train.run_directory import open_run_directory
from fastrl.train.score_model import last_scores, save_score_model, scored_sequence, token_scores
from fastrl.train.shares import packed_for_ranks
from fastrl.types import LossOutput, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(config: RewardConfig) -> int:
    """Train a reward model; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (`AutoModelForSequenceClassification`) under
    `output_dir`; the last line of the log has the calibration on held-out pairs.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    contents = contents_of(data=[config.train_dataset], model=config.model_name_or_path)
    record = asdict(config) | {"contents": contents}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        context = context_length(config.model_name_or_path)
        load = partial(load_rankings, tokenizer=tokenizer, config=config, context=context, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset) if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train))
        model = score_model_of(config)
        write_environment(directory.path, device)

        def step_of(rows: Sequence[Ranking]) -> Step:
            return ranking_step(model, rows, config, device=device)

        with journal_of(config, directory, title="fastrl reward", total_steps=total_steps) as journal:
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
            if held_out:
                journal.write(total_steps, calibration(model, held_out, config, device=device), is_shown=False)
        card = f"Reward model from `{Path(config.model_name_or_path).name}` with fastrl, {total_steps} steps."
        save_score_model(model, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: RewardConfig) -> int:
    """Print two rankings as the model sees them, best pair first; nothing is loaded beside the tokenizer."""
    tokenizer = tokenizer_of(config)
    context = context_length(config.model_name_or_path)
    rankings = load_rankings(config.train_dataset, tokenizer, config, context=context, output_dir=None)
    rows = []
    for ranking in rankings[:2]:
        better, worse = ranking.pairs[0]
        texts = [repr(tokenizer.decode(ranking.ids[place])) for place in (better, worse)]
        lengths = " / ".join(str(len(ranking.ids[place])) for place in (better, worse))
        rows.append([*texts, lengths, str(len(ranking.pairs))])
    header = ("better", "worse", "tokens", "pairs of the prompt")
    print_table(f"{len(rankings)} prompts; two of them", header, rows)
    return 0


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of one optimizer step, over the places of its sequences.

    Attributes:
        better, worse: [P] int64 places of the two completions.
        margin: [P] f32.
        weight: [P] f32, 1 / (prompts of the step x pairs of the prompt).
        prompt: [S] int64, the prompt of each sequence.
    """

    better: Tensor
    worse: Tensor
    margin: Tensor
    weight: Tensor
    prompt: Tensor


def pairs_of(rows: Sequence[Ranking], *, device: torch.device) -> Pairs:
    """Number the pairs of some rankings through; every prompt has the same share, and so has every pair of it."""
    better: list[int] = []
    worse: list[int] = []
    margin: list[float] = []
    weight: list[float] = []
    prompt: list[int] = []
    for number, row in enumerate(rows):
        first = len(prompt)
        prompt += [number] * len(row.ids)
        for b, w in row.pairs:
            better.append(first + b)
            worse.append(first + w)
            margin.append(row.margin)
            weight.append(1 / (len(rows) * len(row.pairs)))
    return Pairs(
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(margin, device=device),
        torch.tensor(weight, device=device),
        torch.tensor(prompt, device=device),
    )


def ranking_step(
    model: PreTrainedModel, rows: Sequence[Ranking], config: RewardConfig, *, device: torch.device
) -> Step:
    """Pack the completions of one optimizer step, all of a prompt into one batch, and say what they cost."""
    pairs = pairs_of(rows, device=device)
    coefficient = config.center_rewards_coefficient

    def loss(batch: TokenBatch) -> LossOutput:
        scores = last_scores(token_scores(model, batch), batch)
        here, chosen, rejected = chosen_rejected(scores, batch, pairs)
        per_pair = bradley_terry(chosen, rejected, margin=pairs.margin[here])
        if coefficient is not None:
            per_pair = per_pair + coefficient * centering(chosen, rejected)
        return LossOutput(
            (pairs.weight[here] * per_pair).sum(), item_metrics=reward_metrics(scores, chosen, rejected, batch, pairs)
        )

    return Step(packed(rows, config, device=device), loss, n_tokens=n_tokens(rows))


def packed(rows: Sequence[Ranking], config: RewardConfig, *, device: torch.device) -> list[TokenBatch]:
    """Pack rankings; the completions of a prompt share a batch, and the last position of each has a weight."""
    sequences = [scored_sequence(ids, [0.0] * (len(ids) - 1) + [1.0]) for row in rows for ids in row.ids]
    group = [number for number, row in enumerate(rows) for _ in row.ids]
    return packed_for_ranks(sequences, token_budget=config.packing.token_budget, group=group, device=device)


def chosen_rejected(scores: Tensor, batch: TokenBatch, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of this batch: their places in `pairs`, and the scores [P] of the better and the worse one."""
    place = torch.full_like(pairs.prompt, -1)
    place[batch.sequence] = torch.arange(len(batch.sequence), device=place.device)
    here = (place[pairs.better] >= 0).nonzero()[:, 0]
    return here, scores[place[pairs.better[here]]], scores[place[pairs.worse[here]]]


@torch.no_grad()
def reward_metrics(
    scores: Tensor, chosen: Tensor, rejected: Tensor, batch: TokenBatch, pairs: Pairs
) -> dict[str, Tensor]:
    """TRL's names: means over pairs, except mean_reward (completions) and min_reward, max_reward (prompts)."""
    margin = chosen - rejected
    prompts, member = pairs.prompt[batch.sequence].unique(return_inverse=True)
    per_prompt = torch.zeros_like(prompts, dtype=scores.dtype)
    return {
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "brier": brier(margin.sigmoid(), torch.ones_like(margin)),
        "mean_reward": scores,
        "min_reward": per_prompt.scatter_reduce(0, member, scores, "amin", include_self=False),
        "max_reward": per_prompt.scatter_reduce(0, member, scores, "amax", include_self=False),
    }


@torch.no_grad()
def calibration(
    model: PreTrainedModel, rows: Sequence[Ranking], config: RewardConfig, *, device: torch.device
) -> dict[str, float]:
    """How far sigmoid(|margin|) is from the share of pairs ordered right; see `expected_calibration_error`."""
    margin = torch.cat(list(_margins(model, rows, config, device=device)))
    error = expected_calibration_error(margin.abs().sigmoid(), margin > 0)
    return {"eval/expected_calibration_error": error.item()}


def _margins(
    model: PreTrainedModel, rows: Sequence[Ranking], config: RewardConfig, *, device: torch.device
) -> Iterator[Tensor]:
    pairs = pairs_of(rows, device=device)
    for batch in packed(rows, config, device=device):
        _, chosen, rejected = chosen_rejected(last_scores(token_scores(model, batch), batch), batch, pairs)
        yield chosen - rejected
