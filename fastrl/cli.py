"""The command line: parses, validates, and only then imports torch and calls a recipe.

A wrong command, key, value or combination of values costs a fraction of a second, one line on stderr for each
problem, and exit code 2. A run that fails exits with 1; a recipe may return its own code.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from opcode import opmap
from typing import Any

from fastrl import __version__
from fastrl.command.fields import options, summary
from fastrl.command.ranks import check_ranks, name_of_rank, run_together
from fastrl.command.settings import Refused, Setting, closest, read_flags, read_yaml, unknown_keys
from fastrl.train.config import (
    CPOConfig,
    DemoConfig,
    DistillConfig,
    DPOConfig,
    EvalConfig,
    GenerateConfig,
    GKDConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    ORPOConfig,
    PipelineConfig,
    PPOConfig,
    PRMConfig,
    RewardConfig,
    RLAIFConfig,
    RRHFConfig,
    SFTConfig,
    TeacherConfig,
)
from fastrl.train.config.pipeline import is_made_later


@dataclass(frozen=True, slots=True)
class Recipe:
    """One command that runs a recipe.

    Attributes:
        config: its configuration dataclass; the first sentence of the docstring is the command's help.
        module: module with `run(config) -> int | None`.
        has_dry_run: the module also has `dry_run(config) -> int | None`.
        has_ranks: several processes that torchrun starts can run it together.
    """

    config: type[Any]
    module: str
    has_dry_run: bool = False
    has_ranks: bool = False


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(DemoConfig, "fastrl.recipes.demo"),
    "sft": Recipe(SFTConfig, "fastrl.recipes.sft", has_dry_run=True, has_ranks=True),
    "ppo": Recipe(PPOConfig, "fastrl.recipes.ppo", has_dry_run=True, has_ranks=True),
    "grpo": Recipe(GRPOConfig, "fastrl.recipes.grpo", has_dry_run=True, has_ranks=True),
    "dpo": Recipe(DPOConfig, "fastrl.recipes.dpo", has_dry_run=True, has_ranks=True),
    "cpo": Recipe(CPOConfig, "fastrl.recipes.cpo", has_dry_run=True, has_ranks=True),
    "orpo": Recipe(ORPOConfig, "fastrl.recipes.orpo", has_dry_run=True, has_ranks=True),
    "kto": Recipe(KTOConfig, "fastrl.recipes.kto", has_ranks=True),
    "rrhf": Recipe(RRHFConfig, "fastrl.recipes.rrhf", has_ranks=True),
    "online_dpo": Recipe(OnlineDPOConfig, "fastrl.recipes.online_dpo", has_ranks=True),
    "reward": Recipe(RewardConfig, "fastrl.recipes.reward", has_dry_run=True, has_ranks=True),
    "prm": Recipe(PRMConfig, "fastrl.recipes.prm", has_dry_run=True, has_ranks=True),
    "distill": Recipe(DistillConfig, "fastrl.recipes.distill", has_ranks=True),
    "gkd": Recipe(GKDConfig, "fastrl.recipes.gkd", has_ranks=True),
    "teacher": Recipe(TeacherConfig, "fastrl.recipes.teacher"),
    "eval": Recipe(EvalConfig, "fastrl.recipes.evaluate"),
    "generate": Recipe(GenerateConfig, "fastrl.recipes.generate"),
    "rlaif": Recipe(RLAIFConfig, "fastrl.recipes.rlaif"),
    "pipeline": Recipe(PipelineConfig, "fastrl.recipes.pipeline"),
}
OTHERS = {
    "run": "Run the recipe that a YAML file names: fastrl run FILE [flags].",
    "config": "Write, check or describe configuration: fastrl config init|check|schema.",
    "kernels": "List, compile or check the kernels: fastrl kernels list|audit|check.",
    "report": "Audit the log of a run: fastrl report signals RUN.",
    "plan": "Time and memory of a step by arithmetic: fastrl plan --model qwen3-0.6b --gpu h200.",
    "env": "What is installed, which devices and backends would be used: fastrl env [sandbox].",
}
ENV_USAGE = "usage: fastrl env [--json] | sandbox"
CONFIG_USAGE = "usage: fastrl config init RECIPE | check FILE [flags] | schema RECIPE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; sys.argv by default.

    Returns:
        exit code: 0 done, 1 the run failed, 2 wrong input, 130 interrupted, or what the recipe returned.
    """
    sys.path.append(os.getcwd())  # reward modules beside the run are found, and shadow nothing
    try:
        code = _dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # a closed pipe shows here, where it is handled
        return code
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`| head`) left; without this the interpreter complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    match list(arguments):
        case []:
            print(_help(), file=sys.stderr)
            return 2
        case ["-h" | "--help" | "help"]:
            print(_help())
            return 0
        case ["--version"]:
            print(__version__)
            return 0
        case ["env", *rest]:
            return _env(rest)
        case ["config", *rest]:
            return _config(rest)
        case ["kernels", *rest]:
            from fastrl.command.kernels import run

            return run(rest)
        case ["report", *rest]:
            from fastrl.command.report import run as report

            return report(rest)
        case ["plan", *rest]:
            from fastrl.command.plan import run as plan

            return plan(rest)
        case ["run", *rest]:
            return _run_file(rest)
        case [name, *rest] if name in RECIPES:
            return _run_recipe(name, rest)
        case [name, *_]:
            raise Refused(_unknown_command(name))
    raise AssertionError("every list of arguments matches a case")


def _run_recipe(name: str, arguments: Sequence[str]) -> int:
    recipe = RECIPES[name]
    if _asks_help(arguments):
        from fastrl.command.show import recipe_help

        print(recipe_help(name, recipe.config, has_dry_run=recipe.has_dry_run))
        return 0
    path, rest = _take_config(arguments)
    return _run(name, path, rest)


def _run_file(arguments: Sequence[str]) -> int:
    if _asks_help(arguments):
        print("usage: fastrl run FILE [flags]\n\nThe file says which recipe: `recipe: grpo`. Flags beat the file.")
        return 0
    path, rest = _file_and_flags(arguments, "fastrl run FILE [flags]")
    return _run(_recipe_of(path), path, rest)


def _config(arguments: Sequence[str]) -> int:
    from fastrl.command.show import init_yaml, json_schema

    match list(arguments):
        case ["-h" | "--help"]:
            print(CONFIG_USAGE)
        case ["init", "pipeline"]:
            from fastrl.command.pipeline import EXAMPLE

            print(EXAMPLE, end="")
        case ["init", name]:
            print(init_yaml(name, _known_recipe(name).config), end="")
        case ["schema", name]:
            print(json_schema(name, _known_recipe(name).config))
        case ["check", *rest]:
            path, flags = _file_and_flags(rest, CONFIG_USAGE)
            name = _recipe_of(path)
            configure(name, path, flags)
            print(f"{path}: valid ({name})")
        case _:
            raise Refused(CONFIG_USAGE)
    return 0


def _env(arguments: Sequence[str]) -> int:
    if _asks_help(arguments):
        print(ENV_USAGE)
        return 0
    if list(arguments) == ["sandbox"]:
        from fastrl.command.sandbox import run

        return run()
    if list(arguments) not in ([], ["--json"]):
        raise Refused(ENV_USAGE)
    from fastrl.command.environment import as_json, as_text, environment

    found = environment()
    print(as_json(found) if arguments else as_text(found))
    return 0


def _run(name: str, path: str | None, arguments: Sequence[str]) -> int:
    recipe = RECIPES[name]
    flags = [argument for argument in arguments if argument not in ("--dry-run", "--dry_run")]
    is_dry_run = len(flags) < len(arguments)
    if is_dry_run and not recipe.has_dry_run:
        able = ", ".join(name for name, other in RECIPES.items() if other.has_dry_run)
        raise Refused(f"--dry-run: {name} has none; these have: {able}")
    check_ranks(
        f"{name} --dry-run" if is_dry_run else name,
        can_run=recipe.has_ranks and not is_dry_run,
        able=[name for name, other in RECIPES.items() if other.has_ranks],
    )
    config = configure(name, path, flags)
    module = import_module(recipe.module)
    from fastrl.recipes.tiny import with_tiny

    try:
        config = with_tiny(config)
        code = module.dry_run(config) if is_dry_run else run_together(module.run, config)
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_our_sentence(error):
            raise
        print(f"{name_of_rank(name)}: {error}", file=sys.stderr)
        return 1
    return int(code or 0)


def configure(name: str, path: str | None, arguments: Sequence[str]) -> Any:
    """The valid configuration of a recipe from its file and flags; torch is not imported.

    Args:
        name: a key of RECIPES.
        path: YAML file, or None.
        arguments: flags; each beats the file.

    Raises:
        Refused: one line for each wrong key, value or rule.
    """
    recipe = RECIPES[name]
    if name == "pipeline":
        from fastrl.command.pipeline import configure_pipeline

        return configure_pipeline(path, arguments)
    known = options(recipe.config)
    from_file = read_yaml(path, blocks={option.key for option in known if option.block}) if path else []
    named = [setting for setting in from_file if setting.key == "recipe"]
    if named and named[0].value != name:
        raise Refused(f"{named[0].source}: recipe: is {named[0].value}, the command is {name}; use `fastrl run {path}`")
    settings = [setting for setting in from_file if setting.key != "recipe"] + read_flags(arguments, known)
    for setting in settings:
        if is_made_later(setting.value):
            raise Refused(f"{setting.source}: {setting.value} names a stage of a pipeline, and this is {name} alone")
    return configured(name, settings)


def configured(name: str, settings: Sequence[Setting]) -> Any:
    """The valid configuration of a recipe from what the user wrote, flags included.

    Raises:
        Refused: one line for each wrong key, value or rule.
    """
    recipe = RECIPES[name]
    known = options(recipe.config)
    wrong = unknown_keys(settings, known, name)
    if wrong:
        raise Refused("\n".join(wrong))
    from fastrl.command.build import build
    from fastrl.train.validate import notes, problems

    config = build(recipe.config, known, settings)
    sources = {setting.key: setting for setting in sorted(settings, key=lambda setting: setting.is_flag)}
    found = problems(config)
    if found:
        raise Refused("\n".join(_located(problem, sources) for problem in found))
    for note in notes(config):
        print(f"note: {_located(note, sources)}", file=sys.stderr)
    return config


def _located(problem: str, sources: Mapping[str, Setting]) -> str:
    """The problem with the place of the first option it names that the user set."""
    for word in re.findall(r"\w+(?:\.\w+)*", problem):
        if word not in sources:
            continue
        source = sources[word].source
        is_subject = problem.startswith(f"{word}: ") and sources[word].is_flag
        return f"{source}{problem.removeprefix(word)}" if is_subject else f"{source}: {problem}"
    return problem


def _is_our_sentence(error: BaseException) -> bool:
    """Whether a `raise` statement in fastrl made the error: a sentence for users, without traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not str(trace.tb_frame.f_globals.get("__name__")).startswith("fastrl."):
        return False
    # An error out of torch's C++ ends in our frame too, but on a call.
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]


def _asks_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _take_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    rest, paths = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--config":
            paths.append(next(waiting, ""))
        elif argument.startswith("--config="):
            paths.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if len(paths) > 1 or "" in paths:
        raise Refused("--config: needs one YAML file")
    return (paths[0] if paths else None), rest


def _file_and_flags(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("--"):
        raise Refused(f"expected a YAML file first; usage: {usage.removeprefix('usage: ')}")
    return arguments[0], list(arguments[1:])


def _recipe_of(path: str) -> str:
    named = [setting for setting in read_yaml(path) if setting.key == "recipe"]
    if not named:
        raise Refused(f"{path}: does not say which recipe; add a line such as `recipe: grpo`")
    name = named[0].value
    if not isinstance(name, str) or name not in RECIPES:
        raise Refused(f"{named[0].source}: recipe: {_no_recipe(str(name))}")
    return name


def _known_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise Refused(_no_recipe(name))
    return RECIPES[name]


def _no_recipe(name: str) -> str:
    meant = closest(name, list(RECIPES))
    guess = f" (did you mean '{meant}'?)" if meant else ""
    return f"expected one of {', '.join(RECIPES)}, got '{name}'{guess}"


def _unknown_command(name: str) -> str:
    meant = closest(name, [*RECIPES, *OTHERS])
    if name.endswith((".yaml", ".yml")):
        return f"unknown command '{name}'; to run a file: fastrl run {name}"
    return f"unknown command '{name}'" + (f" (did you mean '{meant}'?)" if meant else "; see fastrl --help")


def _help() -> str:
    lines = [
        "fastrl: post-training of language models",
        "",
        "usage: fastrl COMMAND [--config FILE] [--key value ...]",
        "",
    ]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:<12}{summary(recipe.config)}")
    for name, text in OTHERS.items():
        lines.append(f"  {name:<12}{text}")
    return "\n".join(
        [*lines, "", "fastrl COMMAND --help lists the options of a command. docs/cli.md explains the rest."]
    )


if __name__ == "__main__":
    sys.exit(main())
