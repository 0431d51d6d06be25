"""How rows are cut into chunks."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops.head import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES, LEAST_CHUNK_ROWS, chunks, default_chunk_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("v", [2, 509, 151_936])
@pytest.mark.parametrize("n", [1, 7, 2000, 65_536])
def test_a_chunk_fits_its_budget_and_chunks_are_nearly_equal(n, v, device):
    rows = default_chunk_rows(n, v, device)
    budget = CUDA_CHUNK_BYTES if device == CUDA else CPU_CHUNK_BYTES
    assert 1 <= rows <= n
    assert rows <= LEAST_CHUNK_ROWS or 4 * rows * v <= budget
    sizes = [part.stop - part.start for part in chunks(n, rows)]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) < len(sizes)


def test_a_small_problem_is_one_chunk_and_an_empty_one_is_none():
    assert default_chunk_rows(2000, 100, CPU) == 2000
    assert default_chunk_rows(0, 100, CPU) == 1
    assert list(chunks(0, 1)) == []


def test_a_large_vocabulary_on_a_gpu_gets_more_than_a_thousand_rows():
    assert default_chunk_rows(8192, 151_936, CUDA) == 1639  # 8192 in five parts of about 0.93 GiB
