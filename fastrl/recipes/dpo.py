"""Direct preference optimisation: pairs -> log-ratios to a reference -> a loss of the pair -> optimizer.

    ratio(y) = log pi(y|x) - log pi_ref(y|x),    loss = mean over the step's pairs of f(ratio(chosen), ratio(rejected))

The reference is scored once before training and forgotten, unless it moves (TR-DPO) or is asked for step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.losses import preference
from fastrl.train.config import DPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, length_of, steps
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.pairs import (
    PairScores,
    halves,
    n_chosen_tokens,
    n_tokens,
    pack_pairs,
    pair_metrics,
    pair_scores,
    print_pairs,
)
from fastrl.train.preference_rows import Pair, load_pairs
from fastrl.train.provenance import write_environment
from fastrl.train.reference import MovingReference, Reference, policy_and_reference
from fastrl.train.run_directory import open_run_directory
from fastrl.train.snapshot import Stateful
from fastrl.train.update import BatchLoss
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import LossOutput, TokenBatch

PairLoss = Callable[[Tensor, Tensor], Tensor]  # scores of chosen and rejected [P] -> [P]


def run(config: DPOConfig) -> int:
    """Train a policy on preference pairs; return the process's exit code.

    Writes metrics.jsonl, report.html, checkpoint-N/ and model/ (Hugging Face layout) under `output_dir`.
    """
    device = pick_device(config.device)
    check_backend(config.kernels.backend, device)
    contents = {**contents_of(data=[config.train_dataset], model=config.model_name_or_path)}
    if config.ref_model_name_or_path is not None:
        contents |= contents_of(data=[], model=config.ref_model_name_or_path)
    record = asdict(config) | {"contents": contents}
    with open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory:
        tokenizer = tokenizer_of(config)
        check_same_vocabulary(config, tokenizer, config.ref_model_name_or_path, option="ref_model_name_or_path")
        load = partial(load_pairs, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train.rows))
        policy, reference = models_of(config, train.rows + held_out)
        write_environment(directory.path, device)
        states: dict[str, Stateful] = {"optimizer": optimizer_of(config, policy)}
        moving: MovingReference | None = None
        if config.sync_ref_model:
            assert reference.model is not None
            moving = MovingReference(reference.model)
            states["reference"] = moving

        def step_of(pairs: Sequence[Pair]) -> Step:
            ref = reference.logprob([example for pair in pairs for example in (pair.chosen, pair.rejected)])
            batches = pack_pairs(pairs, token_budget=config.packing.token_budget, device=device)
            loss = dpo_batch_loss(policy, config, ref, n_chosen_tokens=n_chosen_tokens(pairs))
            return Step(batches, loss, n_tokens=n_tokens(pairs))

        with journal_of(config, directory, title="fastrl dpo", total_steps=total_steps) as journal:
            for progress in steps(
                config,
                directory,
                Rows(train.rows, held_out, step_of),
                states,
                journal=journal,
                device=device,
                constants={"truncated_rows": train.n_truncated},
            ):
                if moving is not None and progress.step % config.ref_model_sync_steps == 0:
                    moving.follow(policy, share=config.ref_model_mixup_alpha)
        if directory.interrupted():
            return EXIT_INTERRUPTED
        name, losses = Path(config.model_name_or_path).name, ", ".join(config.loss_type)
        card = f"`{name}` after {total_steps} steps of DPO ({losses}, beta {config.beta}) with fastrl."
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: DPOConfig) -> int:
    """Print how two pairs are tokenised; nothing is loaded beside the tokenizer."""
    print_pairs(config, tokenizer_of(config))
    return 0


def models_of(config: DPOConfig, pairs: Sequence[Pair]) -> tuple[PreTrainedModel, Reference]:
    """The policy, and its reference; without one every completion has the log-probability 0 there."""
    if config.reference_free:
        policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
        return policy, Reference(lambda examples: torch.zeros(len(examples), device=policy.device))
    return policy_and_reference(config, (example for pair in pairs for example in (pair.chosen, pair.rejected)))


def dpo_batch_loss(
    policy: PreTrainedModel, config: DPOConfig, ref_logprob: Tensor, *, n_chosen_tokens: int
) -> BatchLoss:
    """The configured losses of one packed batch of a step's pairs, as `update` calls it.

    Args:
        ref_logprob: [2P] under the reference: chosen and rejected of all pairs of the step in turn.
        n_chosen_tokens: trained tokens of the step's chosen completions.
    """
    n_pairs = len(ref_logprob) // 2
    weights = config.loss_weights or (1.0,) * len(config.loss_type)

    def loss(batch: TokenBatch) -> LossOutput:
        scores = pair_scores(policy, batch, config.kernels)
        ref_chosen, ref_rejected = halves(ref_logprob[scores.sequence])
        chosen, rejected = scores.chosen - ref_chosen, scores.rejected - ref_rejected
        total = torch.zeros_like(chosen)
        for name, weight in zip(config.loss_type, weights, strict=True):
            if name == "sft":
                # The mean over the step's tokens, as a sum over its pairs.
                value = -scores.chosen * (n_pairs / n_chosen_tokens)
            else:
                value = pair_loss(name, config)(*_compared(name, config, chosen, rejected, scores))
            total = total + weight * value
        return LossOutput(
            total.sum() / n_pairs,
            {"entropy": scores.entropy},
            pair_metrics(config.beta * chosen, config.beta * rejected, scores.chosen, scores.rejected),
        )

    return loss


def pair_loss(name: str, config: DPOConfig) -> PairLoss:
    """The function behind a `loss_type`, with its numbers."""
    beta, smoothing = config.beta, config.label_smoothing
    losses: dict[str, PairLoss] = {
        "sigmoid": partial(preference.sigmoid, beta=beta, label_smoothing=smoothing),
        "sigmoid_norm": partial(preference.sigmoid, beta=beta, label_smoothing=smoothing),
        "hinge": partial(preference.hinge, beta=beta),
        "ipo": partial(preference.ipo, beta=beta),
        "exo_pair": partial(preference.exo_pair, beta=beta, label_smoothing=smoothing),
        "nca_pair": partial(preference.nca_pair, beta=beta),
        "robust": partial(preference.robust, beta=beta, label_smoothing=smoothing),
        "bco_pair": partial(preference.bco_pair, beta=beta),
        "sppo_hard": partial(preference.sppo_hard, beta=beta),
        "apo_zero": partial(preference.apo_zero, beta=beta),
        "apo_down": partial(preference.apo_down, beta=beta),
        "discopop": partial(preference.discopop, beta=beta, tau=config.discopop_tau),
    }
    return losses[name]


def _compared(
    name: str, config: DPOConfig, chosen: Tensor, rejected: Tensor, scores: PairScores
) -> tuple[Tensor, Tensor]:
    """[P] log-ratios of the completions, or their means per token where the loss compares those."""
    if name == "sigmoid_norm" or (name == "ipo" and config.length_averaged):
        return chosen / scores.chosen_length, rejected / scores.rejected_length
    return chosen, rejected
