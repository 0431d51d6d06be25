"""The demo's task: one token per digit, right answers, and held-out prompts that training never shows."""

from __future__ import annotations

import json
from pathlib import Path

from fastrl.data.tokenize import encode_prompt_completion, render_prompt
from fastrl.recipes.sorting import END, make_tokenizer, write_task
from fastrl.train.model import load_tokenizer


def test_every_character_is_one_token_and_comes_back() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("120034")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "120034"
    assert tokenizer.eos_token == END
    assert len(tokenizer) == 4 + 10


def test_a_prompt_opens_the_assistants_turn_and_the_answer_with_its_end_is_what_trains() -> None:
    tokenizer = make_tokenizer()
    prompt = [{"role": "user", "content": "120034"}]
    assert tokenizer.decode(render_prompt(tokenizer, prompt)) == "<|user|>120034<|assistant|>"
    ids, is_trained = encode_prompt_completion(tokenizer, prompt, [{"role": "assistant", "content": "001234"}])
    assert tokenizer.decode([i for i, on in zip(ids, is_trained, strict=True) if on]) == "001234<|end|>"


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = load_tokenizer(tmp_path, chat_template=None)
    prompt = [{"role": "user", "content": "990100"}]
    assert render_prompt(loaded, prompt) == render_prompt(made, prompt)
    assert loaded.decode(loaded("990100")["input_ids"], skip_special_tokens=True) == "990100"


def test_answers_are_right_and_held_out_prompts_are_in_neither_stage(tmp_path: Path) -> None:
    files = write_task(tmp_path, seed=3, n_sft=500, n_prompts=2000, n_held_out=200)
    sft, prompts, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (files.sft, files.prompts, files.held_out)
    )
    assert (len(sft), len(prompts), len(held_out)) == (500, 2000, 200)
    question = {
        name: {row["prompt"][0]["content"] for row in rows}
        for name, rows in zip("sph", (sft, prompts, held_out), strict=True)
    }
    assert question["s"] <= question["p"]
    assert not question["h"] & question["p"]
    assert len(question["h"] | question["p"]) == 2200
    for row in prompts + held_out:
        assert row["answer"] == "".join(sorted(row["prompt"][0]["content"]))
    assert all(row["completion"][0]["content"] == "".join(sorted(row["prompt"][0]["content"])) for row in sft)


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    texts = [
        write_task(tmp_path / str(i), seed=seed, n_sft=5, n_prompts=20, n_held_out=5).held_out.read_text()
        for i, seed in enumerate((1, 1, 2))
    ]
    assert texts[0] == texts[1] != texts[2]
