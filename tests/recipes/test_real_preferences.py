"""Real right and wrong solutions of GSM8K as preference pairs, unpaired labels and a DPO step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import dpo
from fastrl.train.config import DataBlock, DPOConfig, KTOConfig, ReportBlock
from fastrl.train.export import save_pretrained
from fastrl.train.model import load_tokenizer
from fastrl.train.preference_rows import load_judged, load_pairs
from fastrl.train.tiny import make_tiny_qwen3
from tests.recipes.runs import metrics_of

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(scope="module")
def problems(shared_data: Path) -> list[dict[str, Any]]:
    lines = (shared_data / "gsm8k" / "model_solutions_part1.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model(problems: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights over the characters of the data."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({character for problem in problems for character in json.dumps(problem, ensure_ascii=False)})
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<end>", "\n", *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    folder = tmp_path_factory.mktemp("characters") / "model"
    tiny = make_tiny_qwen3(len(tokenizer), hidden_size=16, layers=1, context=2048, eos_token_id=1, pad_token_id=0)
    save_pretrained(tiny, tokenizer, folder, card="random")
    return folder


@pytest.fixture(scope="module")
def pairs(problems: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right and a wrong solution of every problem that has both."""
    rows = []
    for problem in problems:
        right, wrong = (
            [problem[solver]["solution"] for solver in SOLVERS if problem[solver]["is_correct"] == is_correct]
            for is_correct in (True, False)
        )
        if right and wrong:
            question = problem["question"] + "\n"
            rows.append({"prompt": question, "chosen": right[0], "rejected": wrong[0]})
    path = tmp_path_factory.mktemp("gsm8k") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_pair_of_solutions_is_encoded_whole_after_its_question(model: Path, pairs: Path) -> None:
    config = DPOConfig(model_name_or_path=str(model), output_dir="unused", train_dataset=str(pairs), max_length=None)
    tokenizer = load_tokenizer(model, chat_template=None)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    loaded = load_pairs(str(pairs), tokenizer, config, output_dir=None)
    assert len(loaded.rows) == len(rows) > 300
    for pair, row in zip(loaded.rows, rows, strict=True):
        start = pair.chosen.is_trained.index(True)
        assert pair.chosen.ids[:start] == pair.rejected.ids[:start]
        for example, text in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
            assert tokenizer.decode(example.ids) == row["prompt"] + text + "<end>"
            assert sum(example.is_trained) == len(text) + 1


def test_unpaired_labels_count_as_the_solutions_do(model: Path, pairs: Path) -> None:
    config = KTOConfig(model_name_or_path=str(model), output_dir="unused", train_dataset=str(pairs), max_length=None)
    rows = load_judged(str(pairs), load_tokenizer(model, chat_template=None), config, output_dir=None).rows
    assert sum(row.is_desirable for row in rows) == len(rows) / 2


def test_a_dpo_step_on_real_solutions_lowers_its_loss(model: Path, pairs: Path, tmp_path: Path) -> None:
    config = DPOConfig(
        model_name_or_path=str(model),
        output_dir=str(tmp_path / "run"),
        train_dataset=str(pairs),
        per_device_train_batch_size=8,
        max_steps=4,
        learning_rate=3e-3,
        max_length=2048,
        data=DataBlock(max_rows=8),
        report=ReportBlock(panel=False),
    )
    assert dpo.run(config) == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01
