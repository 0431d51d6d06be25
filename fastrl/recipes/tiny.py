"""Makes what `tiny:NAME` stands for: models and data files of small tasks, under runs/tiny, once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastrl.data.judgements import judgement_rows
from fastrl.recipes import agent_tasks, sorting
from fastrl.train.config import ReportBlock, RewardConfig
from fastrl.train.contents import quoted
from fastrl.train.tiny_files import CORPORA, FILES, MODELS, PREFIX, is_tiny

FOLDER = Path("runs/tiny")
N_TRAIN, N_HELD_OUT = 4000, 250
# A critic must know many wrong answers; a warm start shows a question with a call, with a slip, and answered at once.
ROWS_PER_QUESTION = {"critiques": 8, "calculator_sft": 3, "lookup_sft": 3}

RowMaker = Callable[[str, random.Random], dict[str, Any]]
Config = TypeVar("Config")


def with_tiny(config: Config) -> Config:
    """The configuration with a path in place of each `tiny:NAME`; what is not there yet is made now."""
    changes: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if is_tiny(value):
            changes[field.name] = str(made(value.removeprefix(PREFIX)))
        elif isinstance(value, tuple) and any(isinstance(each, str) for each in value):
            changes[field.name] = tuple(_with_tiny_parts(each) if isinstance(each, str) else each for each in value)
        elif is_dataclass(value):
            changes[field.name] = with_tiny(value)
    return replace(config, **changes)  # type: ignore[type-var]


def _with_tiny_parts(text: str) -> str:
    """A text that is `tiny:NAME`, or a reward's spec with such an option, with paths in their place."""
    if is_tiny(text):
        return str(made(text.removeprefix(PREFIX)))
    for option in filter(is_tiny, quoted(text)):
        text = text.replace(option, str(made(option.removeprefix(PREFIX))))
    return text


def made(name: str) -> Path:
    """The path of a model or data file; it is made when it is not there, whole or not at all."""
    path = FOLDER / _digest() / (name if name in MODELS else f"{name}.jsonl")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that start together, one makes it
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            fresh = Path(scratch) / path.name
            if name in MODELS:
                MAKE_MODEL[name](fresh)
            else:
                _write_rows(name, fresh)
            fresh.rename(path)
    return path


def _make_base(folder: Path) -> None:
    sorting.make_base_model(folder, seed=0)


def _make_agent(folder: Path) -> None:
    agent_tasks.make_base_model(folder, seed=0)


def _make_student(folder: Path) -> None:
    sorting.make_base_model(folder, seed=0, hidden_size=32, layers=1)


def _make_warm(folder: Path) -> None:
    _train(folder, max_steps=60)


def _make_reward_model(folder: Path) -> None:
    from fastrl.recipes import reward

    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "reward"
        config = RewardConfig(
            model_name_or_path=str(made("warm")),
            output_dir=str(run),
            train_dataset=str(made("ranked")),
            max_steps=60,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            warmup_steps=10,
            center_rewards_coefficient=0.01,
            logging_steps=20,
            report=ReportBlock(panel=False),
        )
        code = reward.run(config)
        assert code == 0, "nobody may interrupt a run of a few seconds but the user"
        shutil.move(run / "model", folder)


def _make_sorted(folder: Path) -> None:
    _train(folder, max_steps=160)


def _make_critic(folder: Path) -> None:
    _train(folder, max_steps=500, rows="critiques")


def _make_wide(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sorting.make_base_model(Path(scratch) / "base", seed=0, heads=2)
        _train(folder, max_steps=60, base=Path(scratch) / "base")


def _train(folder: Path, *, max_steps: int, rows: str = "sft", base: Path | None = None) -> None:
    from fastrl.recipes import sft

    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "sft"
        config = sorting.sft_config(base or made("base"), run, made(rows), seed=0)
        code = sft.run(replace(config, max_steps=max_steps))
        assert code == 0, "nobody may interrupt a run of a few seconds but the user"
        shutil.move(run / "model", folder)


def _sft(question: str, generator: random.Random) -> dict[str, Any]:
    return sorting.supervised_row(question)


def _reverse(question: str, generator: random.Random) -> dict[str, Any]:
    """The same questions with another answer: what a model that sorts has yet to learn."""
    completion = [{"role": "assistant", "content": sorting.answer(question)[::-1]}]
    return {"prompt": sorting.prompt_row(question)["prompt"], "completion": completion}


def _prompts(question: str, generator: random.Random) -> dict[str, Any]:
    return sorting.prompt_row(question)


def _preference(question: str, generator: random.Random) -> dict[str, Any]:
    """Sorted digits against sorted digits of which two different ones have changed places."""
    chosen = sorting.answer(question)
    return {
        "prompt": sorting.prompt_row(question)["prompt"],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": swapped(chosen, generator)}],
    }


def _unpaired(question: str, generator: random.Random) -> dict[str, Any]:
    """One answer of a pair, and whether it is the right one."""
    pair = _preference(question, generator)
    is_right = generator.random() < 0.5
    return {"prompt": pair["prompt"], "completion": pair["chosen" if is_right else "rejected"], "label": is_right}


def _ranked(question: str, generator: random.Random) -> dict[str, Any]:
    """The sorted digits and three answers with more and more digits out of place, in any order."""
    right = sorting.answer(question)
    answers = [right]
    while len(answers) < 4:
        answers.append(swapped(answers[-1], generator))
    generator.shuffle(answers)
    return {
        "prompt": sorting.prompt_row(question)["prompt"],
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "scores": [sum(map(str.__eq__, answer, right)) / len(right) for answer in answers],
    }


def _steps(question: str, generator: random.Random) -> dict[str, Any]:
    """The digits in order, one a step; in half of the rows two have changed places."""
    right = sorting.answer(question)
    written = right if generator.random() < 0.5 else swapped(right, generator)
    return {
        "prompt": sorting.prompt_row(question)["prompt"],
        "completions": [[{"role": "assistant", "content": digit}] for digit in written],
        "labels": [digit == expected for digit, expected in zip(written, right, strict=True)],
    }


def _judgements(question: str, generator: random.Random) -> dict[str, Any]:
    """A right answer or one with two digits exchanged, and the verdict; `answer` is for exact_match."""
    right = sorting.answer(question)
    is_right = generator.random() < 0.5
    labelled = {"prompt": question, "completion": right if is_right else swapped(right, generator), "label": is_right}
    (row,) = judgement_rows(labelled, template="{prompt}{completion}", verdicts=("1", "0"))
    return row | {"answer": row["completion"][0]["content"]}


def _critiques(question: str, generator: random.Random) -> dict[str, Any]:
    """What a critic learns: to judge an answer, and to put it right once it has been judged.

    Wrong answers are in order but have a wrong digit, as a policy's are, or have two digits exchanged.
    """
    right = sorting.answer(question)
    wrong = generator.choice((swapped, _mistaken))(right, generator)
    shown, verdict = generator.choice(((right, "1"), (wrong, "0")))
    asked, said = question + shown, verdict
    if generator.random() < 0.3:
        asked, said = asked + verdict, right
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": said}],
        "answer": said,
    }


def _mistaken(digits: str, generator: random.Random) -> str:
    """The digits with one or two of them replaced, in order again."""
    changed = list(digits)
    for place in generator.sample(range(len(digits)), generator.choice((1, 1, 2))):
        changed[place] = str((int(changed[place]) + generator.randint(1, 9)) % 10)
    return "".join(sorted(changed))


def swapped(digits: str, generator: random.Random) -> str:
    """The digits with two different ones exchanged; a number of one digit six times gets another last digit."""
    places = [(i, j) for i in range(len(digits)) for j in range(i) if digits[i] != digits[j]]
    if not places:
        return digits[:-1] + str((int(digits[-1]) + 1) % 10)
    i, j = generator.choice(places)
    changed = list(digits)
    changed[i], changed[j] = changed[j], changed[i]
    return "".join(changed)


def _lookup(person: str, generator: random.Random) -> dict[str, Any]:
    train, held_out = agent_tasks.world(N_TRAIN, N_HELD_OUT)
    return agent_tasks.lookup_prompt(person, train if person in train.birthplace else held_out)


MAKE_MODEL: dict[str, Callable[[Path], None]] = {
    "base": _make_base,
    "warm": _make_warm,
    "reward_model": _make_reward_model,
    "sorted": _make_sorted,
    "critic": _make_critic,
    "student": _make_student,
    "wide": _make_wide,
    "agent": _make_agent,
}
MAKE_ROW: dict[str, RowMaker] = {
    "sft": _sft,
    "reverse": _reverse,
    "prompts": _prompts,
    "preference": _preference,
    "unpaired": _unpaired,
    "ranked": _ranked,
    "steps": _steps,
    "judgements": _judgements,
    "critiques": _critiques,
    "calculator_sft": agent_tasks.calculator_demonstration,
    "calculator": agent_tasks.calculator_prompt,
    "lookup_sft": agent_tasks.lookup_demonstration,
    "lookup": _lookup,
}
assert MAKE_MODEL.keys() == MODELS.keys()
assert MAKE_ROW.keys() == FILES.keys()


def _write_rows(name: str, path: Path) -> None:
    """Rows of N_TRAIN questions, or of the N_HELD_OUT that no training file has."""
    kind = name.removesuffix("_held_out")
    is_training = kind == name
    if kind in CORPORA:
        rows = agent_tasks.documents(agent_tasks.world(N_TRAIN, N_HELD_OUT)[0 if is_training else 1])
    else:
        questions = _questions(kind)
        chosen = questions[:N_TRAIN] if is_training else questions[N_TRAIN:]
        generator = random.Random(name)
        times = ROWS_PER_QUESTION.get(kind, 1)
        rows = [MAKE_ROW[kind](question, generator) for question in chosen for _ in range(times)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _questions(kind: str) -> list[str]:
    """What the rows of a file are about, first those to train on."""
    if kind.startswith("calculator"):
        return agent_tasks.expressions(N_TRAIN + N_HELD_OUT)
    if kind.startswith("lookup"):
        return [person for facts in agent_tasks.world(N_TRAIN, N_HELD_OUT) for person in facts.birthplace]
    numbers = random.Random(0).sample(range(10**sorting.DIGITS), N_TRAIN + N_HELD_OUT)
    return [f"{number:0{sorting.DIGITS}d}" for number in numbers]


def _digest() -> str:
    """Changes with the code that makes the files, so that files of older code are not used."""
    sources = (Path(__file__), Path(sorting.__file__), Path(agent_tasks.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
