"""A pipeline's file and flags as a configuration: every stage is checked like a run of its own, before any starts.

stages:
  NAME:
    recipe: sft
    model_name_or_path: ${EARLIER}/model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fastrl.command.fields import options
from fastrl.command.settings import Refused, Setting, closest, read_flags, read_yaml
from fastrl.train.config.pipeline import REFERENCE, PipelineConfig, Stage

NAME = re.compile(r"[A-Za-z][\w-]*")
OWN = ("recipe", "output_dir", "output_file")  # of a stage, not options of its recipe here

EXAMPLE = """\
# Stages in a row, each starting from what earlier ones made. Change the names, recipes and options, then:
#     fastrl run THIS_FILE
recipe: pipeline
output_dir: runs/pipeline

# A stage holds `recipe:` and that recipe's options (fastrl config init RECIPE lists them) without its output_dir.
# ${NAME} is the directory of an earlier stage.
stages:
  warm:
    recipe: sft
    model_name_or_path: tiny:base
    train_dataset: tiny:sft
    max_steps: 60
  rl:
    recipe: grpo
    model_name_or_path: ${warm}/model
    train_dataset: tiny:prompts
    reward_funcs: [exact_match]
    max_steps: 100
  result:
    recipe: eval
    model_name_or_path: ${rl}/model
    eval_dataset: tiny:prompts_held_out
    reward_funcs: [exact_match]
"""


def configure_pipeline(path: str | None, arguments: Sequence[str]) -> PipelineConfig:
    """The valid stages of a pipeline; flags are `--output_dir X` and `--stages.NAME.key value`.

    Raises:
        Refused: one line for each wrong name, key, value, rule or reference.
    """
    from fastrl.cli import RECIPES

    if path is None:
        raise Refused("pipeline: needs a file: fastrl pipeline --config FILE (`fastrl config init pipeline` shows one)")
    top = read_yaml(path, blocks={"stages"})
    recipes = {_stage_name(each): _recipe_of(each) for each in top if each.key.startswith("stages.")}
    if not recipes:
        raise Refused(f"{path}: stages: names no stage; write stages: {{NAME: {{recipe: sft, ...}}}}")
    blocks = {"stages"} | {f"stages.{name}" for name in recipes}
    for name, recipe in recipes.items():
        known = options(RECIPES[recipe].config)
        blocks |= {f"stages.{name}.{option.key}" for option in known if option.block}
    settings = [setting for setting in read_yaml(path, blocks=blocks) if setting.key != "recipe"]
    settings += read_flags(arguments, _flags(recipes))
    output_dir = _output_dir(path, settings)
    stages, wrong = {}, []
    for number, name in enumerate(recipes):
        of_stage = [_inside(each, f"stages.{name}.") for each in settings if each.key.startswith(f"stages.{name}.")]
        try:
            stages[name] = _stage(name, recipes[name], of_stage, output_dir, earlier=list(recipes)[:number])
        except Refused as error:
            wrong.append(str(error))
    known_keys = {"output_dir", *(f"stages.{name}" for name in recipes)}
    stray = [each for each in settings if each.key not in known_keys and not each.key.startswith("stages.")]
    wrong += [f"{each.source}: unknown key '{each.key}'; a pipeline has output_dir and stages" for each in stray]
    if wrong:
        raise Refused("\n".join(wrong))
    return PipelineConfig(stages=stages, output_dir=output_dir)


def _stage_name(setting: Setting) -> str:
    name = setting.key.removeprefix("stages.")
    if not NAME.fullmatch(name):
        raise Refused(f"{setting.source}: a stage is named with letters, digits, _ and -, got '{name}'")
    return name


def _recipe_of(setting: Setting) -> str:
    from fastrl.cli import RECIPES

    known = [name for name in RECIPES if name not in ("pipeline", "demo")]
    recipe = setting.value.get("recipe") if isinstance(setting.value, dict) else None
    if not isinstance(recipe, str) or recipe not in known:
        meant = closest(str(recipe), known)
        guess = f" (did you mean '{meant}'?)" if meant else ""
        raise Refused(f"{setting.source}: recipe: expected one of {', '.join(known)}, got {recipe!r}{guess}")
    return recipe


def _flags(recipes: dict[str, str]) -> list[Any]:
    """The options of every stage under `stages.NAME.`, so that flags are read with their types."""
    from fastrl.cli import RECIPES

    found = [option for option in options(PipelineConfig) if option.key == "output_dir"]
    for name, recipe in recipes.items():
        found += options(RECIPES[recipe].config, prefix=f"stages.{name}.")
    return found


def _output_dir(path: str, settings: Sequence[Setting]) -> str:
    given = [each.value for each in sorted(settings, key=lambda each: each.is_flag) if each.key == "output_dir"]
    if not given or not isinstance(given[-1], str):
        raise Refused(f"{path}: missing: output_dir; write `output_dir: ...` in the file or --output_dir ...")
    return given[-1]


def _inside(setting: Setting, prefix: str) -> Setting:
    return Setting(setting.key.removeprefix(prefix), setting.value, setting.source)


def _stage(name: str, recipe: str, settings: list[Setting], output_dir: str, *, earlier: Sequence[str]) -> Stage:
    """One stage with its output inside the pipeline's directory."""
    from fastrl.cli import RECIPES, configured

    for setting in settings:
        if setting.key in OWN[1:]:
            raise Refused(f"{setting.source}: {setting.key}: is {output_dir}/{name} in a pipeline; remove it")
        for reference in REFERENCE.findall(str(setting.value)):
            if reference not in earlier:
                listed = f"earlier stages are {', '.join(earlier)}" if earlier else "it is the first stage"
                raise Refused(f"{setting.source}: ${{{reference}}} names no earlier stage; {listed}")
    known = {field.name for field in fields(RECIPES[recipe].config)}
    own = (
        ("output_dir", f"{output_dir}/{name}")
        if "output_dir" in known
        else ("output_file", f"{output_dir}/{name}/data.jsonl")
    )
    chosen = [each for each in settings if each.key != "recipe"] + [Setting(own[0], own[1], "the pipeline")]
    return Stage(name, recipe, RECIPES[recipe].module, configured(recipe, chosen))
