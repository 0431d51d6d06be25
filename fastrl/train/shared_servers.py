"""vLLM servers that several ranks sample from: rank 0 brings them the weights, every rank asks them for completions.

    rank 0   take weights, pause, send, resume, probe |                | generate its share
    rank r   ................ waits ..................| probe, in turn | generate its share

Every rank sees for itself that a server samples from the weights of its own policy. A server that is lost is left alone
by the other ranks until rank 0 has brought it the next weights; meanwhile its share goes to the servers that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fastrl.rollout.engine import Sampling
from fastrl.rollout.server_engine import ServerEngine
from fastrl.rollout.server_http import ServerError, ServerLostError
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_weights import Target
from fastrl.train.config import GKDConfig, InferenceConfig, OnPolicyConfig
from fastrl.train.distributed import from_first, gather, is_first, rank, size
from fastrl.train.servers import engine_over, servers_of, transport_of
from fastrl.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SentElsewhere:
    """The transport of a rank that sends nothing: it believes a server that names the weights which rank 0 has sent.

    Attributes:
        tag: of those weights; see `fastrl.rollout.server_weights.Transport`.
        models: the name that requests to each server use.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self.tag = ""
        self.models: list[str] = [""] * len(servers)

    def take(self, model: nn.Module, version: int) -> None:
        """Nothing: rank 0 has taken the same weights."""

    def send(self, targets: Sequence[Target]) -> dict[int, ServerError]:
        """Look which servers have the weights; the others are lost until rank 0 has brought them some."""
        failed: dict[int, ServerError] = {}
        for place, target in enumerate(targets):
            number = next(number for number, server in enumerate(self._servers) if server is target)
            target.model = self.models[number] or target.base
            if not self._servers[number].holds(self.tag):
                failed[place] = ServerLostError(f"{self._servers[number].client.url} has no weights of this step yet")
        return failed

    def close(self) -> None:
        """Nothing is held."""


class SharedServers:
    """One rank's part in sampling from servers that all ranks use; meets `fastrl.rollout.engine.Engine`.

    All ranks make it, load weights and close it together; each generates as it likes.

    Args:
        config: `rollout.server.urls` names servers that run already.

    Raises:
        ServerError, SamplerWeightsError: as `ServerEngine`, on the rank that met it; the others end with a RanksError.
    """

    def __init__(
        self,
        config: OnPolicyConfig | InferenceConfig | GKDConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        servers = servers_of(config, policy)
        self._servers = servers
        self._elsewhere = SentElsewhere(servers)
        self._transport = transport_of(config, policy) if is_first() else self._elsewhere
        made: list[ServerEngine] = []
        self._in_turn(lambda: made.append(engine_over(servers, self._transport, config, policy, tokenizer)))
        self._engine = made[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample this rank's prompts; see `fastrl.rollout.engine.Engine.generate`."""
        return self._engine.generate(prompts, sampling, seeds=seeds, prefixes=prefixes)

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Bring the weights to every server once, and see on every rank that they are there."""
        self._in_turn(lambda: self._engine.load_weights(model, version))

    def rest(self) -> None:
        """Servers have their own memory: there is nothing to hand back."""

    def close(self) -> None:
        """Leave the servers running, and delete the files of weights."""
        self._engine.close()

    def _in_turn(self, act: Callable[[], object]) -> None:
        """Rank 0 sends the weights, then the others look, one after another: a look empties the caches."""

        def send() -> list[Any]:
            act()
            return [self._transport.tag, [server.model for server in self._servers]]

        self._elsewhere.tag, self._elsewhere.models = from_first(send, "the weights on the servers", lane="sampling")
        for turn in range(1, size()):
            if rank() == turn:
                act()
            gather(None, f"rank {turn} to look at the servers", lane="sampling")
