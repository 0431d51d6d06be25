from __future__ import annotations

import time

import pytest

from fastrl.rewards import think_format


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think>b", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("Sure! <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> bye", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_only_one_reasoning_block_and_one_answer_block_score(text, value):
    assert think_format([text]) == [value]
    assert think_format([[{"role": "assistant", "content": text}]]) == [value]


def test_hostile_text_costs_linear_time():
    start = time.process_time()
    think_format([" " * 500_000, "<think>" + " " * 500_000, "<think>" * 100_000, "<think>a</think>" + " " * 500_000])
    assert time.process_time() - start < 1.0
