"""vLLM in the trainer's process: token ids in, token ids and log-probabilities out, weights pushed and then probed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.rollout.builtin import context_length, eos_token_ids
from fastrl.rollout.engine import Sampling, check_prompts, limits_of
from fastrl.rollout.seeds import request_seed
from fastrl.rollout.stop import StopStrings
from fastrl.rollout.vllm_probe import TOLERANCE, check_holds, probe_ids, trainer_logprob
from fastrl.rollout.vllm_sampling import check_vllm_sampling, sampling_fields
from fastrl.rollout.vllm_start import Settings, started, stop
from fastrl.rollout.vllm_weights import Adapters, WriteAdapter, push_weights
from fastrl.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VLLMEngine:
    """Samples with vLLM on the trainer's own device; meets `fastrl.rollout.engine.Engine`.

    Args:
        path: directory of the model and tokenizer, whose weights are the model's at this moment.
        model: the policy. With `write_adapter` its adapter is pushed, and its base stays what vLLM read from `path`.
        tokenizer: gives the EOS token and the text for stop strings.
        write_adapter: writes the policy's LoRA adapter into a folder; None pushes whole weights.
        tolerance: of the probe, in nats; None is TOLERANCE.
        seed: of the engine's own generator, for calls without seeds.

    Raises:
        VLLMStartError: vLLM cannot sample for this trainer; one sentence says why.
        SamplerWeightsError: vLLM computes other log-probabilities than the trainer from the very start.
    """

    def __init__(
        self,
        path: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: Settings,
        write_adapter: WriteAdapter | None = None,
        tolerance: float | None = None,
        seed: int = 0,
    ) -> None:
        self.llm = started(path, model, tokenizer, settings)
        self.tokenizer = tokenizer
        self.is_cpu = model.device.type == "cpu"
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.context = min(context_length(model), settings.max_model_len or context_length(model))
        self.eos = frozenset(token for token in eos_token_ids(model, tokenizer) if token < self.vocab_size)
        self.can_sleep = settings.sleep and not self.is_cpu
        self.is_asleep = False
        self.adapters = None if write_adapter is None else Adapters(write_adapter)
        self.adapter: Any = None  # the LoRARequest of the version that samples
        self.seed = seed
        self.version = 0
        self.requests_seeded = 0
        self.stop_strings: StopStrings | None = None
        self.known = probe_ids(tokenizer, self.vocab_size, self.context)
        self.tolerance = TOLERANCE[model.dtype] if tolerance is None else tolerance
        self.before: Tensor | None = None
        try:
            self.gap = self._probe(model, version=0)
        except BaseException:
            self.close()
            raise

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Push the model's weights, or its adapter, and see by the known sequence that vLLM samples with them.

        Raises:
            SamplerWeightsError: it does not.
        """
        self._wake("weights")
        if self.adapters is None:
            push_weights(self.llm, model, is_cpu=self.is_cpu)
        else:
            self.adapter = self.adapters.next(model)
        self._wake("kv_cache")
        self.is_asleep = False
        self.llm.reset_prefix_cache()
        self.gap = self._probe(model, version)
        self.version = version

    def rest(self) -> None:
        """Hand the GPU's memory back. Weights that will be pushed again are dropped; an adapter's base is kept."""
        if self.can_sleep and not self.is_asleep:
            self.llm.sleep(level=2 if self.adapters is None else 1)
            self.is_asleep = True

    def close(self) -> None:
        """End vLLM; the engine cannot be used afterwards."""
        stop(self.llm)
        if self.adapters is not None:
            self.adapters.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order; see `fastrl.rollout.engine.Engine.generate`.

        A rollout whose log-probabilities are not finite keeps the tokens before them and has finish_reason "error".

        Raises:
            ValueError: also for sampling parameters that vLLM draws from another distribution.
        """
        if self.is_asleep:
            raise RuntimeError("the engine rests, and its weights may be gone; call load_weights before generate")
        from vllm import SamplingParams, TokensPrompt

        check_vllm_sampling(sampling)
        ids = [tuple(int(token) for token in prompt) for prompt in prompts]
        check_prompts(ids, self.vocab_size, self.context)
        if seeds is None:
            first = self.requests_seeded
            seeds = [request_seed(self.seed, first + i, 0) for i in range(len(ids))]
            self.requests_seeded += len(ids)
        if len(seeds) != len(ids):
            raise ValueError(f"seeds must have one entry per prompt: got {len(seeds)} for {len(ids)} prompts")
        begun = [()] * len(ids) if prefixes is None else [tuple(int(token) for token in prefix) for prefix in prefixes]
        limits = limits_of([len(prompt) for prompt in ids], [len(prefix) for prefix in begun], sampling, self.context)
        fed = [prompt + prefix for prompt, prefix in zip(ids, begun, strict=True)]
        check_prompts(fed, self.vocab_size, self.context)
        fields = [
            sampling_fields(sampling, limit=limit, seed=seed, begun=len(prefix), eos_token_ids=self.eos)
            for limit, seed, prefix in zip(limits, seeds, begun, strict=True)
        ]
        outputs = self._run(
            [TokensPrompt(prompt_token_ids=list(each)) for each in fed],
            [SamplingParams(**each, flat_logprobs=True, detokenize=bool(sampling.stop)) for each in fields],
        )
        stop_strings = self._stop_strings(sampling.stop)
        return [
            _rollout(prompt, prefix, output.outputs[0], stop_strings, self.version)
            for prompt, prefix, output in zip(ids, begun, outputs, strict=True)
        ]

    def _run(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        if not prompts:
            return []
        devices: list[int] | None = [] if self.is_cpu else None  # None is every GPU
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter))

    def _probe(self, model: nn.Module, version: int) -> float:
        """The mean difference on the known sequence; raises when it says that the weights are not these."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        (output,) = self._run([TokensPrompt(prompt_token_ids=list(self.known))], [params])
        found = output.prompt_logprobs
        sampler = torch.tensor([found.logprobs[start] for start in found.start_indices[1:]])
        trainer = trainer_logprob(model, self.known)
        gap = check_holds(sampler, trainer, self.before, tolerance=self.tolerance, version=version)
        self.before = trainer
        return gap

    def _wake(self, tag: str) -> None:
        if self.is_asleep:
            self.llm.wake_up(tags=[tag])

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings | None:
        if not stop:
            return None
        # Classifying the vocabulary takes a while and depends on the strings alone.
        if self.stop_strings is None or self.stop_strings.stop != stop:
            self.stop_strings = StopStrings(self.tokenizer, stop, self.vocab_size)
        return self.stop_strings


def _rollout(
    prompt: tuple[int, ...], begun: tuple[int, ...], output: Any, stop_strings: StopStrings | None, version: int
) -> Rollout:
    """What vLLM sampled, under our rules: it sees a prefix as prompt, and looks for no stop string there."""
    ids, found = tuple(output.token_ids), output.logprobs
    logprob = tuple(found.logprobs[start] for start in found.start_indices)
    assert tuple(found.token_ids[start] for start in found.start_indices) == ids
    reason: FinishReason = output.finish_reason if output.finish_reason in ("stop", "length") else "error"
    bad = next((t for t, value in enumerate(logprob) if not math.isfinite(value)), None)
    match = None if stop_strings is None else stop_strings.first_match(begun + ids, len(begun))
    end = len(ids) if match is None else match + 1 - len(begun)
    if bad is not None and bad < end:
        return Rollout(prompt, ids[:bad], logprob[:bad], "error", version)
    return Rollout(prompt, ids[:end], logprob[:end], reason if match is None else "stop", version)
