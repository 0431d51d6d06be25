"""What the head costs at least, by arithmetic, nothing measured: `python -m bench.roofline [--svg docs/roofline.svg]`.

    seconds = operations / PEAK + bytes / BANDWIDTH

Operations are those of the matrix products. Bytes are what elementwise kernels read and write of the logits, and what
the sum of d weight reads and writes once per chunk; a product's own operands stream in under its arithmetic. Both
ceilings were measured on one H200: a bf16 product of 8192^3 and a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import log10
from pathlib import Path

import torch

from fastrl.ops.head import default_chunk_rows

PEAK = 790e12  # operations per second
BANDWIDTH = 4.3e12  # bytes per second
ROWS = 8192
SHAPES = {"Qwen3-0.6B": (1024, 151_936), "Llama-3-8B": (4096, 128_256)}  # D, V


@dataclass(frozen=True, slots=True)
class Method:
    """One way to get a policy loss's gradients out of a head.

    Attributes:
        name: in the table and the figure.
        products: matrix products of N D V, 2 operations each.
        logit_bytes: elementwise traffic of one logit.
        is_chunked: whether d weight is read and written once per chunk.
        colour: in the figure.
    """

    name: str
    products: int
    logit_bytes: int
    is_chunked: bool
    colour: str

    def operations(self, n: int, d: int, v: int) -> float:
        """Of the products, forward and backward."""
        return 2.0 * self.products * n * d * v

    def bytes(self, n: int, d: int, v: int) -> float:
        """Read and written outside the products, and in the sum of d weight."""
        chunks = -(-n // default_chunk_rows(n, v, torch.device("cuda")))
        return float(self.logit_bytes * n * v + (8 * chunks * v * d if self.is_chunked else 0))

    def seconds(self, n: int, d: int, v: int) -> float:
        """The least, one kernel after the other."""
        return self.operations(n, d, v) / PEAK + self.bytes(n, d, v) / BANDWIDTH

    def useful(self, n: int, d: int, v: int) -> float:
        """6 N D V, what any method must do, per second."""
        return 6.0 * n * d * v / self.seconds(n, d, v)


METHODS = (
    # to float32 2 + 4, log_softmax 4 + 4, its gradient's zeros 4, backward 4 + 4 + 4, to bf16 4 + 2
    Method("plain autograd, logits in memory", 3, 36, False, "#b3541e"),
    # float32 statistics read 4; backward recomputes the logits, reads 4 and writes bf16 2
    Method("chunks, logits computed twice", 4, 10, True, "#7a6fac"),
    # statistics read 4; gradient reads 4 and writes 2 while the logits are alive
    Method("single pass (linear_token_loss)", 3, 10, True, "#1b7f79"),
)


def table() -> Iterator[str]:
    """The figures as Markdown, a line at a time."""
    yield f"| head, N = {ROWS} | way | operations | bytes | ms at least | share of the bare products' speed |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for shape, (d, v) in SHAPES.items():
        for method in METHODS:
            x = (ROWS, d, v)
            cells = [
                f"{shape}, D = {d}, V = {v}",
                method.name,
                f"{method.products * 2}NDV = {_si(method.operations(*x))}",
            ]
            cells += [_si(method.bytes(*x)), f"{1e3 * method.seconds(*x):.1f}", f"{method.useful(*x) / PEAK:.0%}"]
            yield f"| {' | '.join(cells)} |"


def _si(x: float) -> str:
    return f"{x / 1e12:.1f} T" if x >= 1e12 else f"{x / 1e9:.1f} G"


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 430, 70, 20, 62, 56
LOW, HIGH, TALLEST = 50.0, 4000.0, 900.0  # operations per byte; TFLOP/s


def figure() -> str:
    """The roofline as SVG: what 6 N D V can run at, over operations per byte."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, "Policy loss over a linear head, forward and backward: calculated, not measured", size=15),
        _text(
            LEFT,
            42,
            f"N = {ROWS} rows, bf16, one H200: {PEAK / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12} TB/s",
            fill="#555",
        ),
    ]
    for y in range(0, int(TALLEST), 200):
        parts.append(_line([(LOW, y), (HIGH, y)], "#ddd"))
        parts.append(_text(LEFT - 8, _y(y) + 4, str(y), anchor="end"))
    for x in (50, 100, 200, 500, 1000, 2000, 4000):
        parts.append(_line([(x, 0), (x, 12)], "#555"))
        parts.append(_text(_x(x), HEIGHT - BOTTOM + 18, str(x), anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "operations per byte", anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    upright = _text(0, 0, "useful TFLOP/s (6NDV / time)", anchor="middle")
    parts.append(f'<g transform="translate(20 {middle}) rotate(-90)">{upright}</g>')
    steps = [LOW * (HIGH / LOW) ** (i / 60) for i in range(61)]
    ridge = PEAK / BANDWIDTH
    parts.append(_line([(LOW, LOW * BANDWIDTH / 1e12), (ridge, PEAK / 1e12), (HIGH, PEAK / 1e12)], "#222", 2))
    parts.append(_line([(x, 1 / (1e12 / PEAK + 1e12 / (x * BANDWIDTH))) for x in steps], "#222", 1, "5 4"))
    parts.append(_text(_x(HIGH), _y(PEAK / 1e12) - 8, "products and copies at the same time", anchor="end"))
    parts.append(_text(_x(75), _y(140), "one after the other", fill="#222"))
    parts += [mark for place, method in enumerate(METHODS) for mark in _marks(place, method)]
    return "\n".join([*parts, "</svg>", ""])


def _marks(place: int, method: Method) -> Iterator[str]:
    """A method's line in the legend and its point for each shape."""
    y = HEIGHT - BOTTOM - 84 + 22 * place
    yield f'<circle cx="{WIDTH - 290}" cy="{y - 4}" r="6" fill="{method.colour}"/>'
    yield _text(WIDTH - 278, y, f"{method.name}, {2 * method.products}NDV", fill=method.colour)
    for shape, (d, v) in SHAPES.items():
        x = (ROWS, d, v)
        at, speed = method.operations(*x) / method.bytes(*x), method.useful(*x) / 1e12
        yield f'<circle cx="{_x(at):.1f}" cy="{_y(speed):.1f}" r="6" fill="{method.colour}"/>'
        label = f"{shape}: {1e3 * method.seconds(*x):.1f} ms"
        yield _text(_x(at) + 10, _y(speed) + 17, label, fill=method.colour)


def _x(operations_per_byte: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * log10(operations_per_byte / LOW) / log10(HIGH / LOW)


def _y(tflops: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * tflops / TALLEST


def _line(points: list[tuple[float, float]], colour: str, width: float = 1, dashes: str = "") -> str:
    path = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222", size: int = 13) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}"'
    place += ' stroke="white" stroke-width="3" paint-order="stroke"'  # readable across a line
    return f"<text {place}>{text}</text>"


def main() -> None:
    """Print the table and write the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path, help="write the figure here")
    options = parser.parse_args()
    print("\n".join(table()))
    if options.svg:
        options.svg.write_text(figure())


if __name__ == "__main__":
    main()
