"""Preference pairs without a reference model: CPO and SimPO.

    loss = mean over the step's pairs of f(score(chosen), score(rejected)) + cpo_alpha NLL(chosen)

The score is the log-probability of the completion, or its mean per token (SimPO, IPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from fastrl.losses import preference
from fastrl.losses.reference_free import simpo
from fastrl.train.config import CPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, fit, length_of
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.pairs import n_chosen_tokens, n_tokens, pack_pairs, pair_metrics, pair_scores, print_pairs
from fastrl.train.preference_rows import Pair, load_pairs
from fastrl.train.provenance import write_environment
from fastrl.train.run_directory import open_run_directory
from fastrl.train.update import BatchLoss
from fastrl.types import LossOutput, TokenBatch


def run(config: CPOConfig) -> int:
    """Train a policy on preference pairs alone; return the process's exit code.

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

        def step_of(pairs: Sequence[Pair]) -> Step:
            batches = pack_pairs(pairs, token_budget=config.packing.token_budget, device=device)
            loss = cpo_batch_loss(policy, config, n_pairs=len(pairs), n_chosen_tokens=n_chosen_tokens(pairs))
            return Step(batches, loss, n_tokens=n_tokens(pairs))

        with journal_of(
            config, directory, title=f"fastrl cpo ({config.loss_type})", total_steps=total_steps
        ) as journal:
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
        card = f"`{name}` after {total_steps} steps of CPO ({config.loss_type}, beta {config.beta}) with fastrl."
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: CPOConfig) -> int:
    """Print how two pairs are tokenised; nothing is loaded beside the tokenizer."""
    print_pairs(config, tokenizer_of(config))
    return 0


def cpo_batch_loss(policy: PreTrainedModel, config: CPOConfig, *, n_pairs: int, n_chosen_tokens: int) -> BatchLoss:
    """The loss of one packed batch of a step's pairs, as `update` calls it.

    Args:
        n_pairs: of the whole step.
        n_chosen_tokens: trained tokens of the step's chosen completions.
    """
    is_averaged = config.loss_type in ("ipo", "simpo")

    def loss(batch: TokenBatch) -> LossOutput:
        scores = pair_scores(policy, batch, config.kernels)
        chosen, rejected = scores.chosen, scores.rejected
        if is_averaged:
            chosen, rejected = chosen / scores.chosen_length, rejected / scores.rejected_length
        total = _compared(config, chosen, rejected).sum() / n_pairs
        if config.cpo_alpha > 0:
            total = total - config.cpo_alpha * scores.chosen.sum() / n_chosen_tokens
        metrics = pair_metrics(config.beta * chosen, config.beta * rejected, chosen, rejected)
        metrics["nll_loss"] = (-scores.chosen * (n_pairs / n_chosen_tokens)).detach()
        return LossOutput(total, {"entropy": scores.entropy}, metrics)

    return loss


def _compared(config: CPOConfig, chosen: Tensor, rejected: Tensor) -> Tensor:
    if config.loss_type == "simpo":
        gamma, smoothing = config.simpo_gamma, config.label_smoothing
        return simpo(chosen, rejected, beta=config.beta, gamma=gamma, label_smoothing=smoothing)
    if config.loss_type == "hinge":
        return preference.hinge(chosen, rejected, beta=config.beta)
    if config.loss_type == "ipo":
        return preference.ipo(chosen, rejected, beta=config.beta)
    return preference.sigmoid(chosen, rejected, beta=config.beta, label_smoothing=config.label_smoothing)
