"""1 when the completion is a solution of its row's sudoku: any solution, of any box size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isqrt

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

LARGEST_SIDE = 64

Grid = tuple[tuple[int, ...], ...]
Box = tuple[int, int]

_NUMBER = re.compile(r"\d+", re.ASCII)


@promises(in_process=True, pure=True)
def sudoku(
    completions: Sequence[object], puzzle: Sequence[object], box: Sequence[Sequence[int]] | None = None, **_: object
) -> list[float]:
    """1.0 where the answer fills the grid: each row, column and box holds 1 .. N once, every clue is kept; else 0.0.

    The answer part must hold N x N whole numbers and no other digits, whatever stands between them; up to N = 9 digits
    may also stand together, as in "1234".

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        puzzle: [S] grids: lists of rows with 0 for a blank, or up to N = 9 texts of N x N digits, 0 or "." for a blank.
        box: [S] rows and columns of a box, whose product is N; without it the squarest: 3 x 3, 2 x 3, 3 x 4, ...

    Raises:
        ValueError: a puzzle is no grid, or its clues break the rules. `check_rewards` finds that before training.
    """
    boxes: Sequence[Sequence[int] | None] = [None] * len(completions) if box is None else box
    return [
        float(_solves(completion_text(completion), puzzle_grid(each), shape))
        for completion, each, shape in zip(completions, puzzle, boxes, strict=True)
    ]


def puzzle_grid(puzzle: object) -> Grid:
    """The clues of a puzzle, 0 for a blank; ValueError when it is no square grid with numbers in range."""
    if isinstance(puzzle, str):
        digits = [0 if character == "." else int(character) for character in re.findall(r"[0-9.]", puzzle)]
        n = isqrt(len(digits))
        rows = [digits[start : start + n] for start in range(0, len(digits), n)] if n else []
    elif isinstance(puzzle, list | tuple) and all(isinstance(row, list | tuple) for row in puzzle):
        rows = [[0 if cell is None else cell for cell in row] for row in puzzle]
        n = len(rows)
    else:
        raise ValueError(f"sudoku needs a puzzle as a list of rows or a text of digits, got {puzzle!r:.80}")
    is_square = 0 < n <= LARGEST_SIDE and len(rows) == n and all(len(row) == n for row in rows)
    if not is_square or any(not isinstance(cell, int) or not 0 <= cell <= n for row in rows for cell in row):
        raise ValueError(f"sudoku needs an N x N puzzle of numbers from 0 (blank) to N, got {puzzle!r:.80}")
    return tuple(tuple(row) for row in rows)


def check_puzzle(puzzle: object) -> None:
    """ValueError when a puzzle is no grid, or two equal clues share a row or a column."""
    grid = puzzle_grid(puzzle)
    for line in (*grid, *zip(*grid, strict=True)):
        clues = [cell for cell in line if cell]
        if len(set(clues)) < len(clues):
            raise ValueError(f"sudoku: this puzzle has a clue twice in a row or a column: {puzzle!r:.80}")


def box_shape(n: int, box: Sequence[int] | None = None) -> Box:
    """Rows and columns of a box of an N x N sudoku; ValueError when the given ones do not multiply to N."""
    if box is None:
        rows = next(r for r in range(isqrt(n), 0, -1) if n % r == 0)
        return rows, n // rows
    if len(box) != 2 or box[0] < 1 or box[0] * box[1] != n:
        raise ValueError(f"sudoku: a box must be [rows, columns] with rows x columns = {n}, got {list(box)}")
    return box[0], box[1]


def _solves(text: str, clues: Grid, box: Sequence[int] | None) -> bool:
    n = len(clues)
    rows, columns = box_shape(n, box)
    grid = _grid_in(text, n)
    if grid is None:
        return False
    keeps = all(clue in (0, grid[i][j]) for i, line in enumerate(clues) for j, clue in enumerate(line))
    boxes = [
        [grid[top + i][left + j] for i in range(rows) for j in range(columns)]
        for top in range(0, n, rows)
        for left in range(0, n, columns)
    ]
    whole = set(range(1, n + 1))
    return keeps and all(set(unit) == whole for unit in (*grid, *zip(*grid, strict=True), *boxes))


def _grid_in(text: str, n: int) -> Grid | None:
    answer = final_answer(text)
    if answer is None:
        return None
    numbers = _NUMBER.findall(answer)
    if n <= 9 and len(numbers) < n * n:
        numbers = list("".join(numbers))
    if len(numbers) != n * n or any(len(number) > 2 for number in numbers):
        return None
    return tuple(tuple(int(number) for number in numbers[start : start + n]) for start in range(0, n * n, n))
