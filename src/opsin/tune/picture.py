"""Latency against throughput as a picture: SVG for a browser, characters for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from opsin.tune.pareto import Point, pareto

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 64
_COLUMNS, _ROWS = 56, 14


def plot_svg(points: Sequence[Point], picked: Point) -> str:
    """An SVG file's text: answers a second over seconds of one question; up and left is better."""
    front = pareto(points)
    place = _scale(points, _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN)
    spots = {point.name: tuple(round(_MARGIN + value, 1) for value in place(point)) for point in points}
    line = " ".join(f"{spots[point.name][0]},{spots[point.name][1]}" for point in front)
    left, bottom, right, top = _MARGIN, _HEIGHT - _MARGIN, _WIDTH - _MARGIN, _MARGIN
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12">',
        "<style>text { font-family: sans-serif }</style>",
        "<title>Latency against throughput</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{left} {top - 20}V{bottom + 20}H{right + 20}" fill="none" stroke="#888"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">seconds of one question asked alone</text>',
        '<text x="8" y="20">answers a second of many at once (up and left is better)</text>',
        f'<polyline points="{line}" fill="none" stroke="#c60" stroke-dasharray="4 3"/>',
    ]
    for point in points:
        x, y = spots[point.name]
        fill = "#c60" if point == picked else "#fff"
        edge = "#c60" if point in front else "#888"
        label = f"{point.name}: {point.latency_s:.2f} s, {point.answers_s:.2f}/s"
        body.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}" stroke="{edge}" stroke-width="2"/>')
        # Labels stay inside the picture.
        anchor, shift = ("end", -9) if x > _WIDTH / 2 else ("start", 9)
        body.append(f'<text x="{x + shift}" y="{y - 7}" text-anchor="{anchor}">{escape(label)}</text>')
    return "\n".join([*body, "</svg>", ""])


def plot_text(points: Sequence[Point], picked: Point) -> str:
    """The same in characters, with a legend: `*` was picked, letters in capitals are beaten by nobody."""
    front = pareto(points)
    place = _scale(points, _COLUMNS - 1, _ROWS - 1)
    grid = [[" "] * _COLUMNS for _ in range(_ROWS)]
    legend = []
    for index, point in enumerate(points):
        letter = chr(ord("a") + index % 26)
        mark = "*" if point == picked else letter.upper() if point in front else letter
        x, y = place(point)
        grid[round(y)][round(x)] = mark
        legend.append(f"  {mark} {point.name}: {point.latency_s:.3f} s, {point.answers_s:.3f} answers/s")
    rows = [f"  |{''.join(row).rstrip()}" for row in grid]
    axis = f"  +{'-' * _COLUMNS}> seconds of one question"
    return "\n".join(["  ^ answers/s of many at once", *rows, axis, *legend])


def _scale(points: Sequence[Point], width: float, height: float) -> Callable[[Point], tuple[float, float]]:
    xs, ys = [point.latency_s for point in points], [point.answers_s for point in points]

    def along(value: float, values: Sequence[float]) -> float:
        low, high = min(values), max(values)
        return 0.5 if high == low else (value - low) / (high - low)

    return lambda point: (width * along(point.latency_s, xs), height * (1 - along(point.answers_s, ys)))
