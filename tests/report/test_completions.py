from __future__ import annotations

import pytest

from fastrl.report import CompletionSample, CompletionsLog, read_completions, read_log, samples_of
from fastrl.report.completions import shown_text, visible
from fastrl.rewards import Reward, score


def test_samples_are_spread_over_the_batch_and_carry_what_the_rewards_said():
    def first(completions, log_extra):
        log_extra("initial", [completion[0] for completion in completions])
        return [index if index != 4 else None for index in range(8)]

    completions = list("abcdefgh")
    scores = score([Reward(first)], ["p"] * 8, completions, [[1]] * 8, {})
    samples = samples_of(["p"] * 8, completions, ["first"], scores, count=2, advantages=[0.5] * 8)
    assert samples == [
        CompletionSample("p", "a", {"first": 0.0}, 0.0, 0.5, {"initial": "a"}),
        CompletionSample("p", "e", {"first": None}, None, 0.5, {"initial": "e"}),
    ]
    assert len(samples_of(["p"] * 8, completions, ["first"], scores, count=99)) == 8
    assert samples_of(["p"] * 8, completions, ["first"], scores, count=0) == []


def test_samples_come_back_as_they_were_written(tmp_path, opened):
    path = tmp_path / "completions.jsonl"
    messages = [{"role": "user", "content": "q\u2028\ud800"}]  # a lone surrogate is not UTF-8
    sample = CompletionSample(messages, "a\nb\x00é", {"r": 1.0, "s": None}, 0.5, -1.25, {"n": 3, "tags": ["x"]})
    log = opened(CompletionsLog(path))
    log.write(4, [sample, sample])
    assert read_completions(path) == [(4, sample), (4, sample)]
    log.truncate_to(log.offset)
    assert len(path.read_text().splitlines()) == 2


def test_values_that_json_does_not_know_do_not_stop_a_run(tmp_path, opened):
    path = tmp_path / "completions.jsonl"
    opened(CompletionsLog(path)).write(
        1, [CompletionSample("p", "c", {}, 1.0, float("nan"), {"a": {1}, "b": float("inf")})]
    )
    record = read_log(path)[0]
    assert record["advantage"] is None
    assert record["extra"] == {"a": "{1}", "b": "inf"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢\n\ttext", "plain é 漢\n\ttext"),
        ("\x1b[2Jgone\x07\r", "\\x1b[2Jgone\\x07\\r"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("\x9b31m\ud800", "\\x9b31m\\ud800"),
    ],
)
def test_text_that_could_act_on_a_terminal_is_spelled_out(text, shown):
    assert visible(text) == shown
    visible(text).encode()


def test_messages_are_shown_with_their_roles():
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": None}, "odd"]
    assert shown_text(messages) == "[system] s\n[assistant] \nodd"
    assert shown_text(18) == "18"
