"""One completion as vLLM's `/v1/completions` takes and gives it: token ids in, token ids and log-probabilities out.

Why this endpoint: every vLLM from 0.20 on has it, with and without flags, and an API key covers it. Token ids go in as
they are; `return_token_ids` brings them back as they were sampled. Nothing is tokenised on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rollout.engine import Sampling
from fastrl.rollout.server_http import ServerError
from fastrl.rollout.stop import StopStrings
from fastrl.rollout.vllm_sampling import sampling_fields
from fastrl.types import FinishReason

PATH = "/v1/completions"
LEAST_LOGPROB = -9999.0  # what vLLM writes for -inf


class AbortedError(RuntimeError):
    """The server gave a completion up in the middle: it was paused, or its engine failed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one completion needs to know.

    Attributes:
        prompt: token ids.
        prefix: tokens of the completion that are there already.
        limit: most tokens to sample now.
        seed: of the whole completion.
    """

    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    limit: int
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What was sampled: token ids, their log-probabilities, and why it ended."""

    ids: tuple[int, ...]
    logprob: tuple[float, ...]
    finish_reason: FinishReason


def body_of(request: Request, sampling: Sampling, eos: Iterable[int], model: str) -> dict[str, Any]:
    """The JSON of a request.

    Args:
        eos: ids that end a completion.
        model: the name the server has for the weights.
    """
    fields = sampling_fields(
        sampling, limit=request.limit, seed=request.seed, begun=len(request.prefix), eos_token_ids=eos
    )
    prompt = [*request.prompt, *request.prefix]
    return fields | {"model": model, "prompt": prompt, "add_special_tokens": False, "return_token_ids": True}


def probe_body(ids: Sequence[int], model: str) -> dict[str, Any]:
    """A request for the log-probability of each of `ids` but the first, at temperature 1 and without filters."""
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": 0,
        "add_special_tokens": False,
    }


def read_probe(body: Any, ids: Sequence[int]) -> list[float]:
    """[n - 1] log-probabilities in the reply to `probe_body`.

    Raises:
        ServerError: they are not there.
    """
    try:
        entries = body["choices"][0]["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"the server gave no log-probabilities of a prompt ({error!r})") from None


def read_reply(body: Any, request: Request, eos: frozenset[int], stop: StopStrings | None) -> Reply:
    """The completion in a reply, checked against what was asked.

    Stop strings are matched again here, with the trainer's tokenizer and over the prefix: the server sees the prefix
    as a part of the prompt, where it looks for none.

    Raises:
        AbortedError: the server did not finish it.
        ServerError: the reply is not what the request asked for.
    """
    try:
        choice = body["choices"][0]
        ids = tuple(int(token) for token in choice["token_ids"])
        logprob = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
        fed, reason = choice["prompt_token_ids"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(
            f"a completion without token ids or log-probabilities ({error!r}); is it vLLM >= 0.20?"
        ) from None
    if tuple(fed) != request.prompt + request.prefix:
        raise ServerError("the server fed other tokens than it was given; is a proxy changing requests?")
    if reason not in ("stop", "length") or not ids or len(ids) != len(logprob):
        raise AbortedError(f"{len(ids)} tokens and finish_reason {reason!r}")
    bad = next((t for t, value in enumerate(logprob) if not math.isfinite(value) or value <= LEAST_LOGPROB), None)
    if bad is not None:
        return Reply(ids[:bad], logprob[:bad], "error")
    end = None if stop is None else stop.first_match(request.prefix + ids, start=len(request.prefix))
    if end is not None:
        n = end + 1 - len(request.prefix)
        return Reply(ids[:n], logprob[:n], "stop")
    if ids[-1] in eos:
        return Reply(ids, logprob, "stop")
    if reason == "stop" and choice.get("stop_reason") not in (() if stop is None else stop.stop):
        raise ServerError(
            f"the server ended a completion at token {ids[-1]}, which is no EOS of the trainer's tokenizer or model; "
            "start it with --generation-config vllm"
        )
    if reason == "length" and len(ids) < request.limit:
        raise ServerError(
            f"the server cut a completion after {len(ids)} of {request.limit} tokens; start it with "
            "--generation-config vllm and a --max-model-len of the trainer's context"
        )
    return Reply(ids, logprob, "stop" if reason == "stop" else "length")
