"""What must be true of a vLLM server before a run starts on it; each failure is one sentence with a remedy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastrl.rollout.server_guard import is_loopback
from fastrl.rollout.server_http import Client, ServerError, ServerLostError
from fastrl.rollout.vllm_version import NEWEST, OLDEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 30.0
# Cases, digits, spaces, code, an accent, CJK, an emoji: what tokenizers treat differently.
TEXT = "Hello  World 1234567, a\tfox's\n\n  def f(x): x**2 # \u00e9\u00e8 \u4f60\u597d \U0001f642 <eos> </s>"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs of a server.

    Attributes:
        vocab_size: V, rows of the policy's embedding.
        context: tokens of the longest sequence.
        tokenizer: the trainer's.
        with_adapters: whether LoRA adapters will be pushed.
    """

    vocab_size: int
    context: int
    tokenizer: PreTrainedTokenizerBase
    with_adapters: bool


def check_server(client: Client, needs: Needs) -> str:
    """Ask a server about everything that would spoil a run later; return the name it serves its model under.

    Raises:
        ServerError: what does not fit, and what to do about it.
    """
    try:
        version = client.get("/version", seconds=SECONDS)
    except ServerLostError as error:
        raise ServerError(f"no vLLM server at {client.url}: {error}; is it running, and is the URL right?") from None
    _check_version(client.url, version)
    try:
        models = client.get("/v1/models", seconds=SECONDS)["data"]
        served, context = next(
            (str(each["id"]), each["max_model_len"]) for each in models if each.get("parent") is None
        )
    except (KeyError, TypeError, StopIteration) as error:
        raise ServerError(f"{client.url}/v1/models lists no model ({error!r}); is it a vLLM server?") from None
    if context is not None and context < needs.context:
        raise ServerError(
            f"{client.url} holds {context} tokens, and a sequence of this run may have {needs.context}; start it with "
            f"--max-model-len {needs.context}, or set rollout.server.max_model_len to {context}"
        )
    _check_routes(client, with_adapters=needs.with_adapters)
    _resume(client)
    _check_tokenizer(client, served, needs.tokenizer)
    _check_vocabulary(client, served, needs.vocab_size)
    _check_logprobs(client, served)
    return served


def warn_if_open(client: Client) -> None:
    """Warn when the routes that change weights answer without a key, or when the key travels in the clear."""
    is_local = is_loopback(urlsplit(client.url).hostname or "")
    if client.status("/is_paused", with_key=False, seconds=SECONDS) != 401:
        place = "every user of this machine" if is_local else "everyone who reaches it"
        warnings.warn(
            f"{client.url} lets {place} pause it and change its weights without a key (vLLM's --api-key does not cover "
            "these routes); start it with --middleware fastrl.rollout.server_guard.BearerOnEveryRoute",
            stacklevel=2,
        )
    if not is_local and client.url.startswith("http://"):
        warnings.warn(
            f"{client.url} is not on this machine: key, prompts and completions travel unencrypted; use a tunnel, "
            "https or a network of your own",
            stacklevel=2,
        )


def _check_version(url: str, reply: Any) -> None:
    text = str(reply.get("version")) if isinstance(reply, dict) else ""
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise ServerError(f"{url}/version names no version: {text[:40]!r}; is it a vLLM server?")
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise ServerError(
            f"{url} runs vLLM {text}; we know {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}: install one "
            "of these there"
        )


def _check_routes(client: Client, *, with_adapters: bool) -> None:
    if client.status("/is_paused", with_key=True, seconds=SECONDS) == 404:
        raise ServerError(
            f"{client.url} has no routes to update weights; start it with VLLM_SERVER_DEV_MODE=1 and "
            "--middleware fastrl.rollout.server_guard.BearerOnEveryRoute"
        )
    # The route takes POST alone, so a GET says 405 where it is.
    if with_adapters and client.status("/v1/load_lora_adapter", with_key=True, seconds=SECONDS) == 404:
        raise ServerError(
            f"{client.url} takes no adapters; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a "
            "--max-lora-rank of at least lora_r"
        )


def _resume(client: Client) -> None:
    """A trainer that was cut off in the middle of an update left the server paused: it would hold every request."""
    if client.get("/is_paused", seconds=SECONDS).get("is_paused"):
        client.tell("/resume", seconds=SECONDS)


def _check_tokenizer(client: Client, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
    theirs = client.post("/tokenize", body, seconds=SECONDS)
    ours = tokenizer.encode(TEXT, add_special_tokens=False)
    if not isinstance(theirs, dict) or theirs.get("tokens") != ours:
        raise ServerError(
            f"{client.url} has another tokenizer than the trainer; start it with --tokenizer DIRECTORY OF THE POLICY"
        )


def _check_vocabulary(client: Client, model: str, vocab_size: int) -> None:
    """The last id of the policy's vocabulary must be known, and the one after it not."""
    if not _takes(client, model, [vocab_size - 1]):
        raise ServerError(
            f"{client.url} knows fewer than the policy's {vocab_size} tokens; does it serve another model?"
        )
    if _takes(client, model, [vocab_size]):
        raise ServerError(
            f"{client.url} knows more than the policy's {vocab_size} tokens; does it serve another model?"
        )


def _takes(client: Client, model: str, prompt: Sequence[int]) -> bool:
    try:
        client.post("/v1/completions", {"model": model, "prompt": list(prompt), "max_tokens": 1}, seconds=SECONDS)
    except ServerLostError:
        raise
    except ServerError as error:
        if error.status != 400:
            raise
        return False
    return True


def _check_logprobs(client: Client, model: str) -> None:
    """With top-k 1 one token is left, so its log-probability is 0 after the filters and is not before them."""
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 1, "top_k": 1, "logprobs": 0}
    reply = client.post("/v1/completions", body, seconds=SECONDS)
    try:
        value = float(reply["choices"][0]["logprobs"]["token_logprobs"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"{client.url} gives no log-probabilities ({error!r})") from None
    if abs(value) > 1e-5:
        raise ServerError(
            f"{client.url} gives log-probabilities before temperature and filters; start it with "
            "--logprobs-mode processed_logprobs"
        )
