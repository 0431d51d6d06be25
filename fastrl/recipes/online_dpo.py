"""Online DPO: prompts -> completions of the policy -> rewards -> the best against the worst -> a DPO step -> sampler.

Each round is one optimizer step on fresh pairs, so the reference cannot be scored ahead: it is a second model, or
with LoRA the policy without its adapter. Prompts whose completions tie, or have no two verdicts, make no pair.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.losses import preference
from fastrl.report.completions import samples_of
from fastrl.report.journal import Journal
from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import resolve_rewards
from fastrl.rollout.builtin import context_length
from fastrl.train.attend import attended
from fastrl.train.collect import Experience, Sampler, TrainerState, collect, collect_round, sampled_reward
from fastrl.train.config import OnlineDPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.curriculum import weight_metrics
from fastrl.train.device import check_backend, compute_dtype, peak_gib, pick_device
from fastrl.train.engine import opened_engine
from fastrl.train.estimate import estimate_by_group
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.export import save_pretrained
from fastrl.train.from_config import journal_of, model_of, optimizer_of, tokenizer_of
from fastrl.train.guards import check_verdicts
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model_reward import ModelReward
from fastrl.train.online_pairs import best_and_worst
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.pairs import halves, n_tokens, pack_pairs, pair_metrics, pair_scores
from fastrl.train.policy_setup import check_lengths, prompts_of, sampler_at, sampler_of
from fastrl.train.prompts import Prompt
from fastrl.train.provenance import write_environment
from fastrl.train.reference import Reference, live_reference
from fastrl.train.reward_workers import check_error_rates
from fastrl.train.run_directory import open_run_directory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.score_model import load_score_model, token_scores
from fastrl.train.shares import step_size
from fastrl.train.snapshot import Progress, restore, save
from fastrl.train.update import BatchLoss, update
from fastrl.train.vocabulary import check_same_vocabulary
from fastrl.types import LossOutput, TokenBatch


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run computes with.

    Attributes:
        prompts: the pool that rounds draw from.
        held_out: prompts for evaluation; may be empty.
        policy: the model that is trained.
        reference: what it is compared with.
        optimizer: owns the policy's master weights.
        sampler: engine, rewards and sampling parameters.
        groups: prompts of one step.
        total_steps: optimizer steps of the whole run.
    """

    prompts: list[Prompt]
    held_out: list[Prompt]
    policy: PreTrainedModel
    reference: Reference
    optimizer: MasterAdamW
    sampler: Sampler
    groups: int
    total_steps: int


def run(config: OnlineDPOConfig) -> int:
    """Train a policy on pairs of its own completions; return the process's exit code.

    Writes metrics.jsonl, completions.jsonl, report.html, checkpoint-N/ and model/ under `output_dir`.
    """
    rewards = config.reward_funcs
    contents = {**contents_of(data=[config.train_dataset], model=config.model_name_or_path, rewards=rewards)}
    for path in (config.ref_model_name_or_path, config.reward_model_path):
        contents |= contents_of(data=[], model=path) if path is not None else {}
    record = asdict(config) | {"contents": contents}
    with (
        open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory,
        ExitStack() as resources,
    ):
        tokenizer = tokenizer_of(config)
        check_same_vocabulary(config, tokenizer, config.ref_model_name_or_path, option="ref_model_name_or_path")
        check_same_vocabulary(config, tokenizer, config.reward_model_path, option="reward_model_path")
        setup = set_up(config, tokenizer, resources)
        write_environment(directory.path, setup.policy.device)
        states = {"optimizer": setup.optimizer}
        with journal_of(config, directory, title="fastrl online_dpo", total_steps=setup.total_steps) as journal:
            progress, offsets = restore(directory, states, resume=config.resume_from_checkpoint)
            journal.truncate_to(offsets)
            rounds_without_verdict, failing = 0, dict[str, int]()
            while progress.step < setup.total_steps:
                setup.sampler.engine.load_weights(setup.policy, progress.step)
                experience, ordinal = collect_round(
                    sampler_at(setup.sampler, config, progress),
                    setup.prompts,
                    first_ordinal=progress.ordinal,
                    groups=setup.groups,
                    max_rounds=0,
                    state=TrainerState(progress.step, setup.total_steps, progress.ordinal / len(setup.prompts)),
                )
                setup.sampler.engine.rest()
                if directory.interrupted():
                    # This round has taught nothing yet: the resumed run samples it again, alike.
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                    return EXIT_INTERRUPTED
                progress = learn(config, setup, journal, experience, replace(progress, ordinal=ordinal))
                is_last = progress.step >= setup.total_steps
                rounds_without_verdict = check_verdicts(
                    sampled_reward(experience), rounds_without_verdict, experience.scores.errors
                )
                failing = check_error_rates(experience.scores, failing, config.rewards)
                if setup.held_out and (is_last or (config.eval_steps and progress.step % config.eval_steps == 0)):
                    evaluate(setup, journal, progress)
                progress = attended(config, directory, journal, progress, states, kl_coef=config.beta)
                if is_last or directory.interrupted() or progress.step % config.save_steps == 0:
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                if directory.interrupted():
                    return EXIT_INTERRUPTED
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {progress.step} steps of online DPO (beta {config.beta}) with fastrl."
        save_pretrained(setup.policy, tokenizer, directory.path / "model", card=card)
    return 0


def set_up(config: OnlineDPOConfig, tokenizer: PreTrainedTokenizerBase, resources: ExitStack) -> Setup:
    """Check the data, then load the models.

    Args:
        resources: closes the engine when the run ends.

    Raises:
        ValueError: bad rows, or sequences that will not fit.
    """
    check_backend(config.kernels.backend, pick_device(config.device))
    rewards = resolve_rewards(config.reward_funcs, config.reward_weights) if config.reward_funcs else []
    load = partial(prompts_of, config, tokenizer, rewards, output_dir=config.output_dir)
    prompts = load(config.train_dataset)
    held_out = load(config.eval_dataset) if config.eval_dataset else []
    policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
    check_lengths(config, prompts + held_out, context=context_length(policy))
    engine = resources.enter_context(opened_engine(config, policy, tokenizer))
    groups = step_size(config) // config.num_generations
    steps = ceil(config.num_train_epochs * len(prompts) / groups)
    return Setup(
        prompts=prompts,
        held_out=held_out,
        policy=policy,
        reference=live_reference(config, policy, config.ref_model_name_or_path, temperature=config.temperature),
        optimizer=optimizer_of(config, policy),
        sampler=sampler_of(config, engine, tokenizer, [*rewards, *model_rewards(config, tokenizer)]),
        groups=groups,
        total_steps=config.max_steps if config.max_steps > 0 else steps,
    )


def model_rewards(config: OnlineDPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[Reward]:
    """The reward model as a reward function; none without one."""
    if config.reward_model_path is None:
        return []
    device = pick_device(config.device)
    model = load_score_model(
        config.reward_model_path,
        dtype=compute_dtype(config.dtype),
        device=device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    ).requires_grad_(False)
    budget = config.packing.token_budget + 1  # it is fed the last token too
    judge = ModelReward(partial(token_scores, model), tokenizer, token_budget=budget, device=device)
    return [Reward(judge, weight=config.reward_model_weight, name="reward_model")]


def learn(
    config: OnlineDPOConfig, setup: Setup, journal: Journal, experience: Experience, progress: Progress
) -> Progress:
    """Take the optimizer step of one round and log it; return the progress after it."""
    started = perf_counter()
    rewards = sampler_at(setup.sampler, config, progress).rewards
    beta = config.beta if progress.kl_coef is None else progress.kl_coef
    reward = penalised(config, experience)
    paired = best_and_worst(experience.rollouts, reward, experience.group)
    n_sampled = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in experience.rollouts)
    ref = setup.reference.logprob([example for pair in paired.pairs for example in (pair.chosen, pair.rejected)])
    metrics = update(
        setup.optimizer,
        online_batch_loss(setup.policy, replace(config, beta=beta), ref),
        pack_pairs(paired.pairs, token_budget=config.packing.token_budget, device=setup.policy.device),
        config,
        lr=progress.lr_scale
        * learning_rate_at(
            progress.step,
            peak=config.learning_rate,
            kind=config.lr_scheduler_type,
            warmup_steps=warmup_length(
                setup.total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio
            ),
            total_steps=setup.total_steps,
        ),
        step=progress.step + 1,
    )
    progress = replace(progress, step=progress.step + 1, num_tokens=progress.num_tokens + n_sampled)
    seconds = perf_counter() - started + sum(experience.seconds.values())
    metrics |= experience_metrics(experience, updates=1) | {
        "pairs": len(paired.pairs),
        "tied_prompts": paired.n_tied,
        "unjudged_prompts": paired.n_unjudged,
        "num_tokens": progress.num_tokens,
        "epoch": progress.ordinal / len(setup.prompts),
        "time/train": perf_counter() - started,
        "step_time": seconds,
        "tokens_per_second": n_tokens(paired.pairs) / seconds,
        "memory/peak_gib": peak_gib(setup.policy.device),
    }
    metrics |= weight_metrics(rewards, config.reward_schedule)
    if paired.pairs:
        metrics["objective/scores_margin"] = sum(paired.margins) / len(paired.margins)
    samples = samples_of(
        [prompt.prompt for prompt in experience.prompts],
        experience.completions,
        [each.name for each in setup.sampler.rewards],
        experience.scores,
        count=config.report.log_completions,
    )
    is_shown = progress.step % config.logging_steps == 0 or progress.step >= setup.total_steps
    journal.write_errors(progress.step, experience.scores.errors)
    journal.write(progress.step, metrics, samples, is_shown=is_shown)
    return progress


def evaluate(setup: Setup, journal: Journal, progress: Progress) -> None:
    """Sample the held-out prompts once each, always with the same seeds, and log what they earn."""
    sampler = replace(setup.sampler, num_generations=1, seed=setup.sampler.seed + 1)
    sampler.engine.load_weights(setup.policy, progress.step)
    found = collect(sampler, setup.held_out, range(len(setup.held_out)))
    sampler.engine.rest()
    metrics = {f"eval/{name}": value for name, value in found.scores.metrics.items() if name.startswith("rewards/")}
    if bool(found.reward.isfinite().any()):
        reward = estimate_by_group(found.scores.total, found.group.tolist())
        metrics |= {"eval/reward": reward.mean, "eval/reward_standard_error": reward.standard_error}
    journal.write(progress.step, metrics)
    journal.write_errors(progress.step, found.scores.errors)


def penalised(config: OnlineDPOConfig, experience: Experience) -> Tensor:
    """[S] rewards, less `missing_eos_penalty` where a completion hit the length limit."""
    if config.missing_eos_penalty is None:
        return experience.reward
    is_cut = torch.tensor([rollout.finish_reason == "length" for rollout in experience.rollouts])
    return experience.reward - config.missing_eos_penalty * is_cut


def online_batch_loss(policy: PreTrainedModel, config: OnlineDPOConfig, ref_logprob: Tensor) -> BatchLoss:
    """The loss of one packed batch of a step's pairs, as `update` calls it.

    Args:
        ref_logprob: [2P] under the reference: chosen and rejected of all pairs of the step in turn.
    """
    n_pairs = len(ref_logprob) // 2
    compare = preference.ipo if config.loss_type == "ipo" else preference.sigmoid

    def loss(batch: TokenBatch) -> LossOutput:
        scores = pair_scores(policy, batch, config.kernels, temperature=config.temperature)
        ref_chosen, ref_rejected = halves(ref_logprob[scores.sequence])
        chosen, rejected = scores.chosen - ref_chosen, scores.rejected - ref_rejected
        return LossOutput(
            compare(chosen, rejected, beta=config.beta).sum() / n_pairs,
            {"entropy": scores.entropy},
            pair_metrics(config.beta * chosen, config.beta * rejected, scores.chosen, scores.rejected),
        )

    return loss
