"""What `bench.grpo_step` trains: tiny models with random weights on vowels, and the demo's own GRPO stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from fastrl.recipes import demo, sft, sorting
from fastrl.rewards.exact_match import exact_match
from fastrl.train.config import GRPOConfig, ReportBlock
from fastrl.train.export import save_pretrained
from fastrl.train.tiny import make_tiny_qwen3

CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz.,?"
EOS, PAD = "<eos>", "<pad>"
SEED = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a task and the size of a step.

    Attributes:
        hidden, layers: of the model.
        stops: completions end at EOS; else none ends before `length`.
        groups: prompts of a step.
        generations: completions of each prompt.
        length: most tokens of a completion.
        is_demo: `fastrl demo`'s GRPO stage (model after its SFT stage, task, reward, settings); else random weights,
            the characters as vocabulary, prompts of 6 tokens, vowels as reward.
    """

    hidden: int
    layers: int
    stops: bool
    groups: int = 8
    generations: int = 8
    length: int = 32
    is_demo: bool = False


CASES = {
    "demo": Case(64, 2, stops=True, groups=64, length=sorting.DIGITS + 2, is_demo=True),
    "D=64, 2 layers, all 32 tokens": Case(64, 2, stops=False),
    "D=128, 4 layers, all 32 tokens": Case(128, 4, stops=False),
    "D=64, 2 layers, 1 to 32 tokens": Case(64, 2, stops=True),
    "D=128, 4 layers, 1 to 32 tokens": Case(128, 4, stops=True),
}


def write_task(folder: Path, case: Case, *, steps: int) -> None:
    """Write `model/` and `prompts.jsonl`: different prompts, enough for `steps`."""
    if case.is_demo:
        _write_demo(folder, n_prompts=case.groups * steps)
    else:
        _write_vowels(folder, case, n_prompts=case.groups * steps)


def fastrl_config(folder: Path, output_dir: Path, case: Case, *, steps: int) -> GRPOConfig:
    """fastrl's side; `trl_settings` is the other."""
    if case.is_demo:
        stage = demo._grpo_config(folder / "model", output_dir, folder / "prompts.jsonl", seed=SEED)
        return replace(stage, max_steps=steps, device="cpu")
    return GRPOConfig(
        model_name_or_path=str(folder / "model"),
        output_dir=str(output_dir),
        train_dataset=str(folder / "prompts.jsonl"),
        seed=SEED,
        max_steps=steps,
        per_device_train_batch_size=case.groups * case.generations,
        num_generations=case.generations,
        max_completion_length=case.length,
        learning_rate=1e-5,
        reward_funcs=("bench.grpo_step_task:vowel_share",),
        parity="trl",
        logging_steps=10,
        device="cpu",
        report=ReportBlock(panel=False),
    )


def trl_settings(case: Case) -> dict[str, Any]:
    """Fields of TRL's GRPOConfig that make the same step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": case.groups * case.generations,
        "num_generations": case.generations,
        "max_completion_length": case.length,
        "learning_rate": 1e-5,
    }
    if case.is_demo:
        stage = demo._grpo_config(Path(), Path(), Path(), seed=SEED)
        assert stage.per_device_train_batch_size == settings["per_device_train_batch_size"]
        names = ("num_generations", "max_completion_length", "learning_rate", "lr_scheduler_type", "warmup_steps")
        settings |= {name: getattr(stage, name) for name in (*names, "adam_beta2")} | {"loss_type": stage.algorithm}
    return settings


def reward_of(case: Case) -> Callable[..., list[float]]:
    """The reward function of both contenders."""
    return exact_match if case.is_demo else vowel_share


def vowel_share(completions: Sequence[str], **columns: object) -> list[float]:
    """Vowels, weighed by place so that ties in a group are rare; in [0, 1] for completions of 32 letters."""
    total = 32 * (32 + 1) / 2
    return [sum(i for i, letter in enumerate(text, 1) if letter in "aeiou") / total for text in completions]


def _write_demo(folder: Path, *, n_prompts: int) -> None:
    """The demo's files and its model after the supervised stage."""
    n_sft = 4000
    files = sorting.write_task(
        folder / "data", seed=SEED, n_sft=n_sft, n_prompts=max(n_sft, n_prompts), n_held_out=demo.N_HELD_OUT
    )
    sorting.make_base_model(folder / "base", seed=SEED)
    code = sft.run(sorting.sft_config(folder / "base", folder / "sft", files.sft, seed=SEED))
    if code != 0:
        raise RuntimeError(f"the demo's supervised stage ended with exit code {code}")
    (folder / "sft" / "model").rename(folder / "model")
    rows = files.prompts.read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:n_prompts]))


def _write_vowels(folder: Path, case: Case, *, n_prompts: int) -> None:
    tokenizer = _tokenizer()
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=case.hidden,
        layers=case.layers,
        heads=4,
        intermediate_size=2 * case.hidden,
        context=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_embeddings=False,
        seed=SEED,
    )
    never = [tokenizer.pad_token_id] if case.stops else [tokenizer.pad_token_id, tokenizer.eos_token_id]
    # Coordinate 0 of the residual stream is the same positive number everywhere, and the heads of tokens that must
    # never be sampled read nothing else, with a large negative weight.
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
        head = model.get_output_embeddings().weight
        head[never] = 0.0
        head[never, 0] = -100.0
    save_pretrained(model, tokenizer, folder / "model", card="A tiny Qwen3 with random weights.")
    prompts = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)][:n_prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate((*CHARACTERS, EOS, PAD))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
