"""One environment of one episode, behind requests and answers that JSON can hold: it may live in another process.

    {"reset": {column: value}}          -> {"observation": text or null}
    {"calls": [[name, arguments], ...]} -> {"results": [[text, is_error], ...], "reward": of the turn, or null}
    {"said": message, "is_cut": bool}   -> {"messages": [message, ...] or null, "reward": as above}
    {"finish": true}                    -> {"reward": number, null or {"fault": text}, "state": {attribute: value}}

The convention is TRL's: a class with `reset(**columns)`, whose other public methods are the tools, and an optional
`get_reward()`. Ours beside it, all optional: `get_turn_reward()`, asked after each turn; `get_reply(message)`, asked in
place of the tools, whose messages follow the turn, and which ends the episode with None; `get_tool_schemas()` for the
tools that it runs. All may be `async`. An error in a tool is the tool's result, which the model sees; any other error
ends the episode.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tool = Callable[..., Any]

LARGEST = (2 - 2**-23) * 2.0**127  # float32, in which rewards are summed

NOT_TOOLS = ("reset", "get_reward", "get_turn_reward", "get_reply", "get_tool_schemas")


class Environment:
    """Owns an instance of the user's class (None when there are only plain tools) and answers requests about it."""

    def __init__(self, instance: Any, tools: Sequence[Tool]) -> None:
        self._instance = instance
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tools = {tool.__name__: tool for tool in [*tools, *methods_of(instance)]}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked; what `reset` and `get_turn_reward` raise goes through."""
        if "reset" in request:
            return {"observation": self._reset(request["reset"])}
        if "calls" in request:
            results = [self.call(name, arguments) for name, arguments in request["calls"]]
            return {"results": results, "reward": self._turn_reward()}
        if "said" in request:
            messages = self._awaited(self._instance.get_reply({**request["said"], "is_cut": request["is_cut"]}))
            return {"messages": _messages(messages), "reward": self._turn_reward()}
        return {"reward": self._reward(), "state": _state(self._instance)}

    def close(self) -> None:
        """Release the event loop of async methods; a second call does nothing."""
        if self._loop is None or self._loop.is_closed():
            return
        waiting = asyncio.all_tasks(self._loop)  # what methods have begun and left
        for task in waiting:
            task.cancel()
        if waiting:
            self._loop.run_until_complete(asyncio.wait(waiting))
        self._loop.close()

    def has(self, name: str) -> bool:
        """Whether there is a tool of this name."""
        return name in self._tools

    def _reset(self, columns: Mapping[str, Any]) -> str | None:
        if self._instance is None:
            return None
        reset = self._instance.reset
        observation = self._awaited(reset(**{name: columns[name] for name in reset_columns(reset, columns)}))
        if observation is not None and not isinstance(observation, str):
            raise TypeError(f"reset must return None or text, got {type(observation).__name__}")
        return observation

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """What a tool says, as text, and whether it is an error."""
        try:
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            return str(self._awaited(self._tools[name](**arguments))), False
        except Exception as error:  # the tool's own, or arguments it does not take: the model is to see it
            return str({"error": str(error)}), True

    def _turn_reward(self) -> float | None:
        method = getattr(self._instance, "get_turn_reward", None)
        return None if method is None else _number(self._awaited(method()), "get_turn_reward")

    def _reward(self) -> float | dict[str, str] | None:
        method = getattr(self._instance, "get_reward", None)
        if method is None:
            return None
        try:
            return _number(self._awaited(method()), "get_reward")
        except Exception:  # a failure of this one reward, as of any reward function
            return {"fault": traceback.format_exc()}

    def _awaited(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        # One loop for the whole life: clients that a method opens belong to the loop they were opened in.
        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(value)


def methods_of(instance: Any) -> list[Tool]:
    """The tools of an instance or a class: its public methods but those of the convention, by name as TRL has them."""
    owner = instance if isinstance(instance, type) else type(instance)
    # A class method is no function, and a static one is: both are the author's tools.
    names = [name for name, _ in inspect.getmembers(owner, inspect.isroutine) if _is_own(owner, name)]
    return [] if instance is None else [getattr(instance, name) for name in names if name not in NOT_TOOLS]


def _is_own(owner: type, name: str) -> bool:
    """Whether a public attribute was written as a method: what a builtin base brings (of `dict`, say) is no tool."""
    found = inspect.getattr_static(owner, name)
    return not name.startswith("_") and (inspect.isfunction(found) or isinstance(found, classmethod | staticmethod))


def reset_columns(reset: Callable[..., Any], columns: Mapping[str, Any]) -> list[str]:
    """The columns that `reset` takes: those it names, or all of them when it takes `**columns`."""
    parameters = inspect.signature(reset).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return list(columns)
    return [name for name in columns if name in {each.name for each in parameters}]


def missing_columns(reset: Callable[..., Any], columns: Sequence[str]) -> list[str]:
    """The columns that `reset` needs, having no default for them, and a row does not have."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        each.name
        for each in inspect.signature(reset).parameters.values()
        if each.kind in named
        and each.default is inspect.Parameter.empty
        and each.name not in columns
        and each.name != "self"
    ]


def _number(value: Any, method: str) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{method} returned {number}, which is not a finite float32")
    return number


def _messages(reply: Any) -> list[dict[str, str]] | None:
    """What `get_reply` returned, with the keys that templates read; its faults are the environment's."""
    if reply is None:
        return None
    if not isinstance(reply, list | tuple):
        raise TypeError(f"get_reply must return a list of messages or None, got {type(reply).__name__}")
    found = []
    for message in reply:
        needed = ("role", "content", "name") if _is_tools(message) else ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in needed):
            raise TypeError(f"get_reply must return messages whose {', '.join(needed)} are text, got {message!r:.200}")
        found.append({key: message[key] for key in needed})
    return found


def _is_tools(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "tool"


def _state(instance: Any) -> dict[str, Any]:
    """Public attributes that JSON holds: what reward functions may read of an environment whose episode is over."""
    found = {}
    for name, value in getattr(instance, "__dict__", {}).items():
        if not name.startswith("_"):
            try:
                found[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError, RecursionError):
                continue
    return found
