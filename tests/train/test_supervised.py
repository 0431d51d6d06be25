"""Supervised rows: what trains in each format, what is cut and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.problems import DataError
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train.config import DataBlock, PackingBlock, SFTConfig
from fastrl.train.supervised import Examples, load_examples

TOKENIZER = make_tokenizer()


def load(folder: Path, *rows: Any, **options: Any) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text('{"max_position_embeddings": 40}')
    config = SFTConfig(model_name_or_path=str(folder), output_dir="", train_dataset="", **options)
    return load_examples(str(path), TOKENIZER, config, output_dir=str(folder))


def trained(examples: Examples) -> list[str]:
    return [
        TOKENIZER.decode([token for token, is_on in zip(row.ids, row.is_trained, strict=True) if is_on])
        for row in examples.rows
    ]


PAIR = {"prompt": "102", "completion": "003"}
CHAT = {
    "messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
}


def test_each_format_trains_its_own_tokens(tmp_path: Path) -> None:
    assert trained(load(tmp_path, {"text": "12"})) == ["2<|end|>"]
    assert trained(load(tmp_path, PAIR)) == ["003<|end|>"]
    assert trained(load(tmp_path, PAIR, completion_only_loss=False)) == ["02003<|end|>"]
    assert trained(load(tmp_path, CHAT)) == ["1<|assistant|>2<|end|><|user|>3<|assistant|>4<|end|>"]
    assert trained(load(tmp_path, CHAT, assistant_only_loss=True)) == ["2<|end|>4<|end|>"]


def test_rows_over_the_limit_are_refused_cut_or_set_aside(tmp_path: Path) -> None:
    long = {"prompt": "102", "completion": "000000003"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected at most max_length = 8 tokens .*, got 13"):
        load(tmp_path, PAIR, long, max_length=8)
    cut = load(tmp_path, PAIR, long, max_length=8, truncate=True)
    assert (trained(cut), cut.n_truncated) == (["003<|end|>", "00000"], 1)
    kept = load(tmp_path, PAIR, long, max_length=8, data=DataBlock(skip_bad_rows=True))
    assert (trained(kept), kept.n_truncated) == (["003<|end|>"], 0)
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["row"] == json.dumps(long)


def test_a_row_cut_down_to_its_prompt_has_nothing_left_to_train(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokens to train on in the first 3"):
        load(tmp_path, PAIR, max_length=3, truncate=True)


def test_a_row_over_the_token_budget_is_refused_at_the_start_and_not_in_the_step_that_draws_it(tmp_path: Path) -> None:
    packing = PackingBlock(token_budget=6)
    assert len(load(tmp_path, PAIR, max_length=None, packing=packing).rows[0].ids) == 7  # the last is never fed
    with pytest.raises(DataError, match=r"packing\.token_budget \+ 1 = 6 tokens"):
        load(tmp_path, PAIR, max_length=None, packing=PackingBlock(token_budget=5))


def test_assistant_turns_are_not_looked_for_in_plain_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="assistant_only_loss needs rows with messages"):
        load(tmp_path, {"text": "12"}, assistant_only_loss=True)
    with pytest.raises(ValueError, match=r"messages, and those of .* have prompt and completion"):
        load(tmp_path, PAIR, assistant_only_loss=True)


@pytest.mark.parametrize("max_length", [None, 100])
def test_a_row_over_the_models_context_is_refused_whatever_max_length_says(
    tmp_path: Path, max_length: int | None
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected at most the 40 tokens of the model's context"):
        load(tmp_path, PAIR, {**PAIR, "prompt": "1" * 40}, max_length=max_length)
