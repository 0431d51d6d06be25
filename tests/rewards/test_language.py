from __future__ import annotations

import pytest

from fastrl.rewards import Language


def test_a_text_in_one_language_gets_one_and_in_another_script_nothing() -> None:
    english = "The sum of the first two numbers is 12, so there are 3 left."
    german = "Die Summe der ersten zwei Zahlen ist 12, also sind es noch 3."
    chinese = "前两个数字之和是12。"
    assert Language("en")([english, chinese, "12 + 3 = 15", ""]) == [1.0, 0.0, 1.0, 1.0]
    assert Language("zh")([english, chinese]) == [0.0, 1.0]
    assert Language("de")([german])[0] > 0.99
    assert Language("de")([english])[0] < 0.3
    assert Language("en")([german])[0] < 0.3
    assert Language("ja")(["これはテストです", "Test"]) == [1.0, 0.0]
    assert Language("ru")(["Это проверка"]) == [1.0]


def test_mixed_text_earns_its_share_of_letters_times_its_share_of_stop_words() -> None:
    assert Language("ru")(["да yes"]) == [2 / 5]
    assert Language("en")(["the und"]) == [1 / 2]  # all letters are Latin; one of two stop words is English
    assert Language("en")(["the 和"]) == [3 / 4]


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of en, de, .*got 'xx'"):
        Language("xx")
