"""Products of 16-bit operands are float32 sums: small terms survive beside large ones."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops.gemm import accumulation_dtype, addmm_, mm, operand

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_not_rounded_to_the_operands(dtype, device):
    # 256 + 0.5 needs 10 bits of mantissa; bf16 has 8. The sum over 64 such chunks needs 16.
    a = operand(torch.tensor([[256.0, 0.5]], dtype=dtype, device=device))
    b = operand(torch.ones(2, 1, dtype=dtype, device=device))
    product = mm(a, b)
    assert product.dtype == accumulation_dtype(torch.empty(0, dtype=dtype))
    assert product.item() == 256.5
    total = torch.zeros_like(product)
    for _ in range(64):
        addmm_(total, a, b)
    assert total.item() == 64 * 256.5


def test_operands_that_need_no_upcast_are_not_copied():
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        assert operand(x) is x
