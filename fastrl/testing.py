"""What tests and benchmarks share: inputs, values with gradients, the accuracy rule, and a memory meter.

The accuracy rule: an implementation may err as much as the naive one in the same dtype does, plus a stated slack,
both measured against the specification in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Outputs = Tensor | tuple[Tensor, ...]


class ValueAndGrads(NamedTuple):
    """What a function returned, and its vector-Jacobian products with fixed cotangents."""

    values: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


def linear_logprob_inputs(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    peak: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] and target [N] int64, with logits of about unit variance.

    Args:
        n: rows.
        d: hidden size.
        v: vocabulary.
        dtype: of hidden and weight.
        device: where they are made; the numbers are drawn on the CPU and so are the same everywhere.
        peak: added to each row's target logit, about: 16 gives p close to 1 - 1e-6 x V.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    target = torch.randint(v, (n,), generator=generator)
    if peak:
        row = weight[target]
        hidden = hidden + peak * row / row.square().sum(-1, keepdim=True)
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def double(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The same numbers in float64; what is not a floating-point tensor stays as it is."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def value_and_grads(
    function: Callable[..., Outputs], *inputs: Any, differentiable: Sequence[int] | None = None
) -> ValueAndGrads:
    """Call `function` on fresh leaves and differentiate every output that has a gradient.

    The cotangent of output k is a fixed pattern of multiples of 1/2 in [-1, 1] (zeros among them), exact in
    every dtype; a scalar's is 1. An input that gets no gradient reports zeros.

    Args:
        function: returns a tensor or a tuple of tensors.
        inputs: tensors are detached; anything else is passed as it is.
        differentiable: places of the inputs to differentiate; None means all floating-point tensors.
    """
    chosen = range(len(inputs)) if differentiable is None else differentiable
    wanted = {i for i in chosen if isinstance(inputs[i], Tensor) and inputs[i].is_floating_point()}
    leaves = [x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    outputs = function(*leaves)
    values = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    roots = [(y, cotangent(y, k)) for k, y in enumerate(values) if y.requires_grad]
    sources = [leaves[i] for i in sorted(wanted)]
    grads: Sequence[Tensor | None] = [None] * len(sources)
    if roots and sources:
        grads = torch.autograd.grad([y for y, _ in roots], sources, [g for _, g in roots], allow_unused=True)
    filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(sources, grads, strict=True))
    return ValueAndGrads(tuple(y.detach() for y in values), filled)


def cotangent(output: Tensor, k: int) -> Tensor:
    """The fixed upstream gradient `value_and_grads` gives to output number k."""
    if output.dim() == 0:
        return torch.ones_like(output)
    i = torch.arange(output.numel(), device=output.device)
    return (((7 * i + 3 * k) % 5 - 2) / 2).to(output.dtype).reshape(output.shape)


def assert_no_worse_than(
    *, naive: ValueAndGrads, got: ValueAndGrads, truth: ValueAndGrads, slack: float, factor: float = 1.0
) -> None:
    """Fail unless max|got - truth| <= factor max|naive - truth| + slack max(1, max|truth|), tensor by tensor.

    Equal infinities count as no error; a NaN the truth does not have is an infinite one.
    """
    for kind in ("values", "grads"):
        triples = zip(*(_tensors(x, kind) for x in (naive, got, truth)), strict=True)
        for k, (a, b, exact) in enumerate(triples):
            assert b.shape == exact.shape, f"{kind}[{k}]: shape {tuple(b.shape)}, expected {tuple(exact.shape)}"
            allowed = factor * error(a, exact) + slack * max(1.0, magnitude(exact))
            assert error(b, exact) <= allowed, f"{kind}[{k}]: error {error(b, exact):.3g}, allowed {allowed:.3g}"


def _tensors(result: ValueAndGrads, kind: str) -> tuple[Tensor, ...]:
    return result.values if kind == "values" else result.grads


def error(got: Tensor, truth: Tensor) -> float:
    """max |got - truth| in float64; infinite where only `got` is NaN, 0 for equal infinities and empty tensors."""
    a, b = got.detach().double(), truth.detach().double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    return gap.max().item() if gap.numel() else 0.0


def magnitude(truth: Tensor) -> float:
    """Largest finite |truth|; 0 when there is none."""
    finite = truth.detach().double().abs()
    finite = finite[finite.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


class MemoryMeter(TorchDispatchMode):
    """Watches what torch operators allocate inside a `with` block, on any device.

    Attributes:
        largest_numel: elements of the largest tensor an operator returned.
        peak_bytes: most bytes alive at once in storages first seen inside the block.
    """

    def __init__(self, *inputs: Tensor) -> None:
        """`inputs` exist already: their storages are not counted."""
        super().__init__()
        self.largest_numel = 0
        self.peak_bytes = 0
        self._outside = {x.untyped_storage().data_ptr() for x in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # bytes of `_alive`, of which some may be gone

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._outside:
            return
        # An expanded tensor has more elements than memory; what it holds is its storage.
        self.largest_numel = max(self.largest_numel, storage.nbytes() // tensor.element_size())
        # A storage that is gone may have left its address to this one.
        self._at_most += storage.nbytes() - self._alive.get(storage._cdata, (None, 0))[1]
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._at_most > self.peak_bytes:  # only then is it worth asking each whether it is still there
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._at_most = sum(size for _, size in self._alive.values())
            self.peak_bytes = max(self.peak_bytes, self._at_most)


def gemm_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `run` makes, counted as 2 N D V each."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
