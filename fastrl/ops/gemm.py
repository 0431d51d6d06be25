"""Matrix products whose sums and results are float32 while 16-bit operands stay on the tensor cores.

On CUDA bf16 operands are multiplied as they are and the float32 accumulator is what comes out. Elsewhere `operand`
upcasts first, and so it does with fp16 everywhere: a token's gradient leaves its range before a GradScaler can help.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operand(x: Tensor) -> Tensor:
    """x itself where `mm` multiplies its dtype with float32 results, else a float32 copy."""
    if x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and x.is_cuda):
        return x
    return x.float()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for all others: the dtype of logits, statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulation dtype; a and b come from `operand`."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def mm_aligned(a: Tensor, b: Tensor) -> Tensor:
    """`mm` into `aligned_rows`: odd vocabularies keep the fast paths of products and kernels."""
    out = aligned_rows(a.shape[0], b.shape[1], accumulation_dtype(a), a.device)
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def aligned_rows(n: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh memory [N, columns]; on CUDA rows start at multiples of 16 numbers and own what lies between them."""
    if device.type != "cuda":
        return torch.empty((n, columns), dtype=dtype, device=device)
    return torch.empty((n, -(-columns // 16) * 16), dtype=dtype, device=device)[:, :columns]


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b without a temporary of total's size; total is in the accumulation dtype."""
    if a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    torch.addmm(total, a, b, out=total)
