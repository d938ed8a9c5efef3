"""A network as a drawing: its stages from the image to the result, lower where they are coarser, with their skips.

What is drawn is what ran: a line is a map that one stage made and another took. So every network can be drawn, and an
encoder–decoder becomes the well-known U.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from medseg.explain.layers import Layer, LayerTable
from medseg.explain.text import short_name, times
from medseg.formats.atomic import whole_file

WIDTH, HEIGHT = 2.5, 0.86
"""Inches of a stage."""
STEP_SAME, STEP_LEVEL, LEVEL = 3.0, 2.0, 1.4
"""Inches to the next stage to the right: at the same level, and at another one; and down to the next level."""
ENCODER, BOTTOM, DECODER, ENDS = "#CFE3F5", "#E3E3E3", "#FBE0BF", "#FFFFFF"
LINE, SKIP = "#333333", "#0B6E4F"
_MERGED_BY = {"cat": "concat", "concat": "concat", "concatenate": "concat", "sub": "subtract", "mul": "multiply"}
_IMAGE = "image"


@dataclass(frozen=True)
class _Edge:
    """A map on its way.

    Args:
        source: stage that made it.
        target: stage that takes it.
        skip: how it is merged there with another one; "" for the way that the network takes from stage to stage.
        step: what the target does to its size, if anything.
    """

    source: str
    target: str
    skip: str
    step: str


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
    edges = _edges(table)
    stages = [stage for stage in table.stages if any(stage in (edge.source, edge.target) for edge in edges)]
    levels = _levels(table, stages)
    places = _places(stages, levels)
    right, bottom = max(x for x, _ in places.values()), min(y for _, y in places.values())
    size = (right + WIDTH + 0.6, -bottom + HEIGHT + (1.2 if title else 0.8))
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-WIDTH / 2 - 0.3, right + WIDTH / 2 + 0.3)
    ax.set_ylim(bottom - HEIGHT / 2 - 0.2, size[1] + bottom - HEIGHT / 2 - 0.2)
    ax.axis("off")
    deepest = max(levels.values(), default=0)
    first_deepest = next((i for i, stage in enumerate(stages) if levels[stage] == deepest), 0)
    for number, stage in enumerate(stages):
        colour = BOTTOM if levels[stage] == deepest else ENCODER if number < first_deepest else DECODER
        _draw_stage(ax, places[stage], _words(table, stage), colour)
    _draw_stage(ax, places[_IMAGE], (_IMAGE, times((table.in_channels, *table.size)), ""), ENDS)
    for edge in edges:
        level = places[edge.source][1]
        ends = sorted((places[edge.source][0], places[edge.target][0]))
        over = any(y == level and ends[0] < x < ends[1] for x, y in places.values())
        _draw_edge(ax, places[edge.source], places[edge.target], edge, over=over)
    if title:
        ax.text(-WIDTH / 2, HEIGHT / 2 + 0.5, title, fontsize=13, weight="bold", va="bottom")
    return figure


def _edges(table: LayerTable) -> list[_Edge]:
    """The lines of the drawing; what the network itself merges between its stages is not a stage."""
    layers, between = table.layers, _between(table)

    def makers(index: int) -> list[tuple[int, str]]:
        """Layers that made a map, the last one first, and how each was merged into it."""
        if index < 0 or layers[index].stage not in between:
            return [(index, "")]
        found = [maker for source in layers[index].sources for maker in makers(source)]
        found = sorted(dict(found).items(), reverse=True)
        name = _merge_name(layers[index])
        return [found[0], *((maker, how or name) for maker, how in found[1:])]

    edges: dict[tuple[str, str], _Edge] = {}
    for layer in layers:
        if layer.stage in between:
            continue
        for number, source in enumerate(layer.sources):
            is_skip = layer.kind == "merge" and source != max(layer.sources)
            for maker, how in makers(source):
                stage = layers[maker].stage if maker >= 0 else _IMAGE
                if stage == layer.stage:
                    continue
                name = how or (_merge_name(layer) if is_skip else "")
                if is_skip and maker >= 0 and layers[maker].output[1:] != layer.inputs[number][1:]:
                    name += f", cut to {times(layer.inputs[number][1:])}"
                edges.setdefault((stage, layer.stage), _Edge(stage, layer.stage, name, "" if name else _step(layer)))
    return list(edges.values())


def _between(table: LayerTable) -> set[str]:
    """What stands as a stage in the table, and is the network itself."""
    return {
        stage for stage in table.stages if any(other.startswith(f"{stage}.") or not stage for other in table.stages)
    }


def _merge_name(layer: Layer) -> str:
    return _MERGED_BY.get(layer.function, "add")


def _step(layer: Layer) -> str:
    """What changes the size, in words."""
    if layer.window is None:
        return "interpolation" if layer.kind == "interpolation" else ""
    if max(layer.window.stride) == 1:
        return ""
    name = "up-conv" if layer.kind == "transposed convolution" else short_name(layer)
    return f"{name} {times(layer.window.kernel)}, stride {times(layer.window.stride)}"


def _levels(table: LayerTable, stages: list[str]) -> dict[str, int]:
    """How often each stage has halved the image, rounded."""
    levels = {}
    for stage in stages:
        shape = table.of_stage(stage)[-1].output[1:]
        shrinking = [np.log2(max(1.0, n / max(m, 1))) for n, m in zip(table.size, shape, strict=False)]
        levels[stage] = round(max(shrinking, default=0.0) - 0.2)  # a little smaller without padding
    return levels


def _places(stages: list[str], levels: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Centre of each stage: further right the later it runs, further down the coarser it is."""
    places = {_IMAGE: (0.0, 0.0)}
    x, before = 0.0, 0
    for number, stage in enumerate(stages):
        level = levels[stage]
        x += STEP_SAME if level == before or not number else STEP_LEVEL
        places[stage], before = (x, -LEVEL * level), level
    return places


def _words(table: LayerTable, stage: str) -> tuple[str, str, str]:
    """Three lines for a stage: its name, what it gives, what it does."""
    layers = table.of_stage(stage)
    counts = Counter(
        f"{short_name(layer)} {times(layer.window.kernel)}"
        for layer in layers
        if layer.window is not None and layer.kind == "convolution"
    )
    work = ", ".join(f"{number} × {what}" if number > 1 else what for what, number in counts.most_common(2))
    return stage, times(layers[-1].output), work


def _draw_stage(ax: Axes, place: tuple[float, float], words: tuple[str, str, str], colour: str) -> None:
    x, y = place
    ax.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", facecolor=colour,
            edgecolor=LINE, linewidth=1,
        )
    )  # fmt: skip
    for line, height, size, weight in zip(
        words, (0.24, 0, -0.25), (10, 10, 8.5), ("bold", "normal", "normal"), strict=True
    ):
        ax.text(x, y + height, line, ha="center", va="center", fontsize=size, weight=weight)


def _draw_edge(ax: Axes, source: tuple[float, float], target: tuple[float, float], edge: _Edge, *, over: bool) -> None:
    """A line to the right where both lie at one level, else down into the left side or up into the bottom.

    Args:
        ax: where to draw.
        source: centre of the stage that the line leaves.
        target: centre of the stage that it reaches.
        edge: what it is.
        over: other stages lie between: the line goes over them.
    """
    (x0, y0), (x1, y1) = source, target
    colour, text = (SKIP, edge.skip) if edge.skip else (LINE, edge.step)
    if y0 == y1 and over:
        roof = y0 + HEIGHT / 2 + 0.22
        points = [(x0, y0 + HEIGHT / 2), (x0, roof), (x1, roof), (x1, y1 + HEIGHT / 2)]
    elif y0 == y1:
        points = [(x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)]
    elif y1 < y0:
        points = [(x0, y0 - HEIGHT / 2), (x0, y1), (x1 - WIDTH / 2, y1)]
    else:
        points = [(x0 + WIDTH / 2, y0), (x1, y0), (x1, y1 - HEIGHT / 2)]
    dashes = "--" if edge.skip else "-"
    ax.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.3, zorder=0)
    head = {"arrowstyle": "-|>", "color": colour, "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    before, end = points[-2:]
    near = tuple(e - 0.1 * np.sign(e - b) for b, e in zip(before, end, strict=True))
    ax.annotate("", end, near, arrowprops=head, zorder=0)
    what, _, cut = text.partition(", ")
    if y0 == y1:
        middle, height = (points[-2][0] + end[0]) / 2 if not over else (x0 + x1) / 2, max(y for _, y in points)
        ax.text(middle, height + 0.05, what, ha="center", va="bottom", fontsize=9, color=colour)
        ax.text(middle, height - 0.06, cut, ha="center", va="top", fontsize=8, color=colour)
    else:
        edge_of = y0 - HEIGHT / 2 - 0.14 if y1 < y0 else y1 - HEIGHT / 2 - (0.34 if edge.skip else 0.18)
        x = x0 if y1 < y0 else x1
        ax.text(x + 0.07, edge_of, text, ha="left", va="center", fontsize=8, color=colour)
