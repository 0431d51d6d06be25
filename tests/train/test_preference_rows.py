"""Judged completions from files to token ids: what is kept, what is cut, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.problems import DataError
from fastrl.recipes.sorting import make_base_model, make_tokenizer
from fastrl.train.config import DataBlock, DPOConfig, PackingBlock, RRHFConfig
from fastrl.train.preference_rows import load_judged, load_pairs, load_ranked, longest_sequence


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its context is 64 tokens."""
    folder = tmp_path_factory.mktemp("model") / "base"
    make_base_model(folder, seed=0)
    return folder


def config_of(model: Path, **changes: Any) -> DPOConfig:
    return replace(DPOConfig(model_name_or_path=str(model), output_dir="unused", train_dataset=""), **changes)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIR = {"prompt": "12", "chosen": "345", "rejected": "67"}


def test_a_pair_shares_its_prompt_and_each_answer_ends(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIR)
    loaded = load_pairs(path, make_tokenizer(), config_of(model), output_dir=None)
    (pair,) = loaded.rows
    assert (pair.chosen.ids, pair.rejected.ids) == ((5, 6, 7, 8, 9, 1), (5, 6, 10, 11, 1))
    assert pair.chosen.is_trained == (False, False, True, True, True, True)
    assert loaded.n_truncated == 0


def test_long_sequences_are_cut_when_asked_and_counted(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "chosen": "3", "rejected": "4"})
    loaded = load_pairs(path, make_tokenizer(), config_of(model, max_length=4, truncate=True), output_dir=None)
    assert [len(pair.chosen.ids) for pair in loaded.rows] == [4, 4]
    assert loaded.n_truncated == 2


def test_the_longest_sequence_is_the_tightest_of_three_limits(model: Path) -> None:
    assert longest_sequence(config_of(model)) == 64
    assert longest_sequence(config_of(model, max_length=30)) == 30
    assert longest_sequence(config_of(model, max_length=None, packing=PackingBlock(token_budget=40))) == 41


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "equal": ({**PAIR, "rejected": "345"}, {}, r":2:/rejected: expected something else than chosen"),
    "equal after the cut": (
        {**PAIR, "rejected": "346"},
        {"max_length": 4, "truncate": True},
        r":2:/rejected: expected other tokens than chosen \(after cutting\)",
    ),
    "missing": ({"prompt": "1", "chosen": "2"}, {}, r":2:/rejected: expected a column 'rejected', got none"),
    "empty": ({**PAIR, "rejected": " "}, {}, r":2:/rejected: expected text"),
    "no tokens": ({**PAIR, "chosen": "", "rejected": "1"}, {}, r":2:/chosen: expected text"),
    "too long": ({**PAIR, "rejected": "6" * 9}, {"max_length": 8}, r":2:/rejected: expected at most max_length = 8"),
    "over the context": (
        {**PAIR, "chosen": "6" * 70},
        {},
        r":2:/chosen: expected at most the model's context = 64 tokens",
    ),
    "prompt over the context": (
        {**PAIR, "prompt": "6" * 64},
        {"truncate": True},
        r":2:/prompt: expected fewer tokens than the model's context of 64, got 64",
    ),
    "nothing left": (
        {**PAIR, "prompt": "123456"},
        {"max_length": 6, "truncate": True},
        r":2:/chosen: expected tokens to train on in the first 6 \(max_length\)",
    ),
    "over the budget": (
        {**PAIR, "chosen": "6" * 9},
        {"packing": PackingBlock(token_budget=14)},
        r":2: expected at most packing.token_budget = 14 positions for what is learned together \(raise it\), got 15",
    ),
    "implicit prompt": ({"chosen": "1", "rejected": "2"}, {}, r":2:/prompt: expected a prompt, or chosen and rejected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_named_by_file_row_and_field_or_set_aside(model: Path, tmp_path: Path, name: str) -> None:
    row, changes, sentence = BAD[name]
    good = {"prompt": "1", "chosen": "23", "rejected": "32"}
    path = write(tmp_path / "pairs.jsonl", good, row)
    with pytest.raises(DataError, match=r"pairs\.jsonl" + sentence):
        load_pairs(path, make_tokenizer(), config_of(model, **changes), output_dir=None)
    lenient = config_of(model, **changes, data=DataBlock(skip_bad_rows=True))
    assert len(load_pairs(path, make_tokenizer(), lenient, output_dir=str(tmp_path)).rows) == 1
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("label", "got"), [("yes", "the string 'yes'"), (1, "int 1"), (None, "null")])
def test_labels_of_the_wrong_type_are_named(model: Path, tmp_path: Path, label: object, got: str) -> None:
    rows = [{"prompt": "1", "completion": "2", "label": True}, {"prompt": "1", "completion": "2", "label": label}]
    with pytest.raises(DataError, match=rf"rows\.jsonl:2:/label: expected .*, got {got}"):
        load_judged(write(tmp_path / "rows.jsonl", *rows), make_tokenizer(), config_of(model), output_dir=None)


def test_a_prompt_too_many_completions_share_does_not_fit_one_batch(model: Path, tmp_path: Path) -> None:
    row = {"prompt": "12", "completions": ["345", "67", "89"], "scores": [1, 0.5, -2]}
    path = write(tmp_path / "rows.jsonl", row)
    config = RRHFConfig(model_name_or_path=str(model), output_dir="unused", train_dataset="")
    (ranked,) = load_ranked(path, make_tokenizer(), config, output_dir=None).rows
    assert [len(example.ids) for example in ranked.examples] == [6, 5, 5]
    assert ranked.scores == (1.0, 0.5, -2.0)
    with pytest.raises(DataError, match=r"token_budget = 12 positions .* got 13"):
        load_ranked(path, make_tokenizer(), replace(config, packing=PackingBlock(token_budget=12)), output_dir=None)


def test_completions_that_are_learned_against_each_other_differ(model: Path, tmp_path: Path) -> None:
    row = {"prompt": "12", "completions": ["34", "5", "34"], "scores": [1, 1, 0]}
    config = RRHFConfig(model_name_or_path=str(model), output_dir="unused", train_dataset="")
    with pytest.raises(DataError, match=r"rows\.jsonl:1:/completions/2: expected other tokens than /completions/0"):
        load_ranked(write(tmp_path / "rows.jsonl", row), make_tokenizer(), config, output_dir=None)
    tied = write(tmp_path / "tied.jsonl", {**row, "scores": [1, 0, 1]})
    assert len(load_ranked(tied, make_tokenizer(), config, output_dir=None).rows) == 1

    cut = config_of(model, max_length=4, truncate=True)
    path = write(tmp_path / "pairs.jsonl", {**PAIR, "rejected": "346"})
    for load in (load_judged, load_ranked):
        with pytest.raises(DataError, match=r"pairs\.jsonl:1:/rejected: expected other tokens than chosen"):
            load(path, make_tokenizer(), cut, output_dir=None)


def test_an_implicit_prompt_is_taken_out_before_encoding(model: Path, tmp_path: Path) -> None:
    turns = (
        [{"role": "user", "content": "12"}],
        {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": "4"},
    )
    path = write(tmp_path / "pairs.jsonl", {"chosen": [*turns[0], turns[1]], "rejected": [*turns[0], turns[2]]})
    (pair,) = load_pairs(path, make_tokenizer(), config_of(model), output_dir=None).rows
    assert make_tokenizer().decode(pair.rejected.ids) == "<|user|>12<|assistant|>4<|end|>"
    assert sum(pair.chosen.is_trained) == 2
