"""Environments of the package `verifiers` (0.1.14 to 0.3): its own loop runs, and what it takes for a client is us.

    verifiers' rollout:  prompt -> client.get_response -> stop? -> env_response -> client.get_response -> ...

Its loop waits in `get_response` while the policy samples, so setup, stop conditions, tools, clean-up and rubric are the
package's. What it puts between two answers is the environment's reply. Version 0.4 has no environment that hands its
turns to a client object: it calls the model over HTTP, by text, and what was sampled would not be what is trained.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FIRST, END = (0, 1, 14), (0, 4)  # versions that run: from the first, below the end


class Verifiers:
    """One environment of the package, for one episode after another; see `fastrl.rollout.environment`.

    Args:
        id: as `verifiers.load_environment` takes it, or file.py:function or package.module:function that makes one.
        options: keyword arguments of what makes it.

    Raises:
        ValueError: no such environment, one that does not take turns, or rewards over whole groups.
        RuntimeError: the package is not installed, or of a version that cannot be run.
    """

    def __init__(self, *, id: str, options: Mapping[str, Any] | None = None) -> None:
        self._environment = loaded(id, options or {})
        self._turns: Any = None
        self._rollout: asyncio.Task[Any] | None = None
        self._known: list[Any] = []

    async def reset(self, **columns: Any) -> str | None:
        """Begin an episode with a row of the environment's dataset; what it adds to the last message is returned."""
        await self._ended()
        row = {"example_id": 0, "answer": "", **columns}
        self._turns = _client()
        model, sampling = "policy", dict[str, Any]()
        self._rollout = asyncio.ensure_future(self._environment.rollout(row, self._turns, model, sampling))
        opened = await self._asked()
        if opened is None:
            raise RuntimeError("the environment ended before the first turn")
        self._known = opened
        return _added([_plain(each) for each in opened], columns["prompt"])

    async def get_reply(self, message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """What the environment says to a turn; None when the turn was the last."""
        calls = [] if message["is_cut"] else message.get("tool_calls", ())
        names = [call["function"]["name"] for call in calls]
        self._turns.answers.put_nowait(_response(message, calls, is_cut=message["is_cut"]))
        prompt = await self._asked()
        if prompt is None:
            return None
        n_known = len(self._known)
        if len(prompt) <= n_known + 1 or prompt[:n_known] != self._known or prompt[n_known].role != "assistant":
            raise RuntimeError("the environment rewrites its history; what was sampled would not be what is trained")
        self._known = prompt
        return [_plain(each, names) for each in prompt[n_known + 1 :]]

    async def get_reward(self) -> float:
        """The rubric's weighted sum."""
        state = await self._ended()
        rubric = self._environment.rubric
        await rubric.score_rollout(state)
        await rubric.cleanup(state)
        return float(state["reward"])

    def get_tool_schemas(self) -> list[dict[str, Any]]:
        """The environment's tools, as chat templates take them."""
        return [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            }
            for tool in self._environment.tool_defs or ()
        ]

    async def _asked(self) -> list[Any] | None:
        """The messages of the next prompt; None when the rollout is over. What broke it is raised."""
        assert self._rollout is not None
        prompt = asyncio.ensure_future(self._turns.prompts.get())
        await asyncio.wait({prompt, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        if prompt.done():
            return list(prompt.result())
        prompt.cancel()
        error = self._rollout.result()["error"]
        if error is not None:
            raise RuntimeError(f"the environment ended with {error!r}") from error
        return None

    async def _ended(self) -> Any:
        """The state of the last rollout, told that there is no room for a further turn when it waits for one."""
        if self._rollout is None:
            return None
        if not self._rollout.done():
            self._turns.answers.put_nowait(None)
        return await self._rollout


def loaded(id: str, options: Mapping[str, Any]) -> Any:
    """The environment of an id, when it is one whose turns can be sampled here."""
    check_installed()
    verifiers = import_module("verifiers")
    if ":" in id:
        from fastrl.rewards.spec import imported  # lazily: configurations are checked without what rewards need

        environment = imported(id, "environment.factory")(**options)
    else:
        environment = verifiers.load_environment(id, **options)
    if not isinstance(environment, verifiers.MultiTurnEnv):
        raise ValueError(f"{id} makes a {type(environment).__name__}; only a MultiTurnEnv of verifiers takes turns")
    if environment.rubric.has_group_rewards:
        raise ValueError(f"{id} judges whole groups of rollouts; an environment here judges its own episode")
    return environment


def write_rows(id: str, path: str | Path, options: Mapping[str, Any] | None = None, *, is_eval: bool = False) -> int:
    """Write the environment's dataset as JSON lines for `train_dataset` or `eval_dataset`; return how many."""
    environment = loaded(id, options or {})
    rows = list(environment.get_eval_dataset() if is_eval else environment.get_dataset())
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def check_installed() -> None:
    """Refuse to go on without the package, or with a version that has no environments of this kind.

    Raises:
        RuntimeError: naming the versions that run.
    """
    try:
        found = version("verifiers")
    except PackageNotFoundError as error:
        raise RuntimeError("verifiers(...) needs the package: pip install 'verifiers>=0.1.14,<0.4'") from error
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if not FIRST <= number < END:
        raise RuntimeError(
            f"verifiers {found} cannot be run here: from 0.4 on it calls the model over HTTP itself, and before 0.1.14 "
            "it speaks another protocol; pip install 'verifiers>=0.1.14,<0.4'"
        )


def _client() -> Any:
    """What verifiers takes for a client: it asks `prompts` and waits for `answers`; None there ends the rollout."""
    base = import_module("verifiers.clients").Client
    too_long = import_module("verifiers").OverlongPromptError

    class Turns(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self._config, self._client = None, None
            self.prompts: asyncio.Queue[Sequence[Any]] = asyncio.Queue()
            self.answers: asyncio.Queue[Any] = asyncio.Queue()

        async def get_response(self, prompt: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self.prompts.put_nowait(prompt)
            answer = await self.answers.get()
            if answer is None:
                raise too_long("the episode has no room for another turn")
            return answer

    Turns.__abstractmethods__ = frozenset()  # they translate to a provider's form, and there is no provider
    return Turns()


def _response(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], *, is_cut: bool) -> Any:
    types = import_module("verifiers.types")
    said = types.ResponseMessage(
        content=message["content"],
        reasoning_content=message.get("reasoning_content"),
        tool_calls=[
            types.ToolCall(
                id=str(place), name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"])
            )
            for place, call in enumerate(calls)
        ]
        or None,
        finish_reason="length" if is_cut else "tool_calls" if calls else "stop",
        is_truncated=is_cut,
    )
    return types.Response(id="fastrl", created=int(time.time()), model="policy", usage=None, message=said)


def _plain(message: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """A message of the package as a template takes it; a result is named after the call that it answers."""
    content = message.content
    if isinstance(content, list):
        kinds = {part.type for part in content}
        if kinds - {"text"}:
            raise RuntimeError(f"the environment sends {', '.join(sorted(kinds))}; only text can be sampled here")
        content = "".join(part.text for part in content)
    found = {"role": message.role, "content": content or ""}
    return found if message.role != "tool" else {**found, "name": names[int(message.tool_call_id)]}


def _added(opened: Sequence[Mapping[str, Any]], prompt: Sequence[Mapping[str, Any]]) -> str | None:
    """What an environment's set-up put behind the prompt's last message; None when nothing."""
    given = [{"role": each["role"], "content": each["content"] or ""} for each in prompt]
    last = str(opened[-1]["content"])
    begun = [*opened[:-1], {**opened[-1], "content": last[: len(given[-1]["content"])]}]
    if begun != given:
        raise RuntimeError("the environment begins with another prompt than the row's; write its rows with write_rows")
    return last[len(given[-1]["content"]) :] or None
