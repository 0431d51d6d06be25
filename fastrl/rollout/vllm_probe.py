"""Does the sampler hold the weights it was given? One known sequence, scored by both sides, tells.

    wrong   mean_t |sampler[t] - trainer[t]| > tolerance
    stale   |sampler - before| < |sampler - trainer|  and  |trainer - before| > 4 min of the two

`before` is what the trainer said of the sequence at the previous update. The second rule needs no tolerance: it finds
an update that never arrived as soon as it moves the sequence by more than the noise between the two systems, which is
far below any tolerance that would let honest low-precision sampling pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrl.rollout.builtin import evaluating

TEXT = "the quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9"
MOST_TOKENS = 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # mean difference in nats
CLEARLY = 4.0  # times the smaller distance that the trainer must have moved, before "stale" is a finding


class SamplerWeightsError(RuntimeError):
    """The sampler does not hold the trainer's weights; what it samples would train on another policy."""


def probe_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, context: int) -> tuple[int, ...]:
    """A short sequence that any model can be fed: a text where the tokenizer knows it, else the first tokens."""
    ids = [token for token in tokenizer.encode(TEXT, add_special_tokens=False) if token < vocab_size]
    if len(ids) < 2:
        ids = [i % vocab_size for i in range(MOST_TOKENS)]
    return tuple(ids[: min(MOST_TOKENS, context - 1)])


@torch.no_grad()
def trainer_logprob(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[n - 1] f32 on the CPU: log-probability of each token after those before it, in nats, by the model's forward."""
    device = next(model.parameters()).device
    fed = torch.tensor([list(ids)], device=device)
    with evaluating(model):
        logits = model(input_ids=fed, use_cache=False).logits[0, :-1].float()
    logprob: Tensor = logits.log_softmax(-1).gather(-1, fed[0, 1:, None])[:, 0]
    return logprob.cpu()


def check_holds(sampler: Tensor, trainer: Tensor, before: Tensor | None, *, tolerance: float, version: int) -> float:
    """Stop a run whose sampler does not hold the weights of `version`.

    Args:
        sampler: [n - 1] log-probabilities of the known sequence, as the sampler computes them; a constant.
        trainer: [n - 1] the same by the trainer.
        before: [n - 1] by the trainer at the previous update; None at the first.
        tolerance: mean difference that is allowed, in nats.

    Returns:
        The mean difference.

    Raises:
        SamplerWeightsError: the difference is above the tolerance or not a number, or the sampler is where the
            trainer was before.
    """
    gap = float((sampler - trainer).abs().mean())
    if not gap <= tolerance:
        raise SamplerWeightsError(
            f"the sampler does not hold the weights of version {version}: on a known sequence its log-probabilities "
            f"differ from the trainer's by {gap:.2e} on average, above {tolerance:.0e}; is it the same model, and is "
            'its way of updating weights one that works on this device (docs/vllm.md, "The probe")?'
        )
    if before is None:
        return gap
    to_new, to_old = float((sampler - trainer).norm()), float((sampler - before).norm())
    moved = float((trainer - before).norm())
    if to_old < to_new and moved > CLEARLY * to_old:
        raise SamplerWeightsError(
            f"the sampler still holds older weights than version {version}: on a known sequence the trainer moved by "
            f"{moved:.2e}, and the sampler is {to_old:.2e} from where the trainer was and {to_new:.2e} from where it "
            "is; the update never arrived"
        )
    return gap
