"""The convention: what is a tool, what reset gets, what an error is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastrl.rollout.environment import Environment, methods_of, missing_columns


class Counter:
    """An environment with sync and async methods."""

    def reset(self, start: int, **columns: Any) -> str:
        self.count, self.columns, self._secret = start, columns, object()
        self.lock = asyncio.Lock  # JSON does not hold it
        return f"at {start}"

    async def add(self, n: int) -> int:
        """
        Adds.

        Args:
            n: How much.
        """
        await asyncio.sleep(0)
        self.count += n
        return self.count

    def fail(self) -> None:
        raise ValueError("broken")

    async def get_reward(self) -> float:
        return self.count / 2

    def get_turn_reward(self) -> int:
        return self.count

    def _hidden(self) -> None: ...


def test_an_episode_from_reset_to_reward() -> None:
    environment = Environment(Counter(), [])
    assert environment.answer({"reset": {"start": 3, "other": "x"}}) == {"observation": "at 3"}
    answer = environment.answer(
        {"calls": [["add", {"n": 2}], ["fail", {}], ["add", {"m": 2}], ["reset", {"start": 0}]]}
    )
    texts = [text for text, _ in answer["results"]]
    assert texts[:2] == ["5", "{'error': 'broken'}"]
    assert "unexpected keyword argument" in texts[2]
    assert texts[3] == "{'error': 'Tool reset not found.'}"
    assert [is_error for _, is_error in answer["results"]] == [False, True, True, True]
    assert answer["reward"] == 5
    assert environment.answer({"finish": True}) == {"reward": 2.5, "state": {"count": 5, "columns": {"other": "x"}}}
    environment.close()


def test_tools_are_the_public_methods_by_name() -> None:
    assert [tool.__name__ for tool in methods_of(Counter())] == ["add", "fail"]
    assert methods_of(None) == []


def test_reset_gets_the_columns_it_names() -> None:
    class Named:
        def reset(self, a: int, b: int = 2) -> None:
            self.got = (a, b)

    environment = Environment(named := Named(), [])
    assert environment.answer({"reset": {"a": 1, "c": 9}}) == {"observation": None}
    assert named.got == (1, 2)
    assert missing_columns(Named.reset, ["c"]) == ["a"]
    assert missing_columns(Counter.reset, ["start"]) == []


def test_a_reward_that_fails_is_a_fault_and_no_number_is_refused() -> None:
    class Bad:
        reward: Any = float("nan")

        def reset(self) -> None: ...

        def get_reward(self) -> Any:
            return self.reward

    environment = Environment(bad := Bad(), [])
    assert "not a finite float32" in environment.answer({"finish": True})["reward"]["fault"]
    bad.reward = "much"
    assert "ValueError" in environment.answer({"finish": True})["reward"]["fault"]
    bad.reward = None
    assert environment.answer({"finish": True})["reward"] is None


def test_what_reset_raises_and_returns_wrongly_goes_through() -> None:
    class Wrong:
        def reset(self) -> Any:
            return 3

    with pytest.raises(TypeError, match="reset must return None or text, got int"):
        Environment(Wrong(), []).answer({"reset": {}})


@pytest.mark.parametrize("value", [1e39, -1e200, float("inf"), float("nan")])
def test_a_reward_beyond_float32_is_refused(value: float) -> None:
    class Rich:
        def get_reward(self) -> float:
            return value

        def get_turn_reward(self) -> float:
            return value

    environment = Environment(Rich(), [])
    assert "not a finite float32" in environment.answer({"finish": True})["reward"]["fault"]
    with pytest.raises(ValueError, match=r"get_turn_reward returned .* which is not a finite float32"):
        environment.answer({"calls": []})


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("hello", "a list of messages or None, got str"),
        ({"role": "user", "content": "x"}, "got dict"),
        ([object()], "role, content are text"),
        ([{"content": "x"}], "role, content are text"),
        ([{"role": "user", "content": None}], "role, content are text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "role, content are text"),
        ([{"role": "tool", "content": "x"}], "role, content, name are text"),
    ],
)
def test_a_reply_that_is_no_message_is_the_environments_fault(reply: Any, says: str) -> None:
    class Speaking:
        def get_reply(self, message: dict[str, Any]) -> Any:
            return reply

    with pytest.raises(TypeError, match=says):
        Environment(Speaking(), []).answer({"said": {"role": "assistant", "content": ""}, "is_cut": False})


def test_a_reply_keeps_the_keys_that_templates_read() -> None:
    class Speaking:
        def get_reply(self, message: dict[str, Any]) -> Any:
            return ({"role": "tool", "content": "1", "name": "f", "more": 2}, {"role": "user", "content": "x", "n": 1})

    answer = Environment(Speaking(), []).answer({"said": {"role": "assistant", "content": ""}, "is_cut": False})
    assert answer["messages"] == [
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "user", "content": "x"},
    ]


def test_static_and_class_methods_are_tools_and_what_a_base_brings_is_none() -> None:
    class Mixed(dict[str, int]):
        kind = str

        @staticmethod
        def double(x: int) -> int:
            return 2 * x

        @classmethod
        def triple(cls, x: int) -> int:
            return 3 * x

        def plain(self, x: int) -> int:
            return x

    environment = Environment(Mixed(), [])
    assert [tool.__name__ for tool in methods_of(Mixed())] == ["double", "plain", "triple"]
    assert [tool.__name__ for tool in methods_of(Mixed)] == ["double", "plain", "triple"]
    results = environment.answer({"calls": [[name, {"x": 1}] for name in ("double", "triple", "plain")]})["results"]
    assert [text for text, _ in results] == ["2", "3", "1"]
