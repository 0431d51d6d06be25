from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data import (
    FORMATS,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    PROMPT_COMPLETION,
    TEXT,
    DataError,
    check_rows,
    detect_format,
    find_overlap,
    read_rows,
    split_rows,
)

USER = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "Four"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
SILENCE = {"role": "tool", "content": ""}

GOOD = [
    {"text": "a"},
    {"messages": [SYSTEM, USER, CALL, SILENCE, FOUR]},
    {"prompt": "q", "tools": [{"name": "add"}]},
    {"prompt": [SYSTEM, USER], "tools": '[{"name": "add"}]'},
    {"prompt": "q", "completion": " a"},
    {"prompt": [USER], "completion": [CALL, SILENCE, FOUR]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [USER], "chosen": [FOUR], "rejected": [CALL, SILENCE, FOUR]},
    {"prompt": "q", "completion": "a", "label": False},
    {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    {"prompt": "q", "completions": ["a", "b", "c"], "scores": [0.5, -1, 0.5]},
    {"prompt": [USER], "completions": [[FOUR], [CALL, SILENCE, FOUR]], "ranks": [2, 1]},
]


@pytest.mark.parametrize("row", GOOD)
def test_good_rows_of_every_format_pass(row):
    rows = read_rows([row, row])
    assert check_rows(rows, FORMATS) == detect_format(rows)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"text": "a"}, {"text": 3}, "/text: expected a string, got int 3"),
        ({"text": "a"}, {"txt": "b"}, "/text: expected a column 'text', got none"),
        ({"text": "a"}, {"text": None}, "/text: expected a column 'text', got null"),
        ({"text": "a"}, {"text": "\ud800"}, "/text: expected text that UTF-8 can hold, got half of a surrogate pair"),
        ({"prompt": "q"}, {"prompt": " \n"}, r"/prompt: expected text, got the string ' \\n'"),
        ({"prompt": "q"}, {"prompt": [USER]}, "/prompt: expected a string, got a list of 1"),
        ({"prompt": [USER]}, {"prompt": "q"}, "/prompt: expected a list of messages, got the string 'q'"),
        ({"prompt": [USER]}, {"prompt": []}, "/prompt: expected at least one message, got an empty list"),
        ({"prompt": [USER]}, {"prompt": [USER, FOUR]}, "/prompt: .* ends with user or tool, got assistant at the end"),
        ({"prompt": [USER]}, {"prompt": ["q"]}, "/prompt/0: expected an object with role and content, got the string"),
        (
            {"prompt": [USER]},
            {"prompt": [SYSTEM, {"role": "human", "content": "q"}]},
            "/prompt/1/role: expected one of system, user, assistant, tool, got the string 'human'",
        ),
        (
            {"prompt": [USER]},
            {"prompt": [{"from": "user", "value": "q"}]},
            "/prompt/0/role: expected one of .*, got an object with the keys 'from', 'value'",
        ),
        (
            {"prompt": [USER]},
            {"prompt": [{**USER, "content": ""}]},
            "/prompt/0/content: expected text, got the string ''",
        ),
        (
            {"prompt": [USER]},
            {"prompt": [{**USER, "content": [{"type": "text", "text": "q"}]}]},
            "/prompt/0/content: expected a string, got a list of 1",
        ),
        ({"messages": [USER, FOUR]}, {"messages": [USER]}, "/messages: expected a message of the assistant to learn"),
        ({"messages": [USER, FOUR]}, {"messages": "hi"}, "/messages: expected a list of messages, got the string 'hi'"),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}, "/completion: expected text, got"),
        (
            {"prompt": [USER], "completion": [FOUR]},
            {"prompt": [USER], "completion": [FOUR, USER]},
            "/completion: expected a completion that begins and ends with the assistant, got assistant ... user",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a"},
            "/rejected: expected a column 'rejected', got none",
        ),
        (
            {"prompt": "q", "completion": "a", "label": True},
            {"prompt": "q", "completion": "a", "label": 1},
            "/label: expected true or false, got int 1",
        ),
        (
            {"prompt": "q", "completions": ["a"], "labels": [True]},
            {"prompt": "q", "completions": ["a", ""], "labels": [True]},
            "/labels: expected one label per completion, 2, got 1 labels\n.*/completions/1: expected text",
        ),
        (
            {"prompt": "q", "completions": ["a", "b"], "scores": [0, 1.5]},
            {"prompt": "q", "completions": ["a", "b", "c"], "scores": [0, True]},
            "/scores: expected one score per completion, 3, got 2 scores\n.*/scores/1: expected a finite number",
        ),
        (
            {"prompt": "q", "completions": ["a", "b"], "ranks": [2, 1]},
            {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]},
            "/ranks: expected completions of which one is better, got 2 alike",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            "/rejected: expected something else than chosen, got the same",
        ),
        ({"prompt": "q"}, {"prompt": "q", "tools": "{"}, "/tools: expected a JSON list of tools"),
        ({"prompt": "q"}, {"prompt": "q", "tools": ["add"]}, "/tools/0: expected an object"),
        (
            {"prompt": "q"},
            {"prompt": "q", "reward_model": {"style": "rule", "ground_truth": None}},
            "/reward_model/ground_truth: expected the answer that a rule compares with, got null",
        ),
    ],
)
def test_a_bad_row_is_named_by_place_path_and_what_was_expected(good, bad, message):
    with pytest.raises(DataError, match=f"list:2:{message}"):
        check_rows(read_rows([good, bad, good]), FORMATS)


def test_unreadable_lines_and_bad_rows_are_reported_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\nnot json\n{"text": "b"}\n')
    with pytest.raises(
        DataError, match=r"^2 problems \(wrong type 1, invalid JSON 1\)\nrows.jsonl:2:/text: .*\nrows.jsonl:3: "
    ):
        check_rows(read_rows(path), TEXT)


def test_twenty_problems_are_shown_and_all_are_counted():
    rows = read_rows([{"prompt": "q"}] + [{"prompt": ""}] * 25 + [{"prompt": 3}] * 5)
    with pytest.raises(DataError) as caught:
        check_rows(rows, PROMPT)
    assert len(caught.value.problems) == 20
    assert caught.value.counts == {"empty prompt": 25, "wrong type": 5}
    lines = str(caught.value).splitlines()
    assert lines[0] == "30 problems (empty prompt 25, wrong type 5)"
    assert lines[1] == "list:2:/prompt: expected text, got the string ''"
    assert lines[-1] == "... and 10 more"


def test_required_columns_are_needed_in_every_row():
    with pytest.raises(DataError, match="list:2:/answer: expected a column 'answer', got none"):
        check_rows(read_rows([{"prompt": "q", "answer": "4"}, {"prompt": "q"}]), PROMPT, required=("answer",))


def test_extra_columns_are_refused_where_the_caller_names_those_it_knows():
    rows = read_rows([{"text": "a", "id": 1, "source": "web"}])
    check_rows(rows, TEXT)
    check_rows(rows, TEXT, optional=("source",))
    with pytest.raises(DataError, match="list:1:/source: expected only id, text, tools, got one more"):
        check_rows(rows, TEXT, optional=())


def test_ids_must_differ():
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": "1"}, {"text": "c"}, {"text": "d", "id": 1}, {"text": "e"}]
    with pytest.raises(DataError, match=r"^list:4:/id: expected an id of its own, got that of list:1$"):
        check_rows(read_rows(rows), TEXT)
    check_rows(read_rows(rows), TEXT, id_column="task_id")


def test_split_rows_sets_bad_rows_aside_with_their_reasons(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \xff}\n{"text": ""}\n{"text": "b"}\n')
    accepted, rejected = split_rows(read_rows(path), TEXT)
    assert list(accepted) == [{"text": "a"}, {"text": "b"}]
    assert accepted.place(1) == "rows.jsonl:4"
    assert [(each.place, each.row) for each in rejected] == [
        ("rows.jsonl:2", '{"text": \\xff}'),
        ("rows.jsonl:3", '{"text": ""}'),
    ]
    assert [str(problem) for problem in rejected[1].problems] == [
        "rows.jsonl:3:/text: expected text, got the string ''"
    ]


def test_splitting_away_every_row_is_an_error():
    with pytest.raises(DataError, match="2 problems"):
        split_rows(read_rows([{"text": ""}, {"text": " "}]), TEXT)


def test_a_question_in_both_files_is_found():
    train = read_rows([{"prompt": "q1", "completion": "a"}, {"prompt": "q2", "completion": "b"}])
    held_out = read_rows([{"prompt": "q3", "completion": "a"}, {"prompt": " q2\n", "completion": "other"}])
    (problem,) = find_overlap(train, held_out, PROMPT_COMPLETION)
    assert str(problem) == "list:2:/prompt: expected a question not trained on, got that of list:2"
    assert find_overlap(train, held_out[:1], PROMPT_COMPLETION) == []


def test_conversations_overlap_when_all_before_the_last_answer_agrees():
    train = read_rows([{"messages": [USER, FOUR]}])
    other_answer = {"role": "assistant", "content": "4"}
    assert len(find_overlap(train, read_rows([{"messages": [USER, other_answer]}]), MESSAGES)) == 1
    assert find_overlap(train, read_rows([{"messages": [SYSTEM, USER, FOUR]}]), MESSAGES) == []


def test_an_error_survives_pickling():
    with pytest.raises(DataError) as caught:
        check_rows(read_rows([{"prompt": "q"}] + [{"prompt": ""}] * 25), PROMPT)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_gsm8k_passes_and_its_halves_do_not_overlap(shared_data):
    columns = {"prompt": "question", "completion": "answer"}
    rows = read_rows(shared_data / "gsm8k" / "train.jsonl", columns=columns)
    format = check_rows(rows, (TEXT, MESSAGES, PROMPT_COMPLETION), optional=())
    assert format == PROMPT_COMPLETION
    assert find_overlap(rows[:7000], rows[7000:], format) == []
    assert len(find_overlap(rows, rows[:10], format)) == 10


repeatable = settings(derandomize=True, deadline=None)
short_text = st.text("ab {}\n\ud800é", max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | short_text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(short_text, children, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["prompt", "completion", "chosen", "rejected", "messages", "label", "labels", "completions", "tools"]
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls"]), json_values | st.sampled_from(["user", "assistant"])
    )
)


@repeatable
@given(st.dictionaries(names, json_values | messages, max_size=4), st.sampled_from(GOOD))
def test_any_json_row_passes_or_is_refused_by_a_sentence(row, good):
    rows = read_rows([good, {**good, **row}])
    accepted, rejected = split_rows(rows[:1], FORMATS)
    assert (len(accepted), rejected) == (1, [])
    accepted, rejected = split_rows(rows, (detect_format(rows[:1]),))
    assert len(accepted) + len(rejected) == 2
    assert all(str(problem).startswith("list:2:/") for each in rejected for problem in each.problems)


@repeatable
@given(st.binary(max_size=40), st.sampled_from([PROMPT, PREFERENCE]))
def test_any_bytes_are_read_or_refused_by_a_sentence(tmp_path_factory, noise, format):
    path = tmp_path_factory.mktemp("noise") / "rows.jsonl"
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}).encode()
    path.write_bytes(good + b"\n" + noise + b"\n" + good)
    rows = read_rows(path)
    assert len(rows) == 2 + 1 + noise.count(b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        check_rows(rows, format)
