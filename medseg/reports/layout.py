"""Where panels of given aspect go, so that every one is filled to its edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LANDSCAPE = 1.5
"""Width over height that a figure should come close to."""
_AREA = 48.0
"""Square inches of all panels together."""
_GAP, _MARGIN, _HEADING, _TITLE, _LEGEND_LINE = 0.08, 0.14, 0.2, 0.34, 0.2
"""Inches: between panels, around the figure, above each panel, for the title, for a line of the legend."""
_LEGEND_WIDTH = 2.2
"""Inches for one entry of the legend."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Layout:
    """A figure's plan.

    Args:
        size: (width, height) in inches.
        boxes: (left, bottom, width, height) of each panel in shares of the figure, as the aspects were given.
        title_at: (x, y) of the title's left centre.
        legend_at: (x, y) of the legend's lower left corner.
        legend_columns: entries side by side.
    """

    size: tuple[float, float]
    boxes: list[list[Box]]
    title_at: tuple[float, float]
    legend_at: tuple[float, float]
    legend_columns: int


@dataclass(frozen=True)
class _Table:
    """Column widths and row heights without unit, and (thing, view) → (row, column)."""

    widths: list[float]
    heights: list[float]
    place: Callable[[int, int], tuple[int, int]]


def arrange(aspects: Sequence[float], *, num_rows: int, title: bool, num_legend: int) -> Layout:
    """Lay out `num_rows` things, each shown in the same views.

    The cells of the table have the aspect of their panel, so nothing is wasted: either a view is a column (all panels
    equally high), or a view is a row (all panels equally wide); the panels of a single view stand in any full
    rectangle. The one that comes closest to `LANDSCAPE` is taken.

    Args:
        aspects: width over height of each view.
        num_rows: number of things shown in each view (the scan, the scan with its masks).
        title: leave space for a title.
        num_legend: number of entries of the legend.
    Returns:
        The plan; its boxes are indexed [thing][view].
    """

    def distance(table: _Table) -> float:
        return abs(math.log(sum(table.widths) / sum(table.heights) / LANDSCAPE))

    table = min(_tables(aspects, num_rows), key=distance)
    scale = math.sqrt(_AREA / (sum(table.widths) * sum(table.heights)))
    widths, heights = [w * scale for w in table.widths], [h * scale for h in table.heights]
    inner_width = sum(widths) + _GAP * (len(widths) - 1)
    columns = max(1, min(num_legend, int(inner_width / _LEGEND_WIDTH)))
    below = _MARGIN + (math.ceil(num_legend / columns) * _LEGEND_LINE if num_legend else 0)
    above = _TITLE if title else 0.04
    width = inner_width + 2 * _MARGIN
    height = above + sum(heights) + len(heights) * (_HEADING + _GAP) + below

    def box(thing: int, view: int) -> Box:
        row, column = table.place(thing, view)
        left = _MARGIN + sum(widths[:column]) + _GAP * column
        bottom = height - above - sum(heights[: row + 1]) - (row + 1) * _HEADING - row * _GAP
        return left / width, bottom / height, widths[column] / width, heights[row] / height

    return Layout(
        size=(width, height),
        boxes=[[box(thing, view) for view in range(len(aspects))] for thing in range(num_rows)],
        title_at=(_MARGIN / width, 1 - 0.6 * above / height),
        legend_at=(_MARGIN / width, 0.8 * _MARGIN / height),
        legend_columns=columns,
    )


def _tables(aspects: Sequence[float], num_rows: int) -> list[_Table]:
    if len(aspects) == 1:
        return [
            _Table([aspects[0]] * columns, [1.0] * (num_rows // columns), lambda t, _, c=columns: divmod(t, c))  # type: ignore[misc]
            for columns in range(1, num_rows + 1)
            if num_rows % columns == 0
        ]
    return [
        _Table(list(aspects), [1.0] * num_rows, lambda thing, view: (thing, view)),
        _Table([1.0] * num_rows, [1 / a for a in aspects], lambda thing, view: (view, thing)),
    ]
