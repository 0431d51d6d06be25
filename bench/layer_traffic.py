"""Counts what a decoder layer reads, writes, keeps and launches: `TRITON_INTERPRET=1 python -m bench.layer_traffic`.

A layer's cost for one token is linear in D, in I and in (heads + kv_heads) head_dim. Two models that differ in one of
them, less the same two with one layer fewer, give its coefficient. Nothing is timed, so any machine gives the same.
The figures stand in `fastrl.plan.layers`; a test compares.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton.runtime.interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from fastrl.data.pack import TokenSequence, pack
from fastrl.train.model import hidden_states, make_packed
from fastrl.train.native_layers import LayerKernels

SEQUENCES, POSITIONS = 1, 256  # one sequence: attention over several is bucketed on a CPU, which copies
PRODUCTS = ("aten.mm", "addmm", "bmm", "attention", "linear", "flash")
# Operators that move no data.
VIEWS = (
    *("view", "reshape", "transpose", "aten.t.", "detach", "expand", "slice", "split", "squeeze", "permute"),
    *("alias", "select.int", "empty", "as_strided", "unbind", "_local_scalar"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Of one token and layer: bytes forward, backward and kept; of one layer and micro-batch: kernels."""

    forward: float
    backward: float
    kept: float
    launches: float


class Traffic(TorchDispatchMode):
    """Adds up the inputs and outputs of every operator but products, attention and views.

    Attributes:
        bytes: read and written.
        launches: operators, products included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if not any(view in name for view in VIEWS):
            self.launches += 1
            if not any(product in name for product in PRODUCTS):
                self.move(args, kwargs, result)
        return result

    def move(self, *values: Any) -> None:
        """Add up the tensors among `values`."""
        self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


@contextmanager
def kernels_counted(traffic: Traffic) -> Iterator[None]:
    """Interpreted Triton kernels inside the block are counted as operators are, and do not run: no value is read."""
    executor = triton.runtime.interpreter.GridExecutor
    run = executor.__call__

    def count(self: Any, *args: Any, **options: Any) -> None:
        traffic.launches += 1
        traffic.move(args)

    executor.__call__ = count
    try:
        yield
    finally:
        executor.__call__ = run


def qwen3(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int) -> PreTrainedModel:
    """A random Qwen3 with heads of 32."""
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(hidden, intermediate, heads, kv_heads, layers)))


def llama(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int) -> PreTrainedModel:
    """A random Llama with heads of 32."""
    return LlamaForCausalLM(LlamaConfig(**_sizes(hidden, intermediate, heads, kv_heads, layers)))


def coefficients(
    make: Callable[..., PreTrainedModel], dtype: torch.dtype, layers: LayerKernels = "transformers"
) -> dict[str, Counted]:
    """What one more unit of D, I, heads * head_dim and kv_heads * head_dim costs, and one layer's launches.

    Args:
        make: (hidden, intermediate, heads, kv_heads, layers) -> model.
        dtype: float32 on a CPU runs the native layers where they are built.
        layers: "triton" needs TRITON_INTERPRET=1, set before anything imports triton.
    """
    base = (128, 256, 4, 2)
    plain = _of_a_layer(make, base, dtype, layers)
    wider = {
        "hidden": ((256, 256, 4, 2), 128),
        "intermediate": ((128, 512, 4, 2), 256),
        "heads": ((128, 256, 8, 2), 128),
        "kv_heads": ((128, 256, 4, 4), 64),
    }
    found = {}
    for name, (sizes, units) in wider.items():
        other = _of_a_layer(make, sizes, dtype, layers)
        found[name] = Counted(
            forward=(other.forward - plain.forward) / units,
            backward=(other.backward - plain.backward) / units,
            kept=(other.kept - plain.kept) / units,
            launches=plain.launches,
        )
    return found


def _of_a_layer(
    make: Callable[..., PreTrainedModel], sizes: tuple[int, ...], dtype: torch.dtype, layers: LayerKernels
) -> Counted:
    more, less = (_counted(make(*sizes, depth), dtype, layers) for depth in (3, 2))
    return Counted(
        forward=more.forward - less.forward,
        backward=more.backward - less.backward,
        kept=more.kept - less.kept,
        launches=more.launches - less.launches,
    )


def _counted(model: PreTrainedModel, dtype: torch.dtype, layers: LayerKernels) -> Counted:
    make_packed(model.to(dtype), device="cpu", attn_implementation="auto", gradient_checkpointing=False, layers=layers)
    ids = [i % 60 for i in range(POSITIONS + 1)]
    sequences = [TokenSequence(ids, [0.0] + POSITIONS * [1.0]) for _ in range(SEQUENCES)]
    (batch,) = pack(sequences, token_budget=SEQUENCES * POSITIONS)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is gone could give its address to another

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    tokens = SEQUENCES * POSITIONS
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Traffic() as forward, kernels_counted(forward):
        loss = hidden_states(model, batch).float().sum()
    with Traffic() as backward, kernels_counted(backward):
        loss.backward()  # type: ignore[no-untyped-call]
    return Counted(
        forward=forward.bytes / tokens,
        backward=backward.bytes / tokens,
        kept=sum(kept.values()) / tokens,
        launches=forward.launches + backward.launches,
    )


def _sizes(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int) -> dict[str, int]:
    return {
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }


def main() -> None:
    """Print the coefficients of both families, of the Triton layers too where they are interpreted."""
    kinds: list[tuple[torch.dtype, LayerKernels]] = [(torch.bfloat16, "transformers"), (torch.float32, "transformers")]
    if os.environ.get("TRITON_INTERPRET") == "1":
        kinds.append((torch.bfloat16, "triton"))
    for dtype, layers in kinds:
        for make in (qwen3, llama):
            print(f"\n{make.__name__}, {dtype}, {layers}".replace("torch.", ""))
            for name, each in coefficients(make, dtype, layers).items():
                print(f"  {name:14} forward {each.forward:6.1f}  backward {each.backward:6.1f}  kept {each.kept:5.1f}")
            print(f"  kernels of a layer {each.launches:.0f}")


if __name__ == "__main__":
    main()
