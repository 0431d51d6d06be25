"""Environments of the package verifiers, small enough to follow by hand."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": "How many times?", "answer": str(n), "info": {"secret": n}} for n in (1, 2)]


def press(times: int) -> int:
    """Presses the button.

    Args:
        times: how often.
    """
    if times < 0:
        raise ValueError("no unpressing")
    return 10 * times


def push() -> int:
    """Pushes the button."""
    return 3


def told(completion: Any, answer: str) -> float:
    """1 when the last message holds the answer."""
    return float(answer in str(completion[-1].content))


def tools() -> vf.Environment:
    return vf.ToolEnv(dataset=Dataset.from_list(ROWS), tools=[press], max_turns=4, rubric=vf.Rubric(funcs=[told]))


def button() -> vf.Environment:
    def pushed(completion: Any) -> float:
        return float(any(message.role == "tool" for message in completion))

    return vf.ToolEnv(dataset=Dataset.from_list(ROWS), tools=[push], max_turns=3, rubric=vf.Rubric(funcs=[pushed]))


class Secret(vf.StatefulToolEnv):
    """A tool with an argument that the model neither sees nor gives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_tool(self.reveal, args_to_skip=["secret"])

    def reveal(self, secret: int) -> int:
        """Reveals the secret."""
        return secret

    async def setup_state(self, state: vf.State, **_: Any) -> vf.State:
        state["secret"] = 7 * state["info"]["secret"]
        return state

    def update_tool_args(self, tool_name: str, tool_args: dict, messages: Any, state: vf.State, **_: Any) -> dict:
        return {**tool_args, "secret": state["secret"]}


def stateful() -> vf.Environment:
    return Secret(dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[told]))


class Echo(vf.MultiTurnEnv):
    """Repeats what it is told as the user, until it hears "stop"."""

    @vf.stop
    async def heard_stop(self, state: vf.State) -> bool:
        said = state["trajectory"]
        return bool(said) and "stop" in str(said[-1]["completion"][-1].content)

    async def env_response(self, messages: Any, state: vf.State, **_: Any) -> Any:
        if "break" in str(messages[-1].content):
            raise vf.InfraError("the line is dead")
        return [vf.UserMessage(content=f"You said {messages[-1].content}")]


def echo(max_turns: int = 3) -> vf.Environment:
    n_turns = lambda state: float(len(state["trajectory"]))  # noqa: E731
    return Echo(dataset=Dataset.from_list(ROWS), max_turns=max_turns, rubric=vf.Rubric(funcs=[n_turns]))


def groups() -> vf.Environment:
    def best(completions: list[Any]) -> list[float]:
        return [0.0 for _ in completions]

    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[best]))


def text() -> str:
    return "no environment"
