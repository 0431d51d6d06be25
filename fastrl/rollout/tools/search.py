"""Search in a small corpus by BM25, for agents that look things up.

    score(q, d) = sum over words w of q: idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(w) = log(1 + (N - n + 1/2) / (n + 1/2)),    n documents of N have w,    tf times in d

Source: Robertson, Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", sec. 3.2; the idf with
1 + ... inside the logarithm, which is never negative, is Lucene's.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Index:
    """A corpus ready to search.

    Attributes:
        texts: as they are shown.
        postings: word -> (document, its part of the score), idf included.
    """

    texts: tuple[str, ...]
    postings: dict[str, list[tuple[int, float]]]


class Search:
    """A search tool over a JSONL file of `{"text": ..., "title": ...}` rows; the title may be left out.

    Args:
        corpus: the file.
        top_k: documents per answer.
    """

    def __init__(self, corpus: str, *, top_k: int = 3) -> None:
        check_options(corpus, top_k=top_k)
        self._index = read_index(corpus)
        self._top_k = top_k

    def search(self, query: str) -> str:
        """
        Searches the documents for words.

        Args:
            query: The words to look for.

        Returns:
            The documents that fit best, one per line.
        """
        found = best(self._index, query, self._top_k)
        return "\n".join(found) if found else "No document has these words."


def check_options(corpus: object, *, top_k: object = 3) -> None:
    """Refuse what no search can be made of.

    Raises:
        ValueError: no file of that name, or not a positive number of documents.
    """
    if not isinstance(corpus, str) or not Path(corpus).is_file():
        raise ValueError(f"search needs a corpus that is a JSONL file, got {corpus!r}, which is none")
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"search needs top_k of at least 1, got {top_k!r}")


def best(index: Index, query: str, count: int) -> list[str]:
    """The `count` documents with the highest scores above 0; of equal ones the first in the corpus."""
    score: Counter[int] = Counter()
    for word in _words(query):
        for document, part in index.postings.get(word, ()):
            score[document] += part  # type: ignore[assignment]
    order = sorted(score, key=lambda document: (-score[document], document))
    return [index.texts[document] for document in order[:count]]


@lru_cache(maxsize=8)
def read_index(corpus: str) -> Index:
    """Read and index a file once, whatever the number of environments.

    Raises:
        ValueError: the file is not there, or a row has no text.
    """
    texts = []
    try:
        lines = Path(corpus).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"search: the corpus {corpus} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"search: row {number} of {corpus} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'search: row {number} of {corpus} needs a "text", got {line[:80]}')
        texts.append(f"{row['title']}: {row['text']}" if row.get("title") else row["text"])
    if not texts:
        raise ValueError(f"search: the corpus {corpus} has no rows")
    return make_index(texts)


def make_index(texts: list[str]) -> Index:
    """Index documents; see the module's docstring."""
    counts = [Counter(_words(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean = max(1.0, sum(lengths) / len(texts))
    having = Counter(word for count in counts for word in count)
    postings: dict[str, list[tuple[int, float]]] = {word: [] for word in having}
    for document, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for word, tf in count.items():
            idf = math.log(1 + (len(texts) - having[word] + 0.5) / (having[word] + 0.5))
            part = idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * length / mean))
            postings[word].append((document, part))
    return Index(tuple(texts), postings)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
