"""A network as a drawing: its stages from the image to the result, lower where they are coarser, with their skips.

An encoder–decoder becomes the well-known U, and pathways that run side by side are drawn side by side.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from medseg.explain.graph import IMAGE, Box, Edge, graph_of
from medseg.explain.layers import LayerTable
from medseg.explain.text import short_name, times
from medseg.formats.atomic import whole_file

WIDTH, HEIGHT = 2.3, 0.9
"""Inches of a stage."""
STEP_SAME, STEP_LEVEL, LEVEL = 3.05, 1.75, 1.5
"""Inches to the next column: where stages of both lie side by side, and where none do; and down to the next level."""
ROOF, ROOFS = 0.16, 0.24
"""Inches from a stage to a line that goes over the next one, and from that line to the next above it."""
ENCODER, BOTTOM, DECODER, ENDS = "#CFE3F5", "#E3E3E3", "#FBE0BF", "#FFFFFF"
LINE, SKIP, QUIET = "#333333", "#0B6E4F", "#666666"
LEGEND = "In each box: its name, channels × size of what it gives, its convolutions. Dashed: skips."
_LARGE, _MIDDLE, _SMALL = 11, 10, 9


def save_drawing(path: Path, table: LayerTable, *, title: str = "") -> None:
    """Draw a network as SVG, whole or not at all.

    Args:
        path: the file to write.
        table: its layers.
        title: a heading.
    Raises:
        MedsegError: E_OUTPUT if it cannot be written.
    """
    # Letters stay letters, and neither the time nor chance is in the file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medseg"}), whole_file(path, ".svg") as temporary:
        drawing_figure(table, title=title).savefig(temporary, format="svg", metadata={"Date": None})


def drawing_figure(table: LayerTable, *, title: str = "") -> Figure:
    """The drawing as a figure with a canvas of its own, for notebooks and TensorBoard."""
    boxes, edges = graph_of(table)
    places, roofs = _places(boxes, edges)
    right, bottom = max(x for x, _ in places.values()), min(y for _, y in places.values())
    top = HEIGHT / 2 + 0.35 + ROOFS * max((n for edge, n in roofs.items() if places[edge.source][1] == 0), default=0)
    foot = bottom - HEIGHT / 2 - 0.65
    figure = Figure(figsize=(right + WIDTH + 0.6, top + (0.5 if title else 0.0) - foot))
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-WIDTH / 2 - 0.3, right + WIDTH / 2 + 0.3)
    ax.set_ylim(foot, top + (0.5 if title else 0.0))
    ax.axis("off")
    deepest = max((box.level for box in boxes.values()), default=0)
    is_down = True
    for name, box in boxes.items():
        at_bottom = box.level == deepest and box.has_places
        is_down = is_down and not at_bottom and box.has_places
        _draw_stage(ax, places[name], _words(box), BOTTOM if at_bottom else ENCODER if is_down else DECODER)
    _draw_stage(ax, places[IMAGE], (IMAGE, times((table.in_channels, *table.size)), ""), ENDS)
    ways_up: dict[str, list[float]] = {}  # x of the lines that leave a stage to the right, and then go up
    for edge in edges:
        if places[edge.target][1] > places[edge.source][1]:
            ways_up.setdefault(edge.source, []).append(places[edge.target][0])
    told: set[tuple[str, int, float]] = set()
    for edge in sorted(edges, key=lambda edge: places[edge.source][0]):
        words: str | None = edge.skip or edge.step
        if roofs[edge]:  # the first of the edges that are one line is drawn whole
            line = (edge.target, roofs[edge], places[edge.source][1])
            words = None if line in told else words
            told.add(line)
        _draw_edge(ax, places[edge.source], places[edge.target], edge, words, roofs[edge], ways_up.get(edge.source, ()))
    if title:
        ax.text(-WIDTH / 2, top + 0.05, title, fontsize=13, weight="bold", va="bottom")
    ax.text(-WIDTH / 2, foot + 0.18, LEGEND, fontsize=_SMALL, color=QUIET, va="bottom")
    return figure


def _places(boxes: dict[str, Box], edges: list[Edge]) -> tuple[dict[str, tuple[float, float]], dict[Edge, int]]:
    """Centre of each stage, further right the later it can run, further down the coarser it is; and roofs of edges.

    Pathways of one resolution that run side by side would lie on each other: the later ones go down a level. A level
    lies lower by the roofs over it, so that they stay clear of what is written below the stages above.
    """
    cells: dict[str, tuple[int, int]] = {IMAGE: (0, 0)}
    for name, box in boxes.items():
        row = box.level
        while (box.column, row) in cells.values():
            row += 1
        cells[name] = (box.column, row)
    x = [0.0]
    taken = [
        {row for column, row in cells.values() if column == c} for c in range(1 + max(c for c, _ in cells.values()))
    ]
    for before, after in itertools.pairwise(taken):
        x.append(x[-1] + (STEP_SAME if before & after else STEP_LEVEL))
    roofs = _roofs(cells, edges)
    y = [0.0]
    for row in range(1, 1 + max(row for _, row in cells.values())):
        over = max((n for edge, n in roofs.items() if cells[edge.source][1] == row), default=0)
        y.append(y[-1] - LEVEL - ROOFS * over)
    return {name: (x[column], y[row]) for name, (column, row) in cells.items()}, roofs


def _roofs(cells: dict[str, tuple[int, int]], edges: list[Edge]) -> dict[Edge, int]:
    """How high above its stage each edge passes over others: 1 the lowest; 0 where nothing lies in its way.

    Edges from one level that mean the same to the same stage are one line; no other lines lie on each other.

    Args:
        cells: column and row of each stage.
        edges: between them.
    """
    roofs = dict.fromkeys(edges, 0)
    lines: dict[tuple[int, str, str], list[Edge]] = {}
    for edge in edges:
        (first, row), (last, end) = cells[edge.source], cells[edge.target]
        if end <= row and any(r == row and first < column < last for column, r in cells.values()):
            lines.setdefault((row, edge.target, edge.skip or edge.step), []).append(edge)
    spans = {line: (min(cells[e.source][0] for e in found), cells[line[1]][0]) for line, found in lines.items()}
    used: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for line in sorted(lines, key=lambda line: spans[line][1] - spans[line][0]):  # short ones below long ones
        start, stop = spans[line]
        roof = 1
        while any(start < b and a < stop for a, b in used.get((line[0], roof), ())):
            roof += 1
        used.setdefault((line[0], roof), []).append((start, stop))
        roofs |= dict.fromkeys(lines[line], roof)
    return roofs


def _words(box: Box) -> tuple[str, str, str]:
    """Three lines for a stage: its name, what it gives, what it does."""
    counts = Counter(
        f"{short_name(layer)} {times(layer.window.kernel)}" if layer.window is not None else short_name(layer)
        for layer in box.layers
        if layer.kind in ("convolution", "product")
    )
    work = ", ".join(f"{number} × {what}" if number > 1 else what for what, number in counts.most_common(2))
    return box.name, times(box.layers[-1].output), work


def _draw_stage(ax: Axes, place: tuple[float, float], words: tuple[str, str, str], colour: str) -> None:
    x, y = place
    ax.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", facecolor=colour,
            edgecolor=LINE, linewidth=1,
        )
    )  # fmt: skip
    for line, height, size, weight in zip(
        words, (0.25, 0, -0.26), (_LARGE, _LARGE, _SMALL), ("bold", "normal", "normal"), strict=True
    ):
        ax.text(x, y + height, line, ha="center", va="center", fontsize=size, weight=weight)


def _draw_edge(
    ax: Axes,
    source: tuple[float, float],
    target: tuple[float, float],
    edge: Edge,
    words: str | None,
    height: int,
    ways_up: Sequence[float],
) -> None:
    """A line to the right where both lie at one level, else down into the left side or up into the bottom.

    Args:
        ax: where to draw.
        source: centre of the stage that the line leaves.
        target: centre of the stage that it reaches.
        edge: what it is.
        words: what is written at it; None: it only rises to a roof that is there already.
        height: of the roof that it makes over stages in its way; 0: there are none.
        ways_up: x of lines that leave the same side and then go up.
    """
    (x0, y0), (x1, y1) = source, target
    colour = SKIP if edge.skip else LINE
    apart = 0.3 if edge.skip and ways_up else 0.0  # from the middle of the side, which the way up has
    roof = y0 + HEIGHT / 2 + ROOF + ROOFS * (height - 1)
    if edge.skip and y0 < y1:
        x1 -= 0.3  # the usual way up has the middle
    if y0 == y1 and height:
        x0, x1 = x0 + 0.3, x1 - 0.3
        points = [(x0, y0 + HEIGHT / 2), (x0, roof), (x1, roof), (x1, y1 + HEIGHT / 2)]
    elif y0 == y1:
        points = [(x0 + WIDTH / 2, y0 + apart), (x1 - WIDTH / 2, y1 + apart)]
    elif y1 < y0:
        points = [(x0, y0 - HEIGHT / 2), (x0, y1), (x1 - WIDTH / 2, y1)]
    elif height:
        points = [(x0 + 0.3, y0 + HEIGHT / 2), (x0 + 0.3, roof), (x1, roof), (x1, y1 - HEIGHT / 2)]
    else:
        points = [(x0 + WIDTH / 2, y0 + apart), (x1, y0 + apart), (x1, y1 - HEIGHT / 2)]
    dashes = "--" if edge.skip else "-"
    points = points[:2] if words is None else points
    ax.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.3, zorder=0)
    if words is None:
        return
    head = {"arrowstyle": "-|>", "color": colour, "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    before, end = points[-2:]
    start = tuple(e - 0.1 * np.sign(e - b) for b, e in zip(before, end, strict=True))
    ax.annotate("", end, start, arrowprops=head, zorder=0)
    what, _, cut = words.replace("global ", "global, ").partition(", ")  # in two lines, for the way is short
    if y0 == y1 and height:  # at its end, where no other line rises or falls
        ax.text(x1 - 0.06, roof + 0.03, words, ha="right", va="bottom", fontsize=_SMALL, color=colour)
    elif y0 == y1:
        middle, line = (x0 + x1) / 2, points[0][1]
        crossing = [x for x in ways_up if edge.skip and abs(x - middle) < 0.4]
        at, side = (max(crossing) + 0.05, "left") if crossing else (middle, "center")
        ax.text(at, line + 0.04, what, ha=side, va="bottom", fontsize=_MIDDLE, color=colour)
        ax.text(at, line - 0.06, cut, ha=side, va="top", fontsize=_SMALL, color=colour)
    else:
        level = y0 - HEIGHT / 2 - 0.14 if y1 < y0 else y1 - HEIGHT / 2 - 0.2
        x = x0 if y1 < y0 else x1
        x, side = (x - 0.07, "right") if edge.skip and y0 < y1 else (x + 0.07, "left")
        ax.text(x, level, words, ha=side, va="center", fontsize=_SMALL, color=colour)
