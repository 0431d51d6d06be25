from __future__ import annotations

import time

import pytest

from fastrl.rewards import completion_text, final_answer


def test_a_message_list_is_read_at_its_last_message():
    assert completion_text([{"role": "assistant", "content": "18"}]) == "18"
    tools = [{"role": "assistant", "content": None}, {"role": "tool", "content": "7"}, {"content": "seven"}]
    assert completion_text(tools) == "seven"
    assert completion_text(tools[:1]) == ""
    assert completion_text([]) == ""


def test_content_made_of_parts_is_the_text_of_its_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": 1}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"


def test_a_completion_that_is_neither_text_nor_messages_is_refused():
    with pytest.raises(ValueError, match="a string or a list of messages, got int"):
        completion_text(18)
    with pytest.raises(ValueError, match="a string or a list of messages, got list"):
        completion_text([1, 2])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 18 \n", "18"),
        ("<think>17?</think> 18", "18"),
        ("17? </think> 18", "18"),  # the template opened the block
        ("<think>1</think><answer> 2 </answer>", "2"),
        ("<answer>1</answer> no: <answer>2</answer> bye", "2"),
        ("<answer>1", "<answer>1"),  # never closed: plain text
        ("<think>a</think> 1 <think> 2", None),
        ("<think> 18", None),
        ("", ""),
    ],
)
def test_the_final_answer_is_what_follows_the_reasoning(text, answer):
    assert final_answer(text) == answer


def test_hostile_tags_cost_linear_time():
    start = time.process_time()
    final_answer("<answer>" * 200_000)
    final_answer("</answer>" * 200_000)
    assert time.process_time() - start < 1.0
