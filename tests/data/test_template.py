from __future__ import annotations

import pytest

from fastrl.data import PROMPT, DataError, apply_templates, check_rows, read_rows

GSM = {"question": "What is 2+2?", "answer": "4"}


def only(row, **options):
    return apply_templates(read_rows([row]), **options)[0]


def test_templates_make_the_columns_a_row_lacks():
    row = only(GSM, prompt_template="Q: {question}\nA:", completion_template=" {{{answer:>3}}}")
    assert row["prompt"] == "Q: What is 2+2?\nA:"
    assert row["completion"] == " {  4}"


def test_a_field_that_is_no_column_is_refused_with_its_row():
    rows = apply_templates(read_rows([GSM, {"answer": "4"}]), prompt_template="{question}")
    with pytest.raises(
        DataError, match="list:2:/question: expected the column 'question' of prompt_template, got only 'answer'"
    ):
        check_rows(rows, PROMPT)


def test_a_null_never_becomes_the_word_none():
    with pytest.raises(DataError, match=r"list:1:/answer: .* got null"):
        only({"answer": None}, prompt_template="{answer}")


@pytest.mark.parametrize("template", ["{}", "{0}", "{question", "{question.__class__}", "{question[0]}", "{a:{b}}"])
def test_a_template_that_is_not_over_columns_is_refused_before_any_row(template):
    with pytest.raises(ValueError, match=r"prompt_template .*brace"):
        apply_templates(read_rows([GSM]), prompt_template=template)


def test_a_format_that_does_not_fit_the_value_is_refused():
    with pytest.raises(DataError, match="list:1: expected columns that fit prompt_template"):
        only(GSM, prompt_template="{question:d}")


def test_a_template_beside_the_column_it_makes_is_refused():
    with pytest.raises(DataError, match="list:1:/prompt: expected no column 'prompt' beside prompt_template"):
        only({"prompt": "q"}, prompt_template="Q: {prompt}")
    rows = read_rows([{"prompt": "q"}], columns={"question": "prompt"})
    assert apply_templates(rows, prompt_template="Q: {question}")[0]["prompt"] == "Q: q"


def test_plain_rows_become_one_turn_conversations_with_a_system_prompt():
    row = {"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}
    assert only(row, apply_chat_template=True, system_prompt="Be brief.") == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    steps = only({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, apply_chat_template=True)
    assert steps["completions"][1] == [{"role": "assistant", "content": "b"}]


def test_conversations_stay_as_they_are():
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert only(row, apply_chat_template=True) == row


def test_a_system_prompt_needs_a_conversation_without_one():
    with pytest.raises(DataError, match="expected a conversation for system_prompt"):
        only({"prompt": "q"}, system_prompt="Be brief.")
    with pytest.raises(DataError, match="/messages/0: expected no system message beside system_prompt"):
        only({"messages": [{"role": "system", "content": "s"}]}, system_prompt="Be brief.")


def test_text_rows_cannot_take_a_chat_template():
    with pytest.raises(DataError, match="expected a prompt or messages for apply_chat_template"):
        only({"text": "a"}, apply_chat_template=True)


def test_the_source_is_not_changed():
    source = [{"prompt": [{"role": "user", "content": "q"}]}]
    assert len(apply_templates(read_rows(source), system_prompt="s")[0]["prompt"]) == 2
    assert len(source[0]["prompt"]) == 1
