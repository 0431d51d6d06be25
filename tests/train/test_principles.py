"""A constitution as data: what is read, what is drawn, and which answers become a pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.train.principles import Answer, Principle, drawn, read_principles, revised_pairs, scored_pair


def test_principles_are_texts_or_have_names(tmp_path: Path) -> None:
    path = tmp_path / "principles.yaml"
    path.write_text("- Be honest.\n- {name: kind, text: Be kind.}\n- {text: Be brief.}\n")
    assert read_principles(str(path)) == [
        Principle("Be honest.", "Be honest."),
        Principle("kind", "Be kind."),
        Principle("Be brief.", "Be brief."),
    ]
    for content, sentence in (
        ("{a: b}", "must be a list"),
        ("[]", "must be a list"),
        ("[1]", "principle 1: must be a text"),
        ("- x\n- {name: y}", "principle 2: must be"),
        ("- {text: x, weight: 2}", "principle 1: must be"),
        ("[", "is no YAML"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            read_principles(str(path))


def test_a_prompt_has_the_same_principle_in_every_run_and_all_are_drawn() -> None:
    known = [Principle(str(i), str(i)) for i in range(3)]
    first = [drawn(known, seed=1, ordinal=i) for i in range(60)]
    assert first == [drawn(known, seed=1, ordinal=i) for i in range(60)]
    assert first != [drawn(known, seed=2, ordinal=i) for i in range(60)]
    assert set(first) == set(known)


def test_the_best_meets_the_worst_of_the_answers_that_can_be_trained_on() -> None:
    answers = [
        Answer("a", True, 0, score=0.2),
        Answer("b", True, 1, "why", score=0.9),
        Answer("c", True, 2, score=0.5),
        Answer("cut", False, 3, score=1.0),
        Answer(" ", True, 4, score=1.0),
        Answer("nobody knows", True, 5),
        Answer(" b", True, 6, score=0.0),  # said before
    ]
    assert scored_pair(answers, min_margin=0.0) == (answers[1], answers[0])
    assert scored_pair(answers, min_margin=0.75) is None
    assert scored_pair(answers[:1], min_margin=0.0) is None
    assert scored_pair([Answer("a", True, 0, score=0.5), Answer("b", True, 1, score=0.5)], min_margin=0.0) is None


def test_the_last_revision_meets_its_own_draft_when_they_differ() -> None:
    answers = [
        Answer("a", True, 0),
        Answer("b", True, 1),
        Answer("cut", False, 2),
        Answer("a1", True, 0, "x"),
        Answer("b", True, 1, "fine"),
        Answer("a2", True, 0, "y"),
        Answer("c1", True, 2, "z"),
    ]
    assert revised_pairs(answers) == [(answers[5], answers[0])]
