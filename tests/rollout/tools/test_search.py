from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastrl.rollout.tools.search import Search, best, make_index

TEXTS = ["red apple", "green apple tree", "blue sky"]


def corpus(folder: Path, *rows: object) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_the_score_is_bm25() -> None:
    # "apple" is in 2 of 3 documents: idf = log(1 + 1.5 / 2.5); mean length 7 / 3.
    idf = math.log(1.6)
    expected = [(d, idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * n / (7 / 3)))) for d, n in ((0, 2), (1, 3))]
    found = make_index(TEXTS).postings["apple"]
    assert [document for document, _ in found] == [0, 1]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_the_best_come_first_and_equal_ones_in_order() -> None:
    index = make_index(TEXTS)
    assert best(index, "Apple!", 3) == ["red apple", "green apple tree"]
    assert best(index, "blue apple", 1) == ["blue sky"]
    assert best(make_index(["a b", "a c"]), "a", 2) == ["a b", "a c"]
    assert best(index, "cloud", 3) == []


def test_the_tool_shows_titles_and_says_when_nothing_fits(tmp_path: Path) -> None:
    tool = Search(corpus(tmp_path, {"title": "Ann", "text": "lives in Rome"}, {"text": "Rome is old"}), top_k=2)
    assert tool.search("ann rome") == "Ann: lives in Rome\nRome is old"
    assert tool.search("Paris") == "No document has these words."


def test_a_corpus_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a corpus that is a JSONL file"):
        Search(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r'row 2 of .* needs a "text"'):
        Search(corpus(tmp_path, {"text": "a"}, {"title": "b"}))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(ValueError, match=r"row 2 of .*broken.jsonl is not JSON"):
        Search(str(tmp_path / "broken.jsonl"))
    with pytest.raises(ValueError, match="top_k of at least 1"):
        Search(corpus(tmp_path, {"text": "a"}), top_k=0)
