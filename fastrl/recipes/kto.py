"""Kahneman-Tversky optimisation: single completions, wanted or not, against a baseline of how far the policy moved.

    r = log pi(y|x) - log pi_ref(y|x),    z = max(0, mean over the step of log pi(y'|x) - log pi_ref(y'|x))
    loss = mean over the step of  w_desirable sigmoid(-beta (r - z))  or  w_undesirable sigmoid(beta (r - z))

y' is the completion of another prompt of the same step; z carries no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.losses.unpaired import kl_baseline, kto
from fastrl.train.config import KTOConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import check_backend, pick_device
from fastrl.train.export import save_pretrained
from fastrl.train.fit import Rows, Step, length_of, steps
from fastrl.train.from_config import journal_of, optimizer_of, tokenizer_of
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.logprob import sequence_sum, trained_logprob
from fastrl.train.model import model_head
from fastrl.train.order import row_at
from fastrl.train.preference_rows import Judged, load_judged, longest_sequence
from fastrl.train.provenance import write_environment
from fastrl.train.reference import (
    MovingReference,
    Reference,
    completion_logprob,
    policy_and_reference,
)
from fastrl.train.run_directory import open_run_directory
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks
from fastrl.train.snapshot import Stateful
from fastrl.train.supervised import Example
from fastrl.train.update import BatchLoss
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import LossOutput, TokenBatch


def run(config: KTOConfig) -> int:
    """Train a policy on judged completions; return the process's exit code.

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
        load = partial(load_judged, tokenizer=tokenizer, config=config, output_dir=config.output_dir)
        train = load(config.train_dataset)
        held_out = load(config.eval_dataset).rows if config.eval_dataset else []
        _, _, total_steps = length_of(config, len(train.rows))
        policy, reference = policy_and_reference(config, _known(config, train.rows, held_out))
        write_environment(directory.path, device)
        states: dict[str, Stateful] = {"optimizer": optimizer_of(config, policy)}
        moving: MovingReference | None = None
        if config.sync_ref_model:
            assert reference.model is not None
            moving = MovingReference(reference.model)
            states["reference"] = moving
        step_of = partial(kto_step, policy, reference, config, longest=longest_sequence(config), device=device)
        with journal_of(
            config, directory, title=f"fastrl kto ({config.loss_type})", total_steps=total_steps
        ) as journal:
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
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {total_steps} steps of KTO ({config.loss_type}, beta {config.beta}) with fastrl."
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def kto_step(
    policy: PreTrainedModel,
    reference: Reference,
    config: KTOConfig,
    rows: Sequence[Judged],
    *,
    longest: int,
    device: torch.device,
) -> Step:
    """Measure the baseline under the weights of this moment and pack the step's completions."""
    baseline = torch.zeros((), device=device)
    if config.loss_type == "kto":
        mismatched = mismatched_examples([row.example for row in rows], longest=longest)
        if mismatched:
            moved = completion_logprob(policy, mismatched, config) - reference.logprob(mismatched)
            baseline = kl_baseline(moved)
    ref = reference.logprob([row.example for row in rows])
    sequences = [supervised_sequence(row.example.ids, row.example.is_trained, weight=1.0) for row in rows]
    batches = packed_for_ranks(sequences, token_budget=config.packing.token_budget, device=device)
    label = torch.tensor([row.is_desirable for row in rows], device=device)
    loss = kto_batch_loss(policy, config, ref, label, baseline)
    return Step(batches, loss, n_tokens=sum(len(row.example.ids) for row in rows))


def kto_batch_loss(
    policy: PreTrainedModel, config: KTOConfig, ref_logprob: Tensor, is_desirable: Tensor, baseline: Tensor
) -> BatchLoss:
    """The loss of one packed batch of a step's completions, as `update` calls it.

    Args:
        ref_logprob: [S] under the reference, of all completions of the step.
        is_desirable: [S] bool.
        baseline: [] z of the step.
    """
    count = len(ref_logprob)
    desirable = is_desirable.sum()
    # So scaled, the mean over all is the mean of the chosen less the mean of the rejected; NaN without both.
    share = torch.where(is_desirable, 1 / desirable, -1 / (count - desirable)) * count
    share = torch.where((desirable > 0) & (desirable < count), share, torch.nan)

    def loss(batch: TokenBatch) -> LossOutput:
        logprob, entropy = trained_logprob(policy, model_head(policy), batch, config.kernels)
        total, label = sequence_sum(logprob, batch), is_desirable[batch.sequence]
        log_ratio = total - ref_logprob[batch.sequence]
        value = kto(
            log_ratio,
            label,
            baseline,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        metrics = {"kl": baseline.expand(len(total))}
        for name, is_here in (("chosen", label), ("rejected", ~label)):
            metrics[f"rewards/{name}"] = torch.where(is_here, config.beta * log_ratio.detach(), torch.nan)
            metrics[f"logps/{name}"] = torch.where(is_here, total.detach(), torch.nan)
        metrics["rewards/margins"] = share[batch.sequence] * config.beta * log_ratio.detach()
        return LossOutput(value.sum() / count, {"entropy": entropy.detach()}, metrics)

    return loss


def mismatched_examples(examples: Sequence[Example], *, longest: int) -> list[Example]:
    """Each prompt with the completion of the row before it, going round; rows of the same prompt are passed over.

    Args:
        longest: most tokens of a sequence; the completion is cut to it.

    Returns:
        One for each example, or none at all when all have the same prompt.
    """
    n, found = len(examples), []
    for i, example in enumerate(examples):
        prompt = _prompt(example)
        earlier = (examples[(i - back) % n] for back in range(1, n))
        other = next((each for each in earlier if _prompt(each) != prompt), None)
        if other is not None:
            start = other.is_trained.index(True)
            ids = (*prompt, *other.ids[start:])
            mask = (*(False,) * len(prompt), *other.is_trained[start:])
            found.append(Example(ids[:longest], mask[:longest]))
    return found


def _prompt(example: Example) -> tuple[int, ...]:
    return example.ids[: example.is_trained.index(True)]


def _known(config: KTOConfig, train: Sequence[Judged], held_out: Sequence[Judged]) -> Iterator[Example]:
    """Every completion the run will compare, the mismatched ones of each of its steps included."""
    yield from (row.example for row in (*train, *held_out))
    if config.loss_type != "kto":
        return
    longest = longest_sequence(config)
    batch_size, end, _ = length_of(config, len(train))
    for first in range(0, end, batch_size):
        ordinals = range(first, min(first + batch_size, end))
        rows = [train[row_at(i, n=len(train), seed=config.seed)] for i in ordinals]
        yield from mismatched_examples([row.example for row in rows], longest=longest)
    yield from mismatched_examples([row.example for row in held_out], longest=longest)
