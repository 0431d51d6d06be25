from __future__ import annotations

import pytest

from fastrl.data.judgements import TEMPLATE, judgement_rows
from fastrl.data.problems import DataError


def said(rows):
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


def test_a_pair_makes_a_right_and_a_wrong_answer():
    rows = judgement_rows({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, template="{prompt} {completion} ?")
    assert said(rows) == [("2+2? 4 ?", "Yes"), ("2+2? 5 ?", "No")]
    assert [row["prompt"][0]["role"] for row in rows] == ["user", "user"]
    assert [row["completion"][0]["role"] for row in rows] == ["assistant", "assistant"]


def test_a_label_chooses_the_verdict_and_a_rationale_follows_it():
    row = {"prompt": "2+2?", "completion": "5", "label": False, "rationale": "2+2 is 4."}
    assert said(judgement_rows(row, template="{completion}")) == [("5", "No\n2+2 is 4.")]
    assert said(judgement_rows(row | {"rationale": None, "label": True}, verdicts=("+", "-")))[0][1] == "+"


def test_conversations_are_judged_by_their_contents_and_braces_in_them_are_text():
    chat = {
        "prompt": [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "{4}"}],
        "label": True,
    }
    ((question, _),) = said(judgement_rows(chat))
    assert question == TEMPLATE.format(prompt="Be {brief}.\n2+2?", completion="{4}")


@pytest.mark.parametrize(
    "row", [{"prompt": "q"}, {"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "chosen": "a"}]
)
def test_other_rows_are_refused(row):
    with pytest.raises(DataError, match="expected prompt, chosen, rejected, or prompt, completion and a label"):
        judgement_rows(row)
