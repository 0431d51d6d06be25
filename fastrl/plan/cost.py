"""Seconds of a training step: operations over the products' rate plus bytes over the bandwidth, term by term.

    seconds = max(sum over terms of (operations / rate + max(bytes / bandwidth, logits * logit)),
                  launches * launch)

A product's own operands stream in under its arithmetic and cost no bytes here. Kernels of a step run one after the
other; the host that launches them runs ahead, so the slower of the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.plan.layers import BFLOAT16, FORWARD_SHARE, LayerCost
from fastrl.plan.machine import Machine
from fastrl.plan.workload import Workload

CHUNK_BYTES = 1 << 30  # float32 logits of a chunk of the head; a test compares it with fastrl.ops.head
ADAM_BYTES = {2: 46, 4: 40}  # one step, per parameter: gradient read twice and clipped, moments, master, weight
ACCUMULATE_BYTES = {2: 10, 4: 12}  # one micro-batch, per parameter: its gradient is added to the sum
HEAD_LAUNCHES = 12  # of a chunk
ADAPTER_LAUNCHES = 63  # of a layer: nine for each of seven matrices
SHARING_LAUNCHES = 27  # of a layer: one forward and seven backward for each of three, one and two for the outputs


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the step.

    Attributes:
        name: what it is.
        operations: of its products, a multiply and an add each one.
        bytes: read and written by kernels that are not products.
        launches: kernels.
        is_attention: its operations run at the attention's rate.
        is_layers: its bytes are those of the layers' elementwise kernels.
        logits: that the loss reads and differentiates; `bytes` counts them too, for a machine whose memory limits them.
    """

    name: str
    operations: float
    bytes: float
    launches: int = 0
    is_attention: bool = False
    is_layers: bool = False
    logits: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """On the device, one kernel after the other."""
        rate = machine.attention if self.is_attention else machine.products
        bandwidth = machine.layers or machine.bandwidth if self.is_layers else machine.bandwidth
        return self.operations / rate + max(self.bytes / bandwidth, self.logits * machine.logit)


def training_terms(work: Workload, layer: LayerCost = BFLOAT16, *, chunk_bytes: int = CHUNK_BYTES) -> list[Term]:
    """The terms of one optimizer step on one processor, log-probability passes included.

    Args:
        layer: what a layer costs beside its products.
        chunk_bytes: float32 logits of one chunk of the head.
    """
    shape, micro = work.shape, work.micro_batches
    again = int(work.checkpointing)
    passes = (2 if work.lora_r else 3) + again  # forward, d input, d weight unless frozen, and the forward again
    forward_again = FORWARD_SHARE * again
    kernels = layer.kernels(shape) * shape.layers * micro
    pair = 4.0 * shape.heads * shape.head_dim * shape.layers  # scores and values of one pair, forward
    extra = work.old_passes + int(work.has_reference)
    chunks = -(-int(work.head_rows) // max(1, chunk_bytes // (4 * shape.vocab)))
    is_shared = int(work.fed_tokens < work.tokens)
    kernels_shared = SHARING_LAUNCHES * shape.layers * micro * is_shared
    terms = [
        Term("layers: products", 2.0 * passes * shape.backbone * work.fed_tokens, 0.0),
        Term(
            "layers: attention",
            # 2 products forward, 5 backward (the scores again): 3.5 times forward in all
            pair * work.attention_pairs * (4.5 if work.checkpointing else 3.5),
            0.0,
            is_attention=True,
        ),
        Term(
            "layers: elementwise",
            0.0,
            (1 + forward_again) * layer.traffic(shape) * shape.layers * work.fed_tokens,
            int(kernels * (1 + forward_again)),
            is_layers=True,
        ),
        Term(
            "head: products and loss",
            (4.0 if work.lora_r else 6.0) * work.head_rows * shape.head,
            10.0 * work.head_rows * shape.vocab + (0.0 if work.lora_r else 8.0 * chunks * shape.head),
            HEAD_LAUNCHES * chunks,
            logits=work.head_rows * shape.vocab,
        ),
        Term("layers: shared prompts", 0.0, _sharing_bytes(work, layer.element) * is_shared, kernels_shared),
        Term(
            "adapters",
            2.0 * (3 + again) * work.adapter * work.fed_tokens,
            (1 + forward_again) * adapter_bytes(work, layer.element) * work.fed_tokens,
            int(ADAPTER_LAUNCHES * shape.layers * micro * (1 + forward_again)) * int(work.lora_r > 0),
        ),
        Term("gradients: sum", 0.0, float(ACCUMULATE_BYTES[layer.element]) * micro * work.trainable),
        Term("optimizer", 0.0, float(ADAM_BYTES[layer.element]) * work.trainable, 8),
    ]
    if extra:
        products = 2.0 * (shape.backbone * work.fed_tokens + shape.head * work.head_rows) * extra
        bytes_ = (
            FORWARD_SHARE * layer.traffic(shape) * shape.layers * work.fed_tokens + 4.0 * work.head_rows * shape.vocab
        )
        products += 2.0 * work.adapter * work.fed_tokens * work.old_passes  # the reference has none
        bytes_ = (
            bytes_ * extra + adapter_bytes(work, layer.element, is_forward=True) * work.fed_tokens * work.old_passes
        )
        name = "log-probabilities of reference and sampling policy"
        terms.append(Term(name, products, bytes_, int(kernels * FORWARD_SHARE) * extra))
        terms.append(Term(name + ": attention", pair * work.attention_pairs * extra, 0.0, is_attention=True))
    return terms


def adapter_bytes(work: Workload, element: int, *, is_forward: bool = False) -> float:
    """Of one token in all layers: peft scales each matrix's output and adds it, and adds up the gradients of its input.

    Ten of an output (written, scaled, added; its gradient scaled and read twice) and six of an input (read twice, its
    gradient written and added): their products are as thin as the rank and wait for memory too. Six of an output and
    one of an input are the forward pass.
    """
    inputs, outputs = work.shape.layer_widths
    moved = 6 * outputs + inputs if is_forward else 10 * outputs + 6 * inputs
    return float(element * work.shape.layers * moved) if work.lora_r else 0.0


def _sharing_bytes(work: Workload, element: int) -> float:
    """Queries, keys and values are copied for all positions, their gradients for those that are fed, the others' summed
    in float32; outputs are picked for the positions that are fed and their gradients put back."""
    shape, fed = work.shape, work.fed_tokens
    others = work.tokens - fed
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    read = (queries + 2 * keys) * (2 * element * (work.tokens + fed) + (element + 16) * others)
    return float(shape.layers * (read + queries * element * (4 * fed + work.tokens)))


def step_seconds(terms: Sequence[Term], machine: Machine) -> float:
    """The step's time: the device's, or the host's where that is longer."""
    device = sum(term.seconds(machine) for term in terms)
    return max(device, machine.launch * sum(term.launches for term in terms))


def useful_operations(work: Workload) -> float:
    """Operations that the step cannot do without: forward and backward of the trained tokens, nothing twice."""
    shape = work.shape
    attention = 12.0 * shape.heads * shape.head_dim * shape.layers * work.attention_pairs
    passes = 4.0 if work.lora_r else 6.0  # a frozen matrix has no gradient
    products = passes * (shape.backbone * work.fed_tokens + shape.head * work.head_rows)
    return products + 6.0 * work.adapter * work.fed_tokens + attention


def mfu(work: Workload, seconds: float, machine: Machine) -> float:
    """Share of the data sheet's peak that useful operations take."""
    return useful_operations(work) / seconds / machine.peak
