"""The command line: what it calls, what it refuses, and how fast."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fastrl import __version__
from fastrl.cli import RECIPES, main
from fastrl.command.fields import options
from fastrl.train.config import GRPOConfig, SFTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _inside_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model, data and run.yaml; paths in it are relative."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "run.yaml").write_text(
        "recipe: grpo\nmodel_name_or_path: model\noutput_dir: out\ntrain_dataset: data.jsonl\n"
        "reward_funcs: [numeric]\nlearning_rate: 1e-6\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> list[Any]:
    """Put a module in the place of a recipe; returns the configurations it is called with."""
    module = ModuleType(RECIPES[name].module)
    module.__dict__["calls"] = calls = []
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, RECIPES[name].module, module)
    return calls


RECORDS = "def run(config): calls.append(('run', config))\ndef dry_run(config): calls.append(('dry_run', config))\n"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command prints."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.removesuffix("\n")


def fresh(code: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a new interpreter; also the CPU seconds it took, which colleagues on the machine do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# What it calls


def test_run_reads_the_recipe_in_the_file_and_flags_beat_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "grpo", RECORDS)
    assert main(["run", "run.yaml", "--learning-rate", "2e-6", "--reward_funcs", "numeric", "format"]) == 0
    ((called, config),) = calls
    assert called == "run"
    assert config == GRPOConfig(
        model_name_or_path="model",
        output_dir="out",
        train_dataset="data.jsonl",
        learning_rate=2e-6,
        reward_funcs=("numeric", "format"),
    )


def test_a_command_with_a_file_flags_and_the_short_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "sft", RECORDS)
    Path("sft.yaml").write_text("model_name_or_path: model\noutput_dir: out\n")
    words = ["sft", "--config", "sft.yaml", "--train_dataset", "data.jsonl", "--resume", "auto", "--truncate"]
    assert main([*words, "--data.columns", "{prompt: question}"]) == 0
    config = calls[0][1]
    assert isinstance(config, SFTConfig)
    assert (config.resume_from_checkpoint, config.truncate) == ("auto", True)
    assert config.data.columns == {"prompt": "question"}


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_calls_the_recipes_dry_run(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    calls = stand_in(monkeypatch, "grpo", RECORDS)
    assert main(["run", "run.yaml", flag]) == 0
    assert [called for called, _ in calls] == ["dry_run"]


def test_the_exit_code_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "demo", "def run(config): return 75\n")
    assert main(["demo"]) == 75


def test_an_interrupted_run_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "demo", "def run(config): raise KeyboardInterrupt\n")
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_sentence_that_fastrl_raises_is_printed_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "demo", "def run(config):\n    raise ValueError(\n        'row 3 is empty'\n    )\n")
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "demo: row 3 is empty\n"


@pytest.mark.parametrize(
    "body", ["int('x')", "import fractions; fractions.Fraction('x')", "import torch; torch.zeros(2) @ torch.zeros(3)"]
)
def test_an_error_that_fastrl_did_not_raise_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    stand_in(monkeypatch, "demo", f"def run(config): {body}\n")
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)invalid literal|inconsistent|size"):
        main(["demo"])


# What it refuses


def test_an_unknown_command_is_refused_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "grop") == "unknown command 'grop' (did you mean 'grpo'?)"
    assert refused(capsys, "confg", "check") == "unknown command 'confg' (did you mean 'config'?)"
    assert refused(capsys, "zzz") == "unknown command 'zzz'; see fastrl --help"
    assert refused(capsys, "run.yaml") == "unknown command 'run.yaml'; to run a file: fastrl run run.yaml"
    assert refused(capsys).startswith("fastrl: post-training")


def test_each_wrong_key_is_one_line_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("run.yaml").open("a") as file:
        file.write("num_generatons: 4\ndata:\n  colums: {a: b}\n")
    assert refused(capsys, "run", "run.yaml", "--sed", "1").splitlines() == [
        "run.yaml:7: unknown key 'num_generatons' (did you mean 'num_generations'?)",
        "run.yaml:9: unknown key 'data.colums' (did you mean 'data.columns'?)",
        "unknown flag '--sed' (did you mean '--seed'?)",
    ]


def test_a_wrong_value_is_one_line_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("run.yaml").open("a") as file:
        file.write("beta: fast\n")
    assert refused(capsys, "run", "run.yaml") == "run.yaml:7: beta: expected a number or null, got 'fast'"
    assert refused(capsys, "run", "run.yaml", "--beta", "slow") == "--beta: expected a number or null, got 'slow'"


def test_a_broken_rule_is_one_line_with_the_place_of_the_option_to_blame(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("run.yaml").open("a") as file:
        file.write("top_p: 2\nper_device_train_batch_size: 6\n")
    assert refused(capsys, "run", "run.yaml") == "run.yaml:7: top_p: must be in (0, 1], got 2.0"
    assert refused(capsys, "run", "run.yaml", "--top_p", "3") == "--top_p: must be in (0, 1], got 3.0"
    # num_generations is the default: the line is that of the other factor the user set
    assert refused(capsys, "run", "run.yaml", "--top_p", "1").startswith("run.yaml:8: num_generations: per_device")


def test_missing_options_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "sft", "--seed", "1") == (
        "missing: model_name_or_path, output_dir, train_dataset; "
        "write `model_name_or_path: ...` in the file or --model_name_or_path ..."
    )


def test_the_recipe_in_a_file_must_exist_and_agree_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "sft", "--config", "run.yaml") == (
        "run.yaml:1: recipe: is grpo, the command is sft; use `fastrl run run.yaml`"
    )
    Path("wrong.yaml").write_text("recipe: grop\n")
    assert "wrong.yaml:1: recipe: expected one of demo, sft, " in refused(capsys, "run", "wrong.yaml")
    Path("none.yaml").write_text("seed: 1\n")
    assert refused(capsys, "run", "none.yaml") == (
        "none.yaml: does not say which recipe; add a line such as `recipe: grpo`"
    )


DRY_RUNS = ", ".join(name for name, recipe in RECIPES.items() if recipe.has_dry_run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "expected a YAML file first; usage: fastrl run FILE [flags]"),
        (["run", "--config", "run.yaml"], "expected a YAML file first; usage: fastrl run FILE [flags]"),
        (["grpo", "run.yaml"], "unexpected argument 'run.yaml': write --config run.yaml"),
        (["grpo", "--config"], "--config: needs one YAML file"),
        (["grpo", "--config=a", "--config=b"], "--config: needs one YAML file"),
        (["demo", "--dry-run"], f"--dry-run: demo has none; these have: {DRY_RUNS}"),
        (["config"], "usage: fastrl config init RECIPE | check FILE [flags] | schema RECIPE"),
        (
            ["config", "init", "grop"],
            f"expected one of {', '.join(RECIPES)}, got 'grop' (did you mean 'grpo'?)",
        ),
        (["env", "x"], "usage: fastrl env [--json] | sandbox"),
    ],
)
def test_wrong_usage_is_refused_with_the_right_one(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert refused(capsys, *arguments) == message


def test_a_reward_module_in_the_current_directory_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    Path("fastrl_judge.py").write_text("def judge(completions): ...\n")
    flags = ["--reward_funcs", "fastrl_judge:judge"]
    assert main(["config", "check", "run.yaml", *flags]) == 0
    capsys.readouterr()
    assert "has no juge; did you mean judge?" in refused(
        capsys, "run", "run.yaml", "--reward_funcs", "fastrl_judge:juge"
    )


# What it shows


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_init_prints_passes_check_once_it_is_filled_in(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init", name]) == 0
    text = capsys.readouterr().out
    fill = {"model_name_or_path": "model", "output_dir": "out", "reward_funcs": "[numeric]", "prompts": "[hello]"}
    fill |= {"train_dataset": "data.jsonl", "teacher_model_name_or_path": "model", "output_file": "out.safetensors"}
    fill |= {"principles": "[Be brief.]"} if name == "rlaif" else {}
    lines = []
    for line in text.splitlines():
        key = line.partition(":")[0]
        filled = line + " data.jsonl" if line.endswith(("eval_dataset:", "prompt_file:")) else line
        lines.append(f"{key}: {fill[key]}" if key in fill else filled)
    Path("init.yaml").write_text("\n".join(lines))
    assert main(["config", "check", "init.yaml"]) == 0
    assert capsys.readouterr().out == f"init.yaml: valid ({name})\n"


def test_check_says_what_is_wrong_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        refused(capsys, "config", "check", "run.yaml", "--seed", "-1") == "--seed: must be in [0, 4294967295], got -1"
    )


def test_schema_and_env_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", "sft"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() - {"recipe"} == {option.key.split(".")[0] for option in options(SFTConfig)}
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastrl"] == __version__


def test_help_names_every_command_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in [*RECIPES, "run", "config", "env"])
    assert main(["grpo", "--seed", "1", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option.block or f"--{option.key} " in text for option in options(GRPOConfig))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_note_is_printed_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "grpo", RECORDS)
    assert main(["run", "run.yaml", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert len(calls) == 1
    assert capsys.readouterr().err.startswith("note: --dtype: bfloat16 on a CPU is usually slower")


# How fast


def cli(*arguments: str) -> str:
    heavy = "{'torch', 'numpy', 'transformers', 'triton', 'jsonargparse'}"
    return (
        f"import sys\nfrom fastrl.cli import main\ncode = main({list(arguments)!r})\n"
        f"print('loaded', *sorted({heavy} & set(sys.modules)))\nsys.exit(code)\n"
    )


def test_a_wrong_key_costs_less_than_a_third_of_a_second_and_no_heavy_import(tmp_path: Path) -> None:
    done, seconds = fresh(cli("run", "run.yaml", "--num_generatons", "4"), tmp_path)
    assert done.returncode == 2
    assert done.stderr == "unknown flag '--num_generatons' (did you mean '--num_generations'?)\n"
    assert done.stdout == "loaded\n"
    assert seconds < 0.3


def test_help_costs_less_than_a_third_of_a_second_and_no_heavy_import(tmp_path: Path) -> None:
    done, seconds = fresh(cli("--help"), tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("\nloaded\n")
    assert seconds < 0.3


def test_a_whole_configuration_is_checked_before_torch(tmp_path: Path) -> None:
    wrong, _ = fresh(cli("run", "run.yaml", "--seed", "x"), tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "--seed: expected a whole number, got 'x'\n")
    rule, _ = fresh(cli("run", "run.yaml", "--num_generations", "3", "--reward_funcs", "data.jsonl"), tmp_path)
    assert rule.returncode == 2
    assert len(rule.stderr.splitlines()) == 2
    good, _ = fresh(cli("config", "check", "run.yaml"), tmp_path)
    assert good.returncode == 0
    for done in (wrong, rule, good):
        assert done.stdout.splitlines()[-1] in ("loaded", "loaded jsonargparse")


def test_importing_the_package_costs_next_to_nothing(tmp_path: Path) -> None:
    done, seconds = fresh("import fastrl", tmp_path)
    assert done.returncode == 0
    assert seconds < 0.15


def test_a_reader_that_leaves_a_pipe_early_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from fastrl.cli import main; sys.exit(main(['--version']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_init_file_is_yaml_that_other_readers_understand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init", "grpo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["learning_rate"] == 1e-6
