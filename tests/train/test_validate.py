"""Cross-field rules: each broken one is a line with its remedy, and all are reported at once."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.algorithms import parity, presets
from fastrl.cli import RECIPES
from fastrl.command.fields import item_of, options, without_null
from fastrl.losses.advantage import raw
from fastrl.losses.surrogate import clipped
from fastrl.train import validate_ranges
from fastrl.train.config import (
    DataBlock,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    GRPOConfig,
    KernelsBlock,
    OverlongBlock,
    PackingBlock,
    ReportBlock,
    RolloutBlock,
    SamplerCorrectionBlock,
    SFTConfig,
)
from fastrl.train.validate import CLIPS_RATIOS, COMPARES_GROUPS, HAS_KL, notes, problems

PRESETS = {
    "grpo": presets.grpo(),
    "dr_grpo": presets.dr_grpo(length=16),
    "dapo": presets.dapo(),
    "rloo": presets.rloo(),
    "reinforce_pp": presets.reinforce_pp(),
    "gspo": presets.gspo(),
    "cispo": presets.cispo(),
    "sapo": presets.sapo(),
}
PARITY = {
    "trl": parity.trl(),
    "verl": parity.verl(),
    "openrlhf": parity.openrlhf(),
    "open_instruct": parity.open_instruct(),
}


@pytest.fixture(autouse=True)
def _inside_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "data.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def grpo(**changes: Any) -> GRPOConfig:
    good = GRPOConfig(
        model_name_or_path="model", output_dir="out", train_dataset="data.jsonl", reward_funcs=("numeric",)
    )
    return replace(good, **changes)


def sft(**changes: Any) -> SFTConfig:
    return replace(SFTConfig(model_name_or_path="model", output_dir="out", train_dataset="data.jsonl"), **changes)


def evaluation(**changes: Any) -> EvalConfig:
    good = EvalConfig(model_name_or_path="model", eval_dataset="data.jsonl", reward_funcs=("numeric",))
    return replace(good, **changes)


def generate(**changes: Any) -> GenerateConfig:
    return replace(GenerateConfig(model_name_or_path="model", prompts=("hello",)), **changes)


def test_good_configurations_have_no_problem() -> None:
    assert problems(grpo()) == []
    assert problems(sft()) == []
    assert problems(evaluation()) == []
    assert problems(generate()) == []
    assert problems(DemoConfig()) == []


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_number_of_every_configuration_has_a_range(name: str) -> None:
    for option in options(RECIPES[name].config):
        hint = without_null(option.hint)
        if hint in (int, float) or (getattr(hint, "__origin__", None) is tuple and item_of(hint) in (int, float)):
            assert option.key in validate_ranges.RANGES
    all_keys = {option.key for recipe in RECIPES.values() for option in options(recipe.config)}
    assert set(validate_ranges.RANGES) <= all_keys, "a range of an option that no longer exists"


@pytest.mark.parametrize(
    ("number", "interval", "is_inside"),
    [
        (0.0, "[0, 1)", True),
        (1.0, "[0, 1)", False),
        (0.0, "(0, 1]", False),
        (1.0, "(0, 1]", True),
        (1.5, "[0, 1]", False),
        (10**30, "[1, inf)", True),
        (float("inf"), "[0, inf)", False),
        (float("-inf"), "(-inf, inf)", False),
        (float("nan"), "(-inf, inf)", False),
    ],
)
def test_intervals_are_read_as_mathematics_writes_them(number: float, interval: str, is_inside: bool) -> None:
    assert validate_ranges._inside(number, interval) is is_inside


CASES: list[tuple[Any, str]] = [
    (
        lambda: sft(device="cpu", kernels=KernelsBlock(layers="triton")),
        "kernels.layers: triton needs a GPU and device is cpu; use transformers",
    ),
    (lambda: grpo(top_p=0.0), "top_p: must be in (0, 1], got 0.0"),
    (lambda: grpo(learning_rate=float("nan")), "learning_rate: must be in (0, inf), got nan"),
    (lambda: grpo(save_steps=0), "save_steps: must be in [1, inf), got 0"),
    (lambda: grpo(reward_weights=(float("inf"),)), "reward_weights: must be in (-inf, inf), got inf"),
    (lambda: grpo(rollout=RolloutBlock(batch_size=0)), "rollout.batch_size: must be in [1, inf), got 0"),
    (lambda: sft(kernels=KernelsBlock(skip_tolerance=1.0)), "kernels.skip_tolerance: must be in [0, 1), got 1.0"),
    # groups and batches
    (
        lambda: grpo(num_generations=4, per_device_train_batch_size=6),
        "num_generations: per_device_train_batch_size x gradient_accumulation_steps x steps_per_generation = "
        "6 x 1 x 1 = 6 completions are no whole number of groups of 4; set per_device_train_batch_size to 4 or 8",
    ),
    (
        lambda: grpo(num_generations=8, per_device_train_batch_size=1, gradient_accumulation_steps=2),
        "num_generations: per_device_train_batch_size x gradient_accumulation_steps x steps_per_generation = "
        "1 x 2 x 1 = 2 completions are no whole number of groups of 8; set per_device_train_batch_size to 4",
    ),
    (
        lambda: grpo(num_generations=1),
        "num_generations: grpo compares completions of one prompt; set at least 2",
    ),
    # rewards
    (
        lambda: grpo(reward_funcs=()),
        "reward_funcs: is empty; name at least one, such as numeric or package.module:function",
    ),
    (
        lambda: grpo(reward_weights=(1.0, 2.0)),
        "reward_weights: needs one number for each of the 1 reward_funcs, got 2",
    ),
    # the policy's loss
    (
        lambda: grpo(temperature=0.0),
        "temperature: 0 is greedy, every completion of a prompt would be the same; set it above 0",
    ),
    (lambda: grpo(stop=("",)), "stop: an empty text would end every completion at once; remove it"),
    (
        lambda: grpo(parity="trl", algorithm="dapo"),
        "parity: trl brings its own algorithm, and algorithm is dapo; remove one",
    ),
    (
        lambda: grpo(delta=1.25, epsilon=0.2, epsilon_high=0.28),
        "delta: 1.25 caps the ratio inside the clip range, which ends at 1.28; set it above",
    ),
    (
        lambda: grpo(delta=1.5, epsilon=0.5),
        "delta: 1.5 caps the ratio inside the clip range, which ends at 1.5; set it above",
    ),
    (lambda: grpo(delta=1.0), "delta: must be in (1, inf), got 1.0"),
    (
        lambda: grpo(algorithm="rloo", epsilon=0.2),
        "epsilon: has no place in rloo, which clips no ratio; remove it",
    ),
    (
        lambda: grpo(algorithm="cispo", epsilon=0.2, epsilon_high=5.0),
        "epsilon: has no place in cispo, which takes epsilon_high alone; remove it",
    ),
    (
        lambda: grpo(keep_masked_denominator=True),
        "keep_masked_denominator: has no effect while mask_truncated_completions is false; set that too",
    ),
    (
        lambda: grpo(target_kl=0.1),
        "target_kl: can stop nothing, each batch has one update: set num_iterations or steps_per_generation above 1, "
        "or remove it",
    ),
    (
        lambda: grpo(adaptive_kl_target=0.1),
        "adaptive_kl_target: steers beta, which must start above 0; set beta, such as 0.04",
    ),
    (
        lambda: grpo(kl_estimator="k3", beta=0.0),
        "kl_estimator: has no effect while beta is 0; set beta above 0, or remove it",
    ),
    # lengths
    (
        lambda: grpo(overlong=OverlongBlock(buffer=300)),
        "overlong.buffer: 300 is longer than max_completion_length 256; lower it",
    ),
    (
        lambda: grpo(overlong=OverlongBlock(penalty=2.0)),
        "overlong.penalty: has no effect while overlong.buffer is 0; set a buffer, in tokens",
    ),
    (
        lambda: grpo(packing=PackingBlock(token_budget=300), rollout=RolloutBlock(max_prompt_length=100)),
        "packing.token_budget: 300 cannot hold one sequence of rollout.max_prompt_length + max_completion_length = "
        "356 tokens; raise it",
    ),
    (
        lambda: sft(packing=PackingBlock(token_budget=512)),
        "packing.token_budget: 512 cannot hold one sequence of max_length 1024; raise it, or lower max_length",
    ),
    (lambda: sft(max_length=None, truncate=True), "truncate: has no effect without max_length; set that too"),
    # correction
    (
        lambda: grpo(sampler_correction=SamplerCorrectionBlock(mode="mask", low=3.0)),
        "sampler_correction.low: 3.0 must be below sampler_correction.high 3.0",
    ),
    (
        lambda: grpo(sampler_correction=SamplerCorrectionBlock(high=2.0)),
        "sampler_correction.high: has no effect while sampler_correction.mode is none; set the mode",
    ),
    (
        lambda: grpo(sampler_correction=SamplerCorrectionBlock(mode="truncate", low=0.1)),
        "sampler_correction.low: has no effect while sampler_correction.mode is truncate; set mask",
    ),
    # schedule
    (lambda: sft(max_steps=0), "max_steps: 0 trains nothing; set -1 for num_train_epochs, or at least 1"),
    (
        lambda: sft(warmup_steps=5, warmup_ratio=0.1),
        "warmup_ratio: has no effect while warmup_steps is set; set one of them",
    ),
    (lambda: sft(max_steps=4, warmup_steps=5), "warmup_steps: 5 is more than max_steps 4; lower it"),
    (lambda: sft(eval_steps=5), "eval_steps: has no effect without eval_dataset; set that too"),
    # machine
    (
        lambda: sft(device="cpu", attn_implementation="varlen"),
        "attn_implementation: varlen needs a GPU and device is cpu; use sdpa",
    ),
    # templates
    (
        lambda: sft(data=DataBlock(prompt_template="{question")),
        "data.prompt_template: is not a format string: expected '}' before end of string; write {column}, and {{ for "
        "a brace",
    ),
    (
        lambda: sft(data=DataBlock(completion_template="{}")),
        "data.completion_template: every pair of braces must name a column, as {question}; write {{ for a brace",
    ),
    # files
    (
        lambda: grpo(model_name_or_path="Qwen/Qwen3-0.6B"),
        "model_name_or_path: Qwen/Qwen3-0.6B is not a directory; to download it: "
        "hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B",
    ),
    (
        lambda: grpo(model_name_or_path="."),
        "model_name_or_path: . has no config.json; expected a model in the Hugging Face layout",
    ),
    (
        lambda: grpo(train_dataset="no.jsonl"),
        "train_dataset: no.jsonl does not exist; paths start at the current directory",
    ),
    (
        lambda: grpo(train_dataset="~/no.jsonl"),
        "train_dataset: ~/no.jsonl does not exist ('~' is not expanded); paths start at the current directory",
    ),
    (lambda: grpo(eval_dataset="model"), "eval_dataset: model is a directory"),
    (
        lambda: grpo(output_dir="data.jsonl/out"),
        "output_dir: data.jsonl is a file, so data.jsonl/out cannot be a directory",
    ),
    (
        lambda: grpo(resume_from_checkpoint="out/checkpoint-5"),
        "resume_from_checkpoint: out/checkpoint-5 does not exist; paths start at the current directory",
    ),
    (lambda: grpo(resume_from_checkpoint="data.jsonl"), "resume_from_checkpoint: data.jsonl is not a directory"),
    # inference
    (
        lambda: evaluation(num_generations=4),
        "num_generations: at temperature 0 all completions of a prompt are the same; set 1, or a temperature",
    ),
    (
        lambda: evaluation(reward_funcs=()),
        "reward_funcs: is empty; name at least one, such as numeric or package.module:function",
    ),
    (lambda: generate(prompts=()), "prompts: give either --prompts TEXT ... or --prompt_file FILE"),
    (lambda: generate(prompt_file="data.jsonl"), "prompts: give either --prompts TEXT ... or --prompt_file FILE"),
    (lambda: generate(prompts=("",)), "prompts: one of them is empty; a completion needs something to complete"),
]


@pytest.mark.parametrize(("make", "problem"), CASES, ids=[case[1].partition(" ")[0] for case in CASES])
def test_a_broken_rule_is_one_line_with_its_remedy(make: Any, problem: str) -> None:
    found = problems(make())
    assert problem in found
    # The line begins with the option to look at, which is how the command line finds the place in the file.
    known = {option.key for recipe in RECIPES.values() for option in options(recipe.config)}
    assert all(re.match(r"[\w.]+", line)[0] in known for line in found)  # type: ignore[index]


def test_all_problems_are_reported_at_once() -> None:
    config = grpo(model_name_or_path="nowhere", train_dataset="no.jsonl", reward_funcs=("x",), temperature=0.0)
    assert [line.partition(":")[0] for line in problems(config)] == [
        "model_name_or_path",
        "train_dataset",
        "reward_funcs",
        "temperature",
    ]


def test_what_a_rule_leaves_alone() -> None:
    assert problems(grpo(num_generations=1, algorithm="reinforce_pp")) == []
    assert problems(grpo(num_generations=4, per_device_train_batch_size=2, steps_per_generation=2)) == []
    assert problems(grpo(algorithm="cispo", epsilon_high=5.0)) == []
    assert problems(grpo(target_kl=0.1, num_iterations=2)) == []
    assert problems(grpo(adaptive_kl_target=0.1, beta=0.04)) == []
    assert problems(grpo(adaptive_kl_target=0.1, parity="openrlhf")) == []
    assert problems(grpo(kl_placement="reward", algorithm="reinforce_pp")) == []
    assert problems(grpo(resume_from_checkpoint="auto")) == []
    assert problems(sft(max_length=None)) == []
    assert problems(sft(data=DataBlock(prompt_template="{question} {{x}} {row[key]}"))) == []
    assert problems(evaluation(num_generations=4, temperature=1.0)) == []


def test_weights_that_are_pickles_and_folders_that_cannot_be_written_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert problems(generate(output_file="answers.jsonl")) == [
        "model_name_or_path: model has no *.safetensors; pickled weights are not loaded",
        "output_file: answers.jsonl cannot be written: no permission in .",
    ]


def test_packages_an_option_needs_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrl.train.validate.find_spec", lambda name: None)
    monkeypatch.setattr("fastrl.train.validate_files.find_spec", lambda name: None)
    (tmp_path / "data.parquet").write_bytes(b"")
    config = sft(report=ReportBlock(to=("wandb",)), attn_implementation="flash", train_dataset="data.parquet")
    assert problems(config) == [
        "train_dataset: parquet needs the package pyarrow, which is not installed; pip install pyarrow",
        "attn_implementation: flash needs the package flash-attn, which is not installed; use varlen or auto",
        "report.to: the package wandb is not installed; pip install wandb",
    ]


def test_a_file_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("")
    assert problems(sft(train_dataset="data.csv")) == [
        "train_dataset: data.csv is of an unknown type; expected a .jsonl, .jsonl.gz or .parquet file"
    ]


def test_what_the_rules_say_about_presets_is_what_the_presets_are() -> None:
    assert {name for name, record in PRESETS.items() if record.advantage is not raw} == set(COMPARES_GROUPS)
    with_kl = {name for name, record in (PRESETS | PARITY).items() if record.kl is not None}
    assert with_kl == set(HAS_KL)
    clips = {name for name, record in PRESETS.items() if getattr(record.surrogate, "func", None) is clipped}
    assert clips == set(CLIPS_RATIOS)


def test_notes_are_about_what_is_allowed_but_surprising() -> None:
    assert notes(sft()) == []
    assert notes(sft(dtype="bfloat16", device="cpu")) == [
        "dtype: bfloat16 on a CPU is usually slower than float32, and less exact"
    ]
    assert notes(generate(trust_remote_code=True)) == [
        "trust_remote_code: Python code in the model's directory will run with your rights"
    ]
    assert notes(DemoConfig()) == []
