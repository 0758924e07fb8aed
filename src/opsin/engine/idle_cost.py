"""How much the cells of idle prefixes slow a decode step, learnt from the steps themselves."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.995
"""Weight of the past a step: about the last two hundred steps count."""

ENOUGH = 40.0
"""Steps before the line counts."""

_CLEAR = 0.3
"""Share of the steps' variance that cells must explain, or the slope is noise."""


@dataclass(slots=True)
class IdleCost:
    """A line through (cells in the memory, milliseconds a step), by least squares with fading weights.

    Only steps of one row a sequence are comparable, and only within one number of rows: the line starts anew when
    that number changes. `expected`, the share of a step that one cell adds, holds until the line is clear: other
    work on the machine may hide it for long.
    """

    expected: float = 0.0
    rows: int = 0
    _n: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _yy: float = 0.0

    def learn(self, rows: int, cells: int, ms: float) -> None:
        """A decode step of `rows` rows took `ms` milliseconds with `cells` cells in use."""
        if rows != self.rows:
            self.rows = rows
            self._n = self._x = self._y = self._xx = self._xy = self._yy = 0.0
        self._n = self._n * _MEMORY + 1
        self._x = self._x * _MEMORY + cells
        self._y = self._y * _MEMORY + ms
        self._xx = self._xx * _MEMORY + cells * cells
        self._xy = self._xy * _MEMORY + cells * ms
        self._yy = self._yy * _MEMORY + ms * ms

    def slowdown(self, idle: int, used: int) -> float:
        """The share of a step that `idle` of the `used` cells cost."""
        if idle <= 0:
            return 0.0
        slope, step_ms = self._line(used - idle)
        if slope > 0 and step_ms > 0:
            return slope * idle / step_ms
        return self.expected * idle / (1 + self.expected * (used - idle))

    def _line(self, cells: int) -> tuple[float, float]:
        """Milliseconds a cell, and of a step over so many cells; zeros while that is not clear."""
        if self._n < ENOUGH:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        var_x = self._xx / self._n - mean_x**2
        var_y = self._yy / self._n - mean_y**2
        cov = self._xy / self._n - mean_x * mean_y
        if var_x <= 1.0 or var_y <= 0.0 or cov <= 0.0 or cov**2 < _CLEAR * var_x * var_y:
            return 0.0, 0.0
        slope = cov / var_x
        return slope, mean_y + slope * (cells - mean_x)
