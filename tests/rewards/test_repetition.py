from __future__ import annotations

import pytest

from fastrl.rewards import Repetition


def test_the_penalty_is_the_share_of_n_grams_that_occurred_before() -> None:
    texts = ["a b c d", "a b a b a", "no", "Ha ha ha ha ha"]
    # pairs: 3 of 3 distinct; 2 of 4 distinct; none; 1 of 4 distinct
    assert Repetition(ngram_size=2, max_penalty=-0.5)(texts) == [0.0, -0.25, 0.0, -0.375]


def test_options_out_of_range_are_refused() -> None:
    for options in ({"ngram_size": 0}, {"max_penalty": 0.5}, {"max_penalty": float("nan")}):
        with pytest.raises(ValueError, match="ngram_size of at least 1 and max_penalty of at most 0"):
            Repetition(**options)  # type: ignore[arg-type]
