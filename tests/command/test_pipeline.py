"""A pipeline's file is checked whole, stage by stage, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.command.pipeline import configure_pipeline
from fastrl.command.settings import Refused

GOOD = """recipe: pipeline
output_dir: {folder}/run
stages:
  warm:
    recipe: sft
    model_name_or_path: tiny:base
    train_dataset: tiny:sft
    packing: {{token_budget: 4096}}
  rl:
    recipe: grpo
    model_name_or_path: ${{warm}}/model
    train_dataset: tiny:prompts
    reward_funcs: [exact_match]
"""


def refused(tmp_path: Path, *changes: tuple[str, str], flags: tuple[str, ...] = ()) -> str:
    text = GOOD.format(folder=tmp_path)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        configure_pipeline(str(path), flags)
    return str(caught.value).replace(str(tmp_path), "")


def test_each_stage_is_a_configuration_of_its_recipe_in_its_own_directory(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.format(folder=tmp_path))
    config = configure_pipeline(str(path), ["--stages.rl.max_steps", "7", "--output_dir", str(tmp_path / "other")])
    warm, rl = config.stages.values()
    assert (warm.name, warm.recipe, warm.config.packing.token_budget) == ("warm", "sft", 4096)
    assert (rl.config.model_name_or_path, rl.config.max_steps) == ("${warm}/model", 7)
    assert rl.config.output_dir == str(tmp_path / "other" / "rl")


def test_what_is_wrong_in_any_stage_is_said_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, ("train_dataset: tiny:sft", "train_datase: tiny:sft"), ("[exact_match]", "[exact]"))
    assert "/p.yaml:7: unknown key 'train_datase' (did you mean 'train_dataset'?)" in message
    assert "/p.yaml:13: reward_funcs: " in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("${warm}", "${wram}"), "p.yaml:11: ${wram} names no earlier stage; earlier stages are warm"),
        (("tiny:base", "${rl}/model"), "p.yaml:6: ${rl} names no earlier stage; it is the first stage"),
        (("recipe: grpo", "recipe: grop"), "p.yaml:9: recipe: expected one of "),
        (("recipe: grpo", "recipe: pipeline"), "got 'pipeline'"),
        (("  rl:", "  r l:"), "p.yaml:9: a stage is named with letters, digits, _ and -, got 'r l'"),
        (
            ("    packing", "    output_dir: x\n    packing"),
            "p.yaml:8: output_dir: is /run/warm in a pipeline; remove it",
        ),
        (("stages:", "seed: 3\nstages:"), "p.yaml:3: unknown key 'seed'; a pipeline has output_dir and stages"),
        (("output_dir: ", "#"), "missing: output_dir"),
    ],
)
def test_names_references_and_places_are_checked(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert said in refused(tmp_path, change)


def test_without_a_file_or_without_stages_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="needs a file: fastrl pipeline --config FILE"):
        configure_pipeline(None, [])
    path = tmp_path / "p.yaml"
    path.write_text("recipe: pipeline\noutput_dir: x\n")
    with pytest.raises(Refused, match="names no stage"):
        configure_pipeline(str(path), [])
