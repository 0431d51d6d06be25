"""The built-in engine: transformers' forward pass, our cache, our draw.

Rows are sorted by prompt length and cut into batches. In a batch every different prompt is fed once, whatever the size
of its group; then all rows decode together, one token per forward pass, and rows that ended leave the batch.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.decode import Completion, Request, decode
from fastrl.rollout.engine import Sampling, check_prompts, check_sampling, limits_of
from fastrl.rollout.seeds import request_seed, streams
from fastrl.rollout.stepper import Stepper
from fastrl.rollout.stop import StopStrings
from fastrl.rollout.weights import copy_weights
from fastrl.types import Rollout


class BuiltinEngine:
    """Samples from a transformers model in this process; meets `fastrl.rollout.engine.Engine`.

    Args:
        model: a causal language model. It is used as it is, not copied: when the trainer trains this very module, new
            weights need no copy. It is in eval mode only while `generate` runs.
        tokenizer: gives the EOS token and the text for stop strings.
        batch_size: most rows decoded together.
        seed: of the engine's own generator, for calls without seeds.
        dtype: when it differs from the model's, the engine works on its own copy of the model in that dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 256,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if dtype is not None and dtype != model.dtype:
            model = copy.deepcopy(model).to(dtype)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.version = 0
        self.requests_seeded = 0
        self.stop_strings: StopStrings | None = None
        self.stepper = Stepper(model)

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Sample from `model`'s weights from now on: the engine's own module costs nothing, another is copied in."""
        if model is not self.model:
            copy_weights(model, self.model)
        self.version = version

    def rest(self) -> None:
        """Nothing to hand back: it samples from the trainer's own weights, and caches live in `generate` alone."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order; see `fastrl.rollout.engine.Engine.generate`.

        A rollout whose logits turned NaN or infinite keeps the tokens before them and has finish_reason "error".
        """
        check_sampling(sampling)
        vocab_size = self.model.get_input_embeddings().num_embeddings
        context = context_length(self.model)
        ids = [tuple(int(token) for token in prompt) for prompt in prompts]
        check_prompts(ids, vocab_size, context)
        if seeds is None:
            first = self.requests_seeded
            seeds = [request_seed(self.seed, first + i, 0) for i in range(len(ids))]
            self.requests_seeded += len(ids)
        if len(seeds) != len(ids):
            raise ValueError(f"seeds must have one entry per prompt: got {len(seeds)} for {len(ids)} prompts")
        begun = [()] * len(ids) if prefixes is None else [tuple(int(token) for token in prefix) for prefix in prefixes]
        limits = limits_of([len(prompt) for prompt in ids], [len(prefix) for prefix in begun], sampling, context)
        fed = [prompt + prefix for prompt, prefix in zip(ids, begun, strict=True)]
        check_prompts(fed, vocab_size, context)

        is_eos = torch.zeros(vocab_size, dtype=torch.bool, device=self.model.device)
        is_eos[[token for token in eos_token_ids(self.model, self.tokenizer) if token < vocab_size]] = True
        request = Request(
            self.model, sampling, is_eos, self._stop_strings(sampling.stop, vocab_size), context, self.stepper
        )
        order = sorted(range(len(ids)), key=lambda i: (len(fed[i]), fed[i]))
        batches = math.ceil(len(ids) / self.batch_size)
        completions: dict[int, Completion] = {}
        longest = max((len(fed[i]) + limits[i] for i in order), default=0)
        with torch.no_grad(), evaluating(self.model), _prepared(self.stepper, longest):
            for b in range(batches):
                members = order[len(ids) * b // batches : len(ids) * (b + 1) // batches]
                start = [len(begun[i]) for i in members]
                found = decode(
                    request,
                    [fed[i] for i in members],
                    [limits[i] for i in members],
                    streams([seeds[i] for i in members], self.model.device, start=start),
                    prefix_lengths=start,
                )
                completions.update(zip(members, found, strict=True))
        return [
            Rollout(ids[i], completions[i].ids, completions[i].logprob, completions[i].finish_reason, self.version)
            for i in range(len(ids))
        ]

    def _stop_strings(self, stop: tuple[str, ...], vocab_size: int) -> StopStrings | None:
        if not stop:
            return None
        # Classifying the vocabulary takes a while and depends on the strings alone.
        if self.stop_strings is None or self.stop_strings.stop != stop:
            self.stop_strings = StopStrings(self.tokenizer, stop, vocab_size)
        return self.stop_strings


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a completion: those of the generation config, the model's config and the tokenizer.

    Chat models end a turn with another token than a document and list both in the generation config alone.
    """
    named = [tokenizer.eos_token_id, model.config.get_text_config().eos_token_id]
    if model.generation_config is not None:
        named.append(model.generation_config.eos_token_id)
    ids: set[int] = set()
    for entry in named:
        ids.update(entry if isinstance(entry, (list, tuple)) else () if entry is None else (entry,))
    return frozenset(ids)


def context_length(model: PreTrainedModel) -> int:
    """Most tokens the model can hold, prompt and completion together; unbounded for models that name no limit."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if length is None else int(length)


@contextmanager
def _prepared(stepper: Stepper, context: int) -> Iterator[None]:
    """The weights of now, until the block ends."""
    stepper.prepare(context)
    try:
        yield
    finally:
        stepper.release()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again: a frozen part may have been in eval mode all along."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
