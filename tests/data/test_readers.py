from __future__ import annotations

import gzip
import sys

import pytest

from fastrl.data import DataError, apply_columns, read_rows


def written(tmp_path, content: bytes, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_jsonl_rows_know_their_lines(tmp_path):
    rows = read_rows(written(tmp_path, b'{"text": "one"}\r\n{"text": "zwei \xc3\xbc"}\n\n  \n'))
    assert list(rows) == [{"text": "one"}, {"text": "zwei ü"}]
    assert [rows.place(i) for i in range(2)] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert rows.raw(1) == '{"text": "zwei ü"}'


def test_a_line_separator_inside_a_string_is_not_the_end_of_a_line(tmp_path):
    (row,) = read_rows(written(tmp_path, '{"text": "a\u2028b\x85c"}'.encode()))
    assert row == {"text": "a\u2028b\x85c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"rows.jsonl:2: expected one JSON object on the line, got Expecting .* at column \d+"),
        (b'\xef\xbb\xbf{"text": "a"}', "rows.jsonl:2: expected UTF-8 without a byte order mark"),
        (b'{"text": "\xe9"}', r"rows.jsonl:2: expected UTF-8, got byte 0xe9 at byte 11"),
        (b"", r"rows.jsonl:2: expected a JSON object \(blank lines are allowed at the end only\), got a blank line"),
        (b"[1, 2]", "rows.jsonl:2: expected a JSON object, got a list of 2"),
        (b"null", "rows.jsonl:2: expected a JSON object, got null"),
        (b'{"a": 1}{"a": 2}', "rows.jsonl:2: expected one JSON object on the line, got Extra data at column 9"),
        (b'{"a": NaN}', "rows.jsonl:2: .* got NaN, which is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "rows.jsonl:2: .* got the key 'b' twice in one object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "rows.jsonl:2: .* got Exceeds the limit"),
        (b"[" * 200_000, "rows.jsonl:2: .* got .*recursion"),
    ],
)
def test_a_bad_line_raises_when_it_is_read_and_spares_its_neighbours(tmp_path, line, message):
    rows = read_rows(written(tmp_path, b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n'))
    with pytest.raises(DataError, match=message):
        rows[1]
    assert (rows[0], rows[2]) == ({"text": "one"}, {"text": "three"})


def test_max_rows_reads_the_first_rows_only_and_keeps_a_blank_one(tmp_path):
    path = written(tmp_path, b'{"text": "one"}\n\n{"text": "three"}\n\n')
    assert list(read_rows(path, max_rows=1)) == [{"text": "one"}]
    with pytest.raises(DataError, match="blank line"):
        list(read_rows(path, max_rows=2))
    assert len(read_rows(path, max_rows=4)) == 3
    assert list(read_rows([{"a": 1}, {"a": 2}], max_rows=1)) == [{"a": 1}]
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        read_rows(path, max_rows=0)


def test_gzipped_jsonl_is_read_and_a_cut_file_is_refused(tmp_path):
    packed = gzip.compress(b'{"text": "one"}\n' * 100)
    assert len(read_rows(written(tmp_path, packed, "rows.jsonl.gz"))) == 100
    for broken in (packed[:-9], b"not gzip"):
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz: expected a whole gzip file"):
            read_rows(written(tmp_path, broken, "cut.jsonl.gz"))


def test_files_that_are_not_there_or_not_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: expected a data file, got no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="got a directory"):
        read_rows(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match=r"expected a \.jsonl, \.jsonl\.gz or \.parquet file"):
        read_rows(str(written(tmp_path, b"a,b\n", "rows.csv")))
    with pytest.raises(DataError, match=r"choose one of \['train', 'test'\]"):
        read_rows({"train": [], "test": []})
    with pytest.raises(DataError, match="an object with a length and rows by index"):
        read_rows(iter([{"text": "one"}]))


def test_an_empty_file_has_no_rows(tmp_path):
    assert len(read_rows(written(tmp_path, b""))) == 0


class Table:
    """Like `datasets.Dataset`: rows by integer index, no list."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < 3:
            raise IndexError(index)
        return {"question": f"q{index}"}


def test_any_object_with_a_length_and_an_index_is_a_source():
    rows = read_rows(Table(), columns={"prompt": "question"})
    assert list(rows) == [{"prompt": "q0"}, {"prompt": "q1"}, {"prompt": "q2"}]
    assert rows.place(2) == "Table:3"
    assert rows[-1] == {"prompt": "q2"}


def test_slices_and_selections_keep_their_places():
    rows = read_rows([{"n": i} for i in range(10)])
    assert [row["n"] for row in rows[4:8]] == [4, 5, 6, 7]
    assert rows[4:8].select([3, 0]).place(0) == "list:8"
    assert rows[4:8].select([3, 0])[1] == {"n": 4}


def test_reading_a_row_never_changes_the_source():
    source = [{"question": "q"}]
    read_rows(source)[0]["question"] = "changed"
    assert source == [{"question": "q"}]


def test_a_row_that_is_no_mapping_is_refused_with_its_place():
    with pytest.raises(DataError, match="list:2: expected an object with named columns, got int 7"):
        list(read_rows([{"text": "one"}, 7]))


def test_columns_rename_and_one_column_may_serve_twice():
    row = {"question": "q", "answer": "a", "prompt": "old"}
    assert apply_columns(row, {"prompt": "question"}) == {"answer": "a", "prompt": "q"}
    assert apply_columns(row, {"prompt": "question", "question": "question"}) == {
        "answer": "a",
        "prompt": "q",
        "question": "q",
    }
    assert apply_columns(row, {"question": "answer", "answer": "question"})["question"] == "a"


def test_a_renamed_column_that_is_missing_is_named_with_what_is_there():
    rows = read_rows([{"question": "q", "answer": "a"}], columns={"prompt": "problem"})
    with pytest.raises(DataError, match=r"list:1:/problem: .* renames, got only 'question', 'answer'"):
        rows[0]


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 2+2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0, "split": "train"},
}


def test_verl_rows_show_their_ground_truth_as_a_column():
    assert read_rows([VERL])[0] == {**VERL, "ground_truth": "4"}
    assert read_rows([VERL], columns={"answer": "ground_truth"})[0]["answer"] == "4"
    assert read_rows([{**VERL, "ground_truth": "5"}])[0]["ground_truth"] == "5"


def test_parquet_round_trips_verl_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading parquet needs pyarrow")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([VERL] * 5000), path)
    rows = read_rows(path, columns={"answer": "ground_truth"})
    assert len(rows) == 5000
    assert rows[4999] == {**VERL, "answer": "4"}
    assert rows.place(4999) == "rows.parquet:5000"
    assert len(read_rows(path, max_rows=3)) == 3
    with pytest.raises(DataError, match=r"bad\.parquet: expected a whole parquet file"):
        read_rows(written(tmp_path, path.read_bytes()[:-20], "bad.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match="pip install pyarrow"):
        read_rows(written(tmp_path, b"PAR1", "rows.parquet"))


def test_the_shared_files_are_read_whole(shared_data):
    rows = read_rows(shared_data / "gsm8k" / "train.jsonl", columns={"prompt": "question"})
    assert len(rows) == 7473
    assert all("####" in row["answer"] for row in rows)
    assert len(read_rows(shared_data / "humaneval" / "HumanEval.jsonl.gz")) == 164
