"""Constitutional AI as data: drafts, critiques and revisions under principles, then pairs labelled by a critic.

prompts -> drafts (policy) -> critique -> revision (critic) -> scores of all answers (critic) -> best against worst
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.data.template import filled
from fastrl.rewards.judge_config import read_judge
from fastrl.rewards.text import completion_text
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.train.config import RLAIFConfig
from fastrl.train.contents import contents_of
from fastrl.train.critic import Case, Critic, EndpointCritic, ModelCritic
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.durable import write_text
from fastrl.train.engine import opened_engine
from fastrl.train.guards import MOST_ROUNDS_WITHOUT_VERDICT, NoVerdictError
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.partial_file import open_partial
from fastrl.train.principles import Answer, Principle, drawn, read_principles, revised_pairs, scored_pair, usable
from fastrl.train.prompts import Prompt, load_prompts
from fastrl.train.provenance import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(config: RLAIFConfig) -> int:
    """Write a preference dataset; a killed run goes on after the last prompts it had finished.

    Returns:
        0, or 1 when no pair was made.
    """
    principles = _principles(config)
    tokenizer = _tokenizer(config, config.model_name_or_path)
    limit = config.rollout.max_prompt_length
    prompts = load_prompts(config.prompt_file, tokenizer, config.data, (), max_prompt_length=limit, output_dir=None)
    model = _model(config, config.model_name_or_path)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    critic = critic_of(config, model, tokenizer)
    record = {"config": asdict(config), "contents": _contents(config), "principles": [asdict(p) for p in principles]}
    with open_partial(Path(config.output_file), record) as file, opened_engine(config, model, tokenizer) as engine:
        counts = Counter(file.counts)
        size = max(1, config.rollout.batch_size // config.num_generations)
        rounds_without = 0
        for start in range(file.done, len(prompts), size):
            ordinals = range(start, min(start + size, len(prompts)))
            chosen = [drawn(principles, seed=config.seed, ordinal=ordinal) for ordinal in ordinals]
            batch = [prompts[ordinal] for ordinal in ordinals]
            answers = drafts(config, engine, decode, batch, ordinals)
            answers = revised(config, critic, batch, ordinals, chosen, answers)
            if config.labels == "critic":
                answers = scored(config, critic, batch, chosen, answers)
                rounds_without = _check_scores(answers, rounds_without, critic)
            rows = [row for items in zip(batch, chosen, answers, strict=True) for row in _rows(config, *items)]
            file.write(rows)
            _count(counts, answers, rows)
            file.mark(ordinals.stop, counts)
        provenance = record | {"environment": environment(model.device), "counts": dict(counts)}
        print(f"{config.output_file}: {counts['rows']} pairs from {counts['completions']} answers, {_summary(counts)}")
        if critic.first_failure():
            print(f"the critic failed at times; the first: {critic.first_failure()}")
        origin = Path(f"{config.output_file}.provenance.json")
        write_text(origin, json.dumps(provenance, indent=1, sort_keys=True) + "\n")
        file.finish()
    return 0 if counts["rows"] else 1


def critic_of(config: RLAIFConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """The judge's endpoint, another model, or the policy itself."""
    if config.critic_judge is not None:
        return EndpointCritic(read_judge(config.critic_judge))
    if config.critic_model_name_or_path is not None:
        tokenizer = _tokenizer(config, config.critic_model_name_or_path)
        model = _model(config, config.critic_model_name_or_path)
    good, bad = config.verdicts
    batch_size = config.rollout.batch_size
    return ModelCritic(model, tokenizer, sampling=_sampling(config), batch_size=batch_size, verdicts=(good, bad))


def drafts(
    config: RLAIFConfig,
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Prompt],
    ordinals: Sequence[int],
) -> list[list[Answer]]:
    """`num_generations` answers of the policy to each prompt."""
    samples = range(config.num_generations)
    seeds = [request_seed(config.seed, ordinal, sample) for ordinal in ordinals for sample in samples]
    rollouts = engine.generate([prompt.ids for prompt in prompts for _ in samples], _sampling(config), seeds=seeds)
    answers = [decode(rollout.completion_ids).strip() for rollout in rollouts]
    found = [
        Answer(text, rollout.finish_reason == "stop", i % len(samples))
        for i, (text, rollout) in enumerate(zip(answers, rollouts, strict=True))
    ]
    return [found[start : start + len(samples)] for start in range(0, len(found), len(samples))]


def revised(
    config: RLAIFConfig,
    critic: Critic,
    prompts: Sequence[Prompt],
    ordinals: Sequence[int],
    principles: Sequence[Principle],
    answers: Sequence[list[Answer]],
) -> list[list[Answer]]:
    """The answers, and after them each round's revisions; a draft whose critic fails keeps what it has."""
    found = [list(each) for each in answers]
    latest = [(place, answer) for place, each in enumerate(answers) for answer in usable(each)]
    for turn in range(config.revisions):
        fields = [
            {"prompt": as_text(prompts[p].prompt), "response": answer.text, "principle": principles[p].text}
            for p, answer in latest
        ]
        samples = [config.num_generations * (2 * turn + 1) + answer.draft for _, answer in latest]
        seeds = [request_seed(config.seed, ordinals[p], s) for (p, _), s in zip(latest, samples, strict=True)]
        requests = [filled(config.critique_template, each) for each in fields]
        critiques = critic.write(requests, seeds=seeds, length=config.max_critique_length)
        kept = [i for i, critique in enumerate(critiques) if critique is not None]
        requests = [filled(config.revision_template, fields[i] | {"critique": critiques[i]}) for i in kept]
        seeds = [request_seed(config.seed, ordinals[latest[i][0]], samples[i] + config.num_generations) for i in kept]
        texts = critic.write(requests, seeds=seeds, length=config.max_completion_length)
        latest = [
            (latest[i][0], Answer(text, True, latest[i][1].draft, critiques[i]))
            for i, text in zip(kept, texts, strict=True)
            if text is not None
        ]
        for place, answer in latest:
            found[place].append(answer)
    return found


def scored(
    config: RLAIFConfig,
    critic: Critic,
    prompts: Sequence[Prompt],
    principles: Sequence[Principle],
    answers: Sequence[list[Answer]],
) -> list[list[Answer]]:
    """The answers that can be trained on, with the critic's scores; an answer given twice is scored once."""
    cases: dict[tuple[int, str], Case] = {}
    for place, each in enumerate(answers):
        prompt, principle = as_text(prompts[place].prompt), principles[place].text
        for answer in usable(each):
            fields = {"prompt": prompt, "response": answer.text, "principle": principle}
            question = filled(config.verdict_template, fields)
            cases[place, answer.text] = Case(prompt, answer.text, principle, question)
    values = dict(zip(cases, critic.scores(list(cases.values())), strict=True))
    return [
        [replace(answer, score=values.get((place, answer.text))) for answer in each]
        for place, each in enumerate(answers)
    ]


def as_text(prompt: Any) -> str:
    """A prompt as templates show it: a text, or what the messages say, one after the other."""
    return prompt if isinstance(prompt, str) else "\n".join(completion_text([message]) for message in prompt)


def _rows(config: RLAIFConfig, prompt: Prompt, principle: Principle, answers: list[Answer]) -> Iterator[dict[str, Any]]:
    if config.labels == "revision":
        pairs = revised_pairs(answers)
    else:
        pair = scored_pair(answers, min_margin=config.min_margin)
        pairs = [] if pair is None else [pair]
    for good, bad in pairs:
        is_text = isinstance(prompt.prompt, str)
        as_completion = (lambda text: text) if is_text else (lambda text: [{"role": "assistant", "content": text}])
        yield {
            "prompt": prompt.prompt,
            "chosen": as_completion(good.text),
            "rejected": as_completion(bad.text),
            "chosen_score": good.score,
            "rejected_score": bad.score,
            "chosen_is_revision": good.critique is not None,
            "critique": good.critique,
            "principle": principle.name,
        }


def _check_scores(answers: Sequence[list[Answer]], rounds_without: int, critic: Critic) -> int:
    """Count the batches in a row in which the critic scored nothing, and stop at the third."""
    candidates = [answer for each in answers for answer in usable(each)]
    if not candidates or any(answer.score is not None for answer in candidates):
        return 0
    if rounds_without + 1 >= MOST_ROUNDS_WITHOUT_VERDICT:
        reason = critic.first_failure()
        raise NoVerdictError(f"the critic scored no answer of {MOST_ROUNDS_WITHOUT_VERDICT} batches in a row: {reason}")
    return rounds_without + 1


def _count(counts: Counter[str], answers: Sequence[list[Answer]], rows: Sequence[dict[str, Any]]) -> None:
    every = [answer for each in answers for answer in each]
    counts["prompts"] += len(answers)
    counts["completions"] += len(every)
    counts["revisions"] += sum(answer.critique is not None for answer in every)
    counts["scored"] += sum(answer.score is not None for answer in every)
    counts["cut_off"] += sum(not answer.is_whole for answer in every)
    counts["rows"] += len(rows)
    counts["revision_chosen"] += sum(row["chosen_is_revision"] for row in rows)


def _summary(counts: Counter[str]) -> str:
    return f"{counts['revisions']} of them revisions; a revision was chosen in {counts['revision_chosen']} pairs"


def _principles(config: RLAIFConfig) -> list[Principle]:
    if config.principles_file is not None:
        return read_principles(config.principles_file)
    return [Principle(text, text) for text in config.principles]


def _contents(config: RLAIFConfig) -> dict[str, str]:
    files = [config.prompt_file, config.principles_file, config.critic_judge]
    found = dict(contents_of(data=files, model=config.model_name_or_path))
    if config.critic_model_name_or_path is not None:
        found |= contents_of(data=[], model=config.critic_model_name_or_path)
    return found


def _sampling(config: RLAIFConfig) -> Sampling:
    return Sampling(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )


def _tokenizer(config: RLAIFConfig, path: str) -> PreTrainedTokenizerBase:
    template = config.data.chat_template if path == config.model_name_or_path else None
    return load_tokenizer(path, chat_template=template, trust_remote_code=config.trust_remote_code)


def _model(config: RLAIFConfig, path: str) -> PreTrainedModel:
    return load_model(
        path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        trust_remote_code=config.trust_remote_code,
    )
