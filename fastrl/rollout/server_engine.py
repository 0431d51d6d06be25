"""The engine whose sampler is one or more vLLM servers: token ids over HTTP, weights by vLLM's own endpoints.

Prompts are spread over the servers by prompt, so that a group shares its prefix in one cache. A server that is lost
while it samples hands its share to the others; with none left it is started again, or waited for. What cannot be
sampled at all comes back with finish_reason "error", which is never judged and never trained. Weights, probe and a new
try come with the next `load_weights`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.builtin import context_length, eos_token_ids
from fastrl.rollout.engine import Sampling, check_prompts, limits_of
from fastrl.rollout.seeds import request_seed
from fastrl.rollout.server_checks import Needs
from fastrl.rollout.server_http import DeadlineError, ServerError, ServerLostError
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_request import (
    PATH,
    AbortedError,
    Reply,
    Request,
    body_of,
    probe_body,
    read_probe,
    read_reply,
)
from fastrl.rollout.server_weights import Transport
from fastrl.rollout.stop import StopStrings
from fastrl.rollout.vllm_probe import check_holds, probe_ids, trainer_logprob
from fastrl.rollout.vllm_sampling import check_vllm_sampling
from fastrl.types import Rollout

MOST_ROUNDS = 3  # of one call: the first, and two with what lost or restarted servers left


class EngineLostError(RuntimeError):
    """No server could sample anything for several calls in a row."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine puts up with.

    Attributes:
        request_seconds: for one completion, retries included; then it is aborted and lost.
        concurrency: completions in flight at one server.
        lost_calls: calls of `generate` in a row that may lose everything; the last of them raises.
        probe_tolerance: see `fastrl.rollout.vllm_probe.check_holds`.
    """

    request_seconds: float = 600.0
    concurrency: int = 64
    lost_calls: int = 3
    probe_tolerance: float = 1e-3


class ServerEngine:
    """Samples from vLLM servers; meets `fastrl.rollout.engine.Engine`. Owns the servers and the transport.

    Args:
        model: the policy: its vocabulary, its context, and the weights of version 0, which the servers get at once.
        tokenizer: the policy's.
        servers: at least one.
        transport: how weights travel.
        context: most tokens of one sequence that the run will ask for; None is the model's context.
        with_adapters: whether the transport pushes LoRA adapters.
        limits: what the engine puts up with.
        seed: of the engine's own generator, for calls without seeds.

    Raises:
        ServerError: a server does not come up or does not fit; none is left running.
        SamplerWeightsError: a server does not hold the weights it was sent.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        servers: Sequence[Server],
        transport: Transport,
        context: int | None = None,
        with_adapters: bool = False,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> None:
        self._model_context = context_length(model)
        self._vocab_size = model.get_input_embeddings().num_embeddings
        self._eos = frozenset(token for token in eos_token_ids(model, tokenizer) if token < self._vocab_size)
        self._tokenizer = tokenizer
        self._servers = tuple(servers)
        self._transport = transport
        self._limits = limits or Limits()
        self._seed = seed
        self._requests_seeded = 0
        self._stop_strings: StopStrings | None = None
        self._version = 0
        needed = min(context or self._model_context, self._model_context)
        self._needs = Needs(self._vocab_size, needed, tokenizer, with_adapters)
        self._probe = probe_ids(tokenizer, self._vocab_size, needed)
        self._expected: Tensor | None = None
        self._before: Tensor | None = None
        self._lost_calls = 0
        self._lost: dict[Server, ServerError] = {}
        try:
            self._open(self._servers, patience=True)
            self.load_weights(model, 0)
            for error in self._lost.values():
                raise error
        except BaseException:
            self.close()
            raise

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Bring `model`'s weights to every server, start lost ones again, and check that each holds them.

        A server that cannot be reached is left out until the next call.

        Raises:
            SamplerWeightsError: a server that took the weights does not sample from them.
        """
        self._transport.take(model, version)
        self._version, self._before = version, self._expected
        self._expected = trainer_logprob(model, self._probe)
        self._send([server for server in self._servers if server not in self._lost])
        self._reopen(patience=False)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order; see `fastrl.rollout.engine.Engine.generate`.

        A completion that no server could finish has finish_reason "error" and no tokens.

        Raises:
            EngineLostError: everything was lost, as in the calls before.
            ServerError: a server answers what it was not asked, or refuses a request.
        """
        requests = self._requests(prompts, sampling, seeds, prefixes)
        replies: list[Reply | None] = [None] * len(requests)
        missing, rounds = list(range(len(requests))), 0
        while missing and rounds < MOST_ROUNDS:
            rounds += 1
            if not any(server.is_up for server in self._servers):
                self._reopen(patience=True)
            missing = self._round(requests, missing, replies, sampling)
        self._count(requests, replies)
        nothing = Reply((), (), "error")
        return [
            Rollout(request.prompt, reply.ids, reply.logprob, reply.finish_reason, self._version)
            for request, reply in (
                (request, reply or nothing) for request, reply in zip(requests, replies, strict=True)
            )
        ]

    def rest(self) -> None:
        """Servers have their own memory: there is nothing to hand back."""

    def close(self) -> None:
        """End the servers that were started for this engine, and delete the files of weights."""
        for server in self._servers:
            server.close()
        self._transport.close()

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        prefixes: Sequence[Sequence[int]] | None,
    ) -> list[Request]:
        check_vllm_sampling(sampling)
        ids = [tuple(int(token) for token in prompt) for prompt in prompts]
        check_prompts(ids, self._vocab_size, self._needs.context)
        if seeds is None:
            first = self._requests_seeded
            seeds = [request_seed(self._seed, first + i, 0) for i in range(len(ids))]
            self._requests_seeded += len(ids)
        if len(seeds) != len(ids):
            raise ValueError(f"seeds must have one entry per prompt: got {len(seeds)} for {len(ids)} prompts")
        begun = [()] * len(ids) if prefixes is None else [tuple(int(token) for token in prefix) for prefix in prefixes]
        lengths = [len(prompt) for prompt in ids], [len(prefix) for prefix in begun]
        limits = limits_of(*lengths, sampling, self._needs.context)
        fed = [prompt + prefix for prompt, prefix in zip(ids, begun, strict=True)]
        check_prompts(fed, self._vocab_size, self._needs.context)
        return [Request(*each) for each in zip(ids, begun, limits, seeds, strict=True)]

    def _round(
        self, requests: Sequence[Request], missing: Sequence[int], replies: list[Reply | None], sampling: Sampling
    ) -> list[int]:
        """Ask the servers that are up for the missing completions; those that are to be asked for again."""
        servers = [server for server in self._servers if server.is_up]
        if not servers:
            return []
        stop = self._strings(sampling.stop)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(requests[i].prompt for i in missing))}
        is_wrong = Event()

        def home(i: int) -> Server:
            return servers[place[requests[i].prompt] % len(servers)]

        def ask(i: int) -> Reply | None:
            server = home(i)
            if not server.is_up or is_wrong.is_set():
                return None
            body = body_of(requests[i], sampling, self._eos, server.model)
            try:
                answer = server.client.call(
                    "POST",
                    PATH,
                    body,
                    deadline=time.monotonic() + self._limits.request_seconds,
                    is_pointless=lambda: not server.is_up,
                )
                return read_reply(answer, requests[i], self._eos, stop)
            except DeadlineError:
                return Reply((), (), "error")  # closing the connection aborted it at the server
            except AbortedError:
                return None
            except ServerLostError as error:
                self._lose(server, error)
                return None
            except BaseException as error:
                if isinstance(error, ServerError) and error.status == 404:  # started again, without our adapter
                    self._lose(server, error)
                    return None
                is_wrong.set()
                raise

        pool = ThreadPoolExecutor(min(self._limits.concurrency * len(servers), len(missing)))
        try:
            for i, reply in zip(missing, pool.map(ask, missing), strict=True):
                replies[i] = reply
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for server in servers:
            if server.is_up and not server.holds(self._transport.tag):
                self._lose(server, ServerLostError(f"{server.client.url} was started again, or updated by another run"))
                for i in missing:  # nobody knows which weights those came from
                    replies[i] = None if home(i) is server else replies[i]
        return [i for i in missing if replies[i] is None]

    def _count(self, requests: Sequence[Request], replies: Sequence[Reply | None]) -> None:
        is_all_lost = bool(requests) and all(reply is None or reply.finish_reason == "error" for reply in replies)
        self._lost_calls = self._lost_calls + 1 if is_all_lost else 0
        if self._lost_calls >= self._limits.lost_calls:
            reason = next((str(error) for error in self._lost.values()), "every completion ran out of time")
            raise EngineLostError(
                f"no completion could be sampled {self._lost_calls} times in a row, the last time because: {reason}. "
                "Mend the server and start again (a training run with --resume auto)"
            )

    def _lose(self, server: Server, error: ServerError) -> None:
        server.is_up = False
        self._lost[server] = error

    def _open(self, servers: Sequence[Server], *, patience: bool) -> None:
        """Start or reach servers, all at the same time; the first failure is raised when all have ended."""
        _together([partial(server.open, self._needs, patience=patience) for server in servers])

    def _reopen(self, *, patience: bool) -> None:
        """Open lost servers once more and give them the current weights; what fails stays lost."""
        opened = []
        for server in list(self._lost):
            try:
                self._open([server], patience=patience)
            except ServerError as error:
                self._lose(server, error)
                continue
            opened.append(server)
        if opened:
            self._send(opened)

    def _send(self, servers: Sequence[Server]) -> None:
        """Bring the weights that were taken to servers, and check that they hold them."""
        failed = self._transport.send(servers)
        for i, server in enumerate(servers):
            try:
                if i in failed:
                    raise failed[i]
                self._verify(server)
            except ServerError as error:
                self._lose(server, error)
                continue
            server.is_up = True
            self._lost.pop(server, None)

    def _verify(self, server: Server) -> None:
        """Forget keys and values of old weights, and ask for a known answer."""
        assert self._expected is not None
        reset = server.ask("/reset_prefix_cache")
        if isinstance(reset, dict) and reset.get("success") is False:
            raise ServerLostError("a prefix cache of old weights is still in use")
        found = read_probe(server.ask(PATH, probe_body(self._probe, server.model)), self._probe)
        check_holds(
            torch.tensor(found),
            self._expected,
            self._before,
            tolerance=self._limits.probe_tolerance,
            version=self._version,
        )

    def _strings(self, stop: tuple[str, ...]) -> StopStrings | None:
        if not stop:
            return None
        if self._stop_strings is None or self._stop_strings.stop != stop:
            self._stop_strings = StopStrings(self._tokenizer, stop, self._vocab_size)
        return self._stop_strings


def _together(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks at the same time; raise the first failure after all have ended."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task) for task in tasks]
    for future in futures:
        future.result()
