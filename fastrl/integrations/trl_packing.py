"""Packed rows under TRL's fused head, where TRL pads: the same answers per token, in TRL's padded shape.

    [S, L] padded ids, mask, labels  ->  [R, W] rows of whole sequences, R <= S  ->  TRL's forward  ->  [S, L - 1]

A flash attention gets one row of all tokens. Any other attention gets rows no longer than the longest sequence, as its
cost grows with the square of a row. Position ids restart with each sequence: that is how transformers keeps them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrl.data.pack import TokenSequence, pack
from fastrl.integrations.trl_head import HeadCall, TokenRule, head_call

NO_LABEL = -100
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A padded batch as packed rows.

    Attributes:
        input_ids: [R, W] tokens fed; what pads the ends of rows is nobody's.
        position_ids: [R, W], restarting at 0 in each sequence.
        labels: [R, W] the token each position predicts, -100 where none is scored.
        place: [R, W] where a position belongs in the [S (L - 1)] labels of the padded batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    place: Tensor


@dataclass(slots=True)
class PackedForward:
    """What a model's packed forward is asked besides its inputs, and what it found; owned by one trainer.

    Attributes:
        rule: a loss per scored token, given places among the [S (L - 1)] labels; None returns log-probabilities with
            their gradient.
        loss: [] the sum of the rule's losses in the last forward.
        given: log-probability, entropy (leaves) and place [C] of each scored token in the last forward with a rule.
    """

    rule: TokenRule | None = None
    loss: Tensor | None = field(default=None)
    given: tuple[Tensor, Tensor, Tensor] | None = field(default=None)


# Loops over sequences on the host, which a compiler has nothing to win from, and numpy's bytes, which it does not know.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, is_one_row: bool) -> PackedRows:
    """Pack a padded batch.

    Args:
        input_ids: [S, L].
        attention_mask: [S, L] one run of ones per sequence. One shorter than two scores nothing.
        labels: [S, L] input_ids where a token is scored, -100 elsewhere.
        is_one_row: everything in one row, or rows at most as long as the longest sequence.

    Raises:
        ValueError: a mask with gaps, less than two columns, or labels that are other tokens.
    """
    if input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids must have two columns to be packed, one to feed and one to predict, got {input_ids.shape[1]}"
        )
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = attention_mask.argmax(1)
    length = attention_mask.sum(1)
    is_run = (columns >= first[:, None]) & (columns < (first + length)[:, None])
    if not torch.equal(is_run, attention_mask.bool()):
        raise ValueError("attention_mask must be one run of ones in each row to be packed, got one with gaps")
    if not ((labels == input_ids) | (labels == NO_LABEL)).all():
        raise ValueError("labels must be input_ids or -100 to be packed, got other tokens")
    # Nothing precedes a first token.
    ids, weight = input_ids.cpu(), (is_run & (labels != NO_LABEL) & (columns != first[:, None])).float().cpu()
    # A prompt of one token whose completion TRL masks: `pack` wants two, so a neighbour that scores nothing is lent.
    first, length = first.clamp(max=input_ids.shape[1] - 2), length.clamp(min=2)
    spans = [slice(start, start + n) for start, n in zip(first.tolist(), length.tolist(), strict=True)]
    sequences = [TokenSequence(ids[s, span], weight[s, span]) for s, span in enumerate(spans)]
    positions = [len(sequence.ids) - 1 for sequence in sequences]
    budget = max(1, sum(positions) if is_one_row else max(positions))
    batches = pack(sequences, token_budget=budget, device=input_ids.device)
    places = []
    for batch in batches:
        sequence = batch.sequence.repeat_interleave(batch.cu_seqlens.diff())
        places.append(sequence * (input_ids.shape[1] - 1) + first[sequence] + batch.position_ids)
    scored = [batch.target.where(batch.weight > 0, NO_LABEL) for batch in batches]
    return PackedRows(
        pad_sequence([batch.input_ids for batch in batches], batch_first=True),
        pad_sequence([batch.position_ids for batch in batches], batch_first=True),
        pad_sequence(scored, batch_first=True, padding_value=NO_LABEL),
        pad_sequence(places, batch_first=True),
    )


def pack_forward(model: Any, asked: PackedForward) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` pack; any other call of the model is what it was.

    Args:
        model: a causal LM that has TRL's fused head. Its `forward` is replaced on the instance, as TRL does.
        asked: read at every packed call.

    Raises:
        ValueError: the model lets packed sequences see each other.
    """
    unpacked = model.forward
    is_one_row = "flash" in (model.config._attn_implementation or "")
    require_isolation(model, unpacked)

    # `generate` checks its arguments against the signature of the model's own forward.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return unpacked(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None and name != "use_cache"}
        others = sorted(set(inputs) - {"input_ids", "attention_mask", "labels"})
        if args or others:
            raise ValueError(f"fastrl packs input_ids, attention_mask and labels given by name, got {others or args}")
        return _packed_call(unpacked, packed_rows(**inputs, is_one_row=is_one_row), inputs["labels"], asked)

    model.forward = MethodType(forward, model)


def _packed_call(unpacked: Callable[..., Any], rows: PackedRows, labels: Tensor, asked: PackedForward) -> Any:
    """TRL's fused forward on packed rows, its answers per token in the shape of labels [S, L] without a column."""
    scored = rows.labels != NO_LABEL
    place = rows.place[scored]
    rule = asked.rule
    call = HeadCall(scored.flatten(), None if rule is None else lambda lp, h, at: rule(lp, h, place[at]))
    with head_call(call):
        output = unpacked(
            input_ids=rows.input_ids, position_ids=rows.position_ids, shift_labels=rows.labels, fused_lm_head=True
        )
    padded = (labels.shape[0], labels.shape[1] - 1)
    found = {}
    for name in PER_TOKEN:
        value = getattr(output, name)
        if value is not None:
            full = value.new_zeros(padded[0] * padded[1]).index_put((place,), value[scored])
            found[name] = full.view(padded)
    asked.loss = call.loss
    asked.given = None if call.given is None else (*call.given, place)
    # A wrapper that looks for unused parameters starts from what forward returns.
    return replace(output, **found, loss=output.loss if call.loss is None else call.loss)


def require_isolation(model: Any, forward: Callable[..., Any]) -> None:
    """Ask for the gradient of one packed sequence's logits by its neighbour's embeddings: it must be exactly 0.

    State-space layers, short convolutions and masks that know nothing of position ids let it through.

    Raises:
        ValueError: it is not.
    """
    embeddings = model.get_input_embeddings()
    device, vocabulary = embeddings.weight.device, model.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9, device=device)[None] % vocabulary
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    embedded: list[Tensor] = []

    def as_leaf(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = embeddings.register_forward_hook(as_leaf)
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        logits = forward(input_ids=tokens, position_ids=positions, use_cache=False).logits
    model.train(was_training)
    hook.remove()
    gradient = torch.autograd.grad(logits[:, 5:].float().square().sum(), embedded[0])[0]
    if gradient[:, :5].any():
        raise ValueError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed sequences see "
            "each other: use TRL's own trainer with fastrl.integrations.trl.patch(), which does not pack"
        )
