"""Rank responses to align human feedback: any number of scored completions of a prompt, no reference model.

p_i = mean log-probability per token of completion i
loss = mean over the step's prompts of  sum over pairs with score_i > score_j of max(0, p_j - p_i)  - nll_coef p_best
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.losses.ranked import is_best, rrhf
from fastrl.train.config import RRHFConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head
from fastrl.train.preference_rows import Ranked, load_ranked
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.train.update import BatchLoss
from fastrl.types import LossOutput, TokenBatch


def run(config: RRHFConfig) -> int:
    """Train a policy on ranked completions; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    record = asdict(config) | {"contents": contents_of(data=[config.train_dataset], model=config.model_name_or_path)}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        load = partial(load_ranked, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train.rows))
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        write_environment(directory.path, device)
        step_of = partial(rrhf_step, policy, config, device=device)
        with journal_of(config, directory, title="fastrl rrhf", total_steps=total_steps) as journal:
            code = fit(
                config,
                directory,
                Rows(train.rows, held_out, step_of),
                {"optimizer": optimizer_of(config, policy)},
                journal=journal,
                device=device,
                constants={"truncated_rows": train.n_truncated},
            )
        if code != 0:
            return code
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {total_steps} steps of RRHF with fastrl."
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def rrhf_step(policy: PreTrainedModel, config: RRHFConfig, rows: Sequence[Ranked], *, device: torch.device) -> Step:
    """Pack the completions of each prompt of a step into one batch."""
    examples = [example for row in rows for example in row.examples]
    group = [i for i, row in enumerate(rows) for _ in row.examples]
    sequences = [supervised_sequence(example.ids, example.is_trained, weight=1.0) for example in examples]
    batches = packed_for_ranks(sequences, token_budget=config.packing.token_budget, group=group, device=device)
    score = torch.tensor([score for row in rows for score in row.scores], device=device)
    loss = rrhf_batch_loss(policy, config, score, torch.tensor(group, device=device), n_prompts=len(rows))
    return Step(batches, loss, n_tokens=sum(len(example.ids) for example in examples))


def rrhf_batch_loss(
    policy: PreTrainedModel, config: RRHFConfig, score: Tensor, group: Tensor, *, n_prompts: int
) -> BatchLoss:
    """The loss of one packed batch of a step's completions, as `update` calls it.

    Args:
        score: [S] of all completions of the step; higher is better.
        group: [S] int64, the prompt of each.
        n_prompts: of the whole step.
    """

    def loss(batch: TokenBatch) -> LossOutput:
        logprob, entropy = trained_logprob(policy, model_head(policy), batch, config.kernels)
        length = sequence_sum((batch.weight != 0).to(logprob.dtype), batch)
        mean = sequence_sum(logprob, batch) / length
        here, prompt = score[batch.sequence], group[batch.sequence]
        rank, best = rrhf(mean, here, prompt), is_best(here, prompt)
        total = (rank.sum() - config.nll_coef * mean[best].sum()) / n_prompts
        known, others = mean.detach(), (prompt[None, :] == prompt[:, None]) & (here[None, :] < here[:, None])
        accuracy = torch.where(others, (known[:, None] > known[None, :]).to(known.dtype), torch.nan)
        metrics = {
            "rank_loss": torch.zeros_like(known[best]).index_add(0, _numbered(prompt), rank.detach()),
            "nll_loss": -known[best],
            "rewards/accuracies": accuracy.flatten(),
            "logps/best": known[best],
            "logps/others": known[~best],
        }
        return LossOutput(total, {"entropy": entropy.detach()}, metrics)

    return loss


def _numbered(prompt: Tensor) -> Tensor:
    """[S] int64: the prompts of a batch numbered from 0 in the order of their completions."""
    numbers: Tensor = prompt.unique(return_inverse=True)[1]
    return numbers
