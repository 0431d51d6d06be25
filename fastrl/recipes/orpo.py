"""Odds-ratio preference optimisation: SFT on the chosen sequence, and a penalty on the odds of the rejected one.

    loss = NLL(chosen) - beta mean over the step's pairs of log sigmoid(log odds(chosen) - log odds(rejected))

Odds are those of the completion's mean log-probability per token; no reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from fastrl.losses.reference_free import log_odds_ratio, orpo
from fastrl.train.config import ORPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head
from fastrl.train.pairs import halves, n_tokens, pair_metrics, print_pairs
from fastrl.train.preference_rows import Pair, load_pairs
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.train.supervised import Example
from fastrl.train.update import BatchLoss
from fastrl.types import LossOutput, TokenBatch


def run(config: ORPOConfig) -> int:
    """Train a policy on preference pairs from a base model on; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    record = asdict(config) | {"contents": contents_of(data=[config.train_dataset], model=config.model_name_or_path)}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        load = partial(load_pairs, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train.rows))
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        write_environment(directory.path, device)
        step_of = partial(orpo_step, policy, config, device=device)
        with journal_of(config, directory, title="fastrl orpo", total_steps=total_steps) as journal:
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
        card = f"`{name}` after {total_steps} steps of ORPO (beta {config.beta}) with fastrl."
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: ORPOConfig) -> int:
    """Print how two pairs are tokenised; nothing is loaded beside the tokenizer."""
    print_pairs(config, tokenizer_of(config))
    return 0


def orpo_step(policy: PreTrainedModel, config: ORPOConfig, pairs: Sequence[Pair], *, device: torch.device) -> Step:
    """Pack the pairs of a step; with `nll_on_prompt` the prompts of the chosen sequences are scored too."""
    sequences, starts = [], []
    n_nll_tokens = 0
    for pair in pairs:
        scored = _with_prompt(pair.chosen) if config.nll_on_prompt else pair.chosen.is_trained
        n_nll_tokens += sum(scored)
        for example, is_scored in ((pair.chosen, scored), (pair.rejected, pair.rejected.is_trained)):
            sequences.append(supervised_sequence(example.ids, is_scored, weight=1.0))
            starts.append(example.is_trained.index(True))
    budget, group = config.packing.token_budget, [i // 2 for i in range(len(sequences))]
    batches = packed_for_ranks(sequences, token_budget=budget, group=group, device=device)
    start = torch.tensor(starts, device=device)
    loss = orpo_batch_loss(policy, config, start, n_nll_tokens=n_nll_tokens)
    return Step(batches, loss, n_tokens=n_tokens(pairs))


def orpo_batch_loss(policy: PreTrainedModel, config: ORPOConfig, start: Tensor, *, n_nll_tokens: int) -> BatchLoss:
    """The loss of one packed batch of a step's pairs, as `update` calls it.

    Args:
        start: [2P] first token of each completion, of all sequences of the step.
        n_nll_tokens: tokens of the step that the NLL averages over.
    """
    n_pairs = len(start) // 2

    def loss(batch: TokenBatch) -> LossOutput:
        logprob, entropy = trained_logprob(policy, model_head(policy), batch, config.kernels)
        first = start[batch.sequence].repeat_interleave(batch.cu_seqlens.diff().long())
        # Position t predicts the token after it; scored positions before the completion count in the NLL alone.
        is_completion = ((batch.weight != 0) & (batch.position_ids + 1 >= first)).to(logprob.dtype)
        chosen_nll = -halves(sequence_sum(logprob, batch))[0]
        length = sequence_sum(is_completion, batch)
        chosen, rejected = halves(sequence_sum(logprob * is_completion, batch) / length)
        penalty = orpo(chosen, rejected, beta=config.beta)
        log_odds = log_odds_ratio(chosen, rejected).detach()
        metrics = pair_metrics(config.beta * chosen, config.beta * rejected, chosen, rejected) | {
            "nll_loss": chosen_nll.detach() * (n_pairs / n_nll_tokens),
            "log_odds_chosen": log_odds,
            "log_odds_ratio": logsigmoid(log_odds),
        }
        return LossOutput(
            chosen_nll.sum() / n_nll_tokens + penalty.sum() / n_pairs, {"entropy": entropy.detach()}, metrics
        )

    return loss


def _with_prompt(example: Example) -> list[bool]:
    """The trained tokens, and all before the first of them but the very first, which nothing predicts."""
    start = example.is_trained.index(True)
    return [0 < i < start or is_trained for i, is_trained in enumerate(example.is_trained)]
