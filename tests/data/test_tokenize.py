from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.data import (
    DataError,
    encode_messages,
    encode_prompt_completion,
    encode_text,
    read_chat_template,
    read_rows,
    render_prompt,
)

USER = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "Four"}
AGAIN = {"role": "user", "content": "Again?"}
STILL = {"role": "assistant", "content": "Still 4."}
CALL = {"role": "assistant", "content": "add"}
RESULT = {"role": "tool", "content": "4"}


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([token for token, is_trained in zip(ids, mask, strict=True) if is_trained])


def test_a_plain_prompt_is_tokenised_as_it_is(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(render_prompt(tokenizer, "What is 2+2?")) == "What is 2+2?"


def test_a_conversation_gets_the_header_of_the_answer(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(render_prompt(tokenizer, [USER]))
    assert text == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", ["What is 2+2?", "<s>What is 2+2?", [USER]])
@pytest.mark.parametrize("template_writes_bos", [True, False])
def test_a_prompt_has_exactly_one_bos(tiny_tokenizer, templates, prompt, template_writes_bos):
    template = ("{{ bos_token }}" if template_writes_bos else "") + templates["plain"]
    tokenizer = tiny_tokenizer(template, bos=True)
    ids = render_prompt(tokenizer, prompt)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_no_bos_gets_none(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2: declared, never added, and in every turn of the template
    assert tokenizer.decode(render_prompt(tokenizer, "What")) == "What"
    assert render_prompt(tokenizer, [USER, FOUR, AGAIN]).count(tokenizer.bos_token_id) == 4


def test_a_second_bos_inside_the_text_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match=r"train:3: expected one <s>, at the start, got 2"):
        render_prompt(tiny_tokenizer(bos=True), "What <s> is", place="train:3")


def test_a_token_that_is_both_bos_and_eos_may_end_every_turn(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.eos_token = "<s>"
    ids, mask = encode_prompt_completion(tokenizer, "What", " is<s>")
    assert tokenizer.decode(ids) == "<s>What is<s>"
    assert trained_text(tokenizer, ids, mask) == " is<s>"


def test_messages_without_a_chat_template_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="give a Jinja file as chat_template"):
        render_prompt(tiny_tokenizer(None), [USER])


def test_the_templates_own_refusal_is_reported_with_the_row(tiny_tokenizer, templates):
    tokenizer = tiny_tokenizer("{{ raise_exception('roles must alternate') }}" + templates["plain"])
    with pytest.raises(DataError, match=r"train:3: .*TemplateError: roles must alternate"):
        render_prompt(tokenizer, [USER, USER], place="train:3")


def test_tools_reach_the_template_as_objects_or_as_json_and_nulls_do_not(tiny_tokenizer, templates):
    tokenizer = tiny_tokenizer(templates["tools"].replace("t['name']", "t"))
    as_objects = render_prompt(tokenizer, [USER], tools=[{"name": "add", "description": None}])
    as_json = render_prompt(tokenizer, [USER], tools='[{"name": "add"}]')
    assert as_objects == as_json
    assert tokenizer.decode(as_json).startswith("[{'name': 'add'}]<|im_start|>user")
    assert render_prompt(tokenizer, [USER], tools=[]) == render_prompt(tokenizer, [USER])


@pytest.mark.parametrize("bos", [True, False])
def test_a_plain_completion_is_trained_with_its_appended_eos(tiny_tokenizer, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    ids, mask = encode_prompt_completion(tokenizer, "What is 2+2?", " Four")
    assert ids[: ids.index(tokenizer.eos_token_id)] == render_prompt(tokenizer, "What is 2+2? Four")
    assert trained_text(tokenizer, ids, mask) == " Four<|im_end|>"


def test_an_eos_that_is_there_is_not_appended_again(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    once = encode_prompt_completion(tokenizer, "What is 2+2?", " Four")
    assert encode_prompt_completion(tokenizer, "What is 2+2?", " Four<|im_end|>") == once
    ids, mask = encode_text(tokenizer, "The answer")
    assert encode_text(tokenizer, "The answer<|im_end|>") == (ids, mask)
    assert tokenizer.decode(ids) == "The answer<|im_end|>"
    assert mask == (False, *[True] * (len(ids) - 1))


def test_a_token_across_the_border_of_a_plain_prompt_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match=r"train:3: .* a difference at token \d+: the tokenizer merges"):
        encode_prompt_completion(tiny_tokenizer(), "What is the ans", "wer", place="train:3")


def test_a_conversational_completion_ends_with_its_eos_and_not_with_what_follows(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    ids, mask = encode_prompt_completion(tokenizer, [USER], [FOUR])
    assert tokenizer.decode(ids).endswith("Four<|im_end|>\n")
    assert trained_text(tokenizer, ids, mask) == "Four<|im_end|>"


@pytest.mark.parametrize("name", ["plain", "generation"])
def test_tool_output_inside_a_completion_is_not_trained(tiny_tokenizer, templates, name):
    tokenizer = tiny_tokenizer(templates[name])
    ids, mask = encode_prompt_completion(tokenizer, [USER, FOUR, AGAIN], [CALL, RESULT, STILL])
    assert trained_text(tokenizer, ids, mask) == "add<|im_end|>Still 4.<|im_end|>"


def test_a_prompt_that_later_messages_change_is_refused(tiny_tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"train:3: .* a difference at token 0: the chat template rewrites history"):
        encode_prompt_completion(tiny_tokenizer(template), [USER], [FOUR], place="train:3")


def test_a_plain_prompt_with_a_conversational_completion_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="both be strings or both be messages"):
        encode_prompt_completion(tiny_tokenizer(), "What", [FOUR])


def test_all_tokens_of_a_conversation_but_the_first_are_trained_by_default(tiny_tokenizer):
    ids, mask = encode_messages(tiny_tokenizer(), [USER, FOUR])
    assert mask == (False, *[True] * (len(ids) - 1))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ["plain", "generation"])
def test_assistant_turns_and_their_eos_alone_are_trained(tiny_tokenizer, templates, name, bos):
    tokenizer = tiny_tokenizer(templates[name], bos=bos)
    ids, mask = encode_messages(tokenizer, [USER, FOUR, AGAIN, STILL], assistant_only=True)
    assert trained_text(tokenizer, ids, mask) == "Four<|im_end|>Still 4.<|im_end|>"
    assert ids == encode_messages(tokenizer, [USER, FOUR, AGAIN, STILL])[0]


def test_a_template_that_rewrites_history_is_refused_for_assistant_masks(tiny_tokenizer, templates):
    tokenizer = tiny_tokenizer(templates["rewriting"])
    ids, mask = encode_messages(tokenizer, [USER, FOUR], assistant_only=True)
    assert trained_text(tokenizer, ids, mask) == "<think></think>Four<|im_end|>"
    with pytest.raises(DataError, match=r"train:3: .*rewrites history"):
        encode_messages(tokenizer, [USER, FOUR, AGAIN, STILL], assistant_only=True, place="train:3")


def test_a_conversation_without_assistant_tokens_is_refused(tiny_tokenizer, templates):
    for name in ("plain", "generation"):
        with pytest.raises(DataError, match="assistant tokens to train on"):
            encode_messages(tiny_tokenizer(templates[name]), [USER], assistant_only=True)


def test_a_conversation_that_begins_with_the_assistant_needs_generation_blocks(tiny_tokenizer, templates):
    tokenizer = tiny_tokenizer(templates["generation"])
    ids, mask = encode_messages(tokenizer, [FOUR, USER], assistant_only=True)
    assert trained_text(tokenizer, ids, mask) == "Four<|im_end|>"
    with pytest.raises(DataError, match="a message before the first assistant turn"):
        encode_messages(tiny_tokenizer(), [FOUR, USER], assistant_only=True)


def test_plain_completions_need_an_eos_token(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set its eos_token"):
        encode_prompt_completion(tokenizer, "What", " is")


def test_a_chat_template_is_read_from_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert read_chat_template(tmp_path / "chat.jinja") == "{{ messages }}"
    with pytest.raises(ValueError, match=r"chat_template must be a UTF-8 file .*nothing\.jinja"):
        read_chat_template(tmp_path / "nothing.jinja")


def test_gsm8k_survives_the_round_trip(shared_data: Path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    columns = {"prompt": "question", "completion": "answer"}
    rows = read_rows(shared_data / "gsm8k" / "train.jsonl", columns=columns, max_rows=200)
    for i, row in enumerate(rows):
        plain = encode_prompt_completion(tokenizer, row["prompt"] + "\n", row["completion"], place=rows.place(i))
        assert trained_text(tokenizer, *plain) == row["completion"] + "<|im_end|>"
        prompt, completion = (
            [{"role": "user", "content": row["prompt"]}],
            [{"role": "assistant", "content": row["completion"]}],
        )
        chat = encode_prompt_completion(tokenizer, prompt, completion)
        assert trained_text(tokenizer, *chat) == row["completion"] + "<|im_end|>"
        assert chat == encode_messages(tokenizer, prompt + completion, assistant_only=True)
