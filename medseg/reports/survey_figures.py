"""What a survey found, as figures and a table: to see a data set before anything is trained on it.

Each case is one mark; cases that the survey found to be unlike the rest are drawn in red. Figures have
their own canvas and leave pyplot alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from medseg.data.facts import CaseInfo, Survey
from medseg.labels import Labels
from medseg.reports.browse import UNDEFINED, Table
from medseg.reports.palette import class_colours
from medseg.volume import MODEL_ORIENTATION, Volume

USUAL, UNUSUAL = "#0072B2", "#D00000"
AXES_OF_VOLUMES = ("head to foot", "front to back", "side to side")
"""Those of `MODEL_ORIENTATION`, in words."""
AXES_OF_PICTURES = ("rows", "columns")
MAX_NAMED_CASES = 30
"""With more cases their names do not fit below an axis."""
NUM_BINS = 80
"""Of a histogram."""
SHOWN_PERCENTILES = (0.1, 99.9)
"""Intensities of an image from the left to the right end of its histogram."""
MM3_PER_ML = 1000.0
_WIDTH = 0.5
"""Share of a column over which its marks are spread."""


def cases_table(found: Survey) -> Table:
    """One row for each case, in the order of the survey: size, spacing, directions of its axes, what it lacks."""
    unusual = {anomaly.case_id for anomaly in found.anomalies}
    rows = []
    for case in found.cases:
        volumes = _volumes(found, case)
        missing = ", ".join(name for name, volume in zip(found.labels.foreground, volumes, strict=True) if not volume)
        voxels = "×".join(str(n) for n in case.shape)
        spacing = "×".join(f"{s:.3g}" for s in case.spacing_mm)
        field = "×".join(f"{n * s:.0f}" for n, s in zip(case.shape, case.spacing_mm, strict=True))
        marked = "unusual" if case.case_id in unusual else ""
        rows.append((case.case_id, voxels, spacing, field, case.orientation or UNDEFINED, missing, marked))
    unit = "mm" if _in_space(found) else "pixel"
    return Table(
        ("case", "voxels", f"spacing ({unit})", f"field of view ({unit})", "axes run to", "lacks", ""), tuple(rows)
    )


def geometry_figure(found: Survey) -> Figure:
    """Spacing and field of view of each case along the anatomical axes, however the axes of its file run."""
    names = AXES_OF_VOLUMES if _in_space(found) else AXES_OF_PICTURES
    unit = "mm" if _in_space(found) else "pixels"
    order = [case.axes_along(MODEL_ORIENTATION) for case in found.cases]
    spacing = np.array([[c.spacing_mm[a] for a in axes] for c, axes in zip(found.cases, order, strict=True)])
    voxels = np.array([[c.shape[a] for a in axes] for c, axes in zip(found.cases, order, strict=True)])
    figure = _figure(10, 3.4)
    for ax, values, what in zip(
        figure.subplots(1, 2), (spacing, spacing * voxels), ("spacing", "field of view"), strict=True
    ):
        _strips(ax, found, values, [USUAL] * len(names))
        ax.set_xticks(range(len(names)), names)
        ax.set_ylim(0, 1.08 * float(values.max()))
        ax.set_ylabel(f"{what} ({unit})")
    return figure


def intensities_figure(found: Survey, channel: int = 0) -> Figure:
    """Intensities of the structures in each case, ordered by their medians: from the 0.5th to the 99.5th percentile.

    Args:
        found: the survey.
        channel: of the images.
    """
    cases = sorted(found.cases, key=lambda case: case.intensity[channel].p50)
    unusual = {anomaly.case_id for anomaly in found.anomalies}
    figure = _figure(10, 3.4)
    ax = figure.subplots()
    for place, case in enumerate(cases):
        stats = case.intensity[channel]
        colour = UNUSUAL if case.case_id in unusual else USUAL
        ax.plot([place, place], [stats.p00_5, stats.p99_5], color=colour, alpha=0.5, linewidth=3)
        ax.plot(place, stats.p50, "o", color=colour, markersize=5)
    few = len(cases) <= MAX_NAMED_CASES
    names = [case.case_id for case in cases] if few else []
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    if not few:
        ax.set_xlabel("cases, by their median")
    ax.set_ylabel(f"intensity of the structures, {found.channel_names[channel]}", parse_math=False)
    return figure


def volumes_figure(found: Survey) -> Figure:
    """Volume of each structure (or region) in each case, on a logarithmic scale; a cross is a case without it."""
    names = found.labels.foreground
    volumes = np.array([_volumes(found, case) for case in found.cases])
    figure = _figure(max(5.0, 2 + 1.4 * len(names)), 3.6)
    ax = figure.subplots()
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_formatter(FuncFormatter(_plain))
    floor = 0.5 * float(volumes[volumes > 0].min()) if (volumes > 0).any() else 1.0
    _strips(ax, found, volumes, class_colours(len(names)), floor=floor)
    ax.set_xticks(range(len(names)), names)
    for text in ax.get_xticklabels():
        text.set_parse_math(False)
    ax.set_ylabel("volume (ml)" if _in_space(found) else "area (pixels)")
    return figure


def histogram_figure(image: Volume, indices: NDArray[np.integer], labels: Labels, channel: int = 0) -> Figure:
    """How often each intensity occurs in each class of one case: where curves overlap, no threshold parts them.

    Args:
        image: shape (C, *grid.shape).
        indices: class indices, shape grid.shape.
        labels: the classes; the background is drawn in grey.
        channel: of the image.
    """
    values = image.array[channel].astype(np.float32)
    low, high = (float(p) for p in np.percentile(values, SHOWN_PERCENTILES))
    bins = np.linspace(low, high, NUM_BINS + 1)
    figure = _figure(10, 3.2)
    ax = figure.subplots()
    colours = ["#999999", *class_colours(labels.num_classes - 1)]
    for index, (name, colour) in enumerate(zip(labels.names, colours, strict=True)):
        inside = values[indices == index]
        if inside.size:
            shares = np.histogram(inside, bins)[0] / inside.size
            ax.stairs(shares, bins, color=colour, linewidth=1.4, fill=index == 0, alpha=0.4 if index == 0 else 1)
            ax.plot([], [], color=colour, linewidth=3, label=name)
    ax.set_xlabel("intensity" + (" (HU)" if image.modality == "CT" else ""))
    ax.set_ylabel("share of the class's voxels")
    legend = ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(value: float, _position: int | None) -> str:
    """1, 2 and 5 times powers of ten as people write them; other marks of a logarithmic axis stay without a number."""
    return f"{value:g}" if round(value / 10 ** math.floor(math.log10(value))) in (1, 2, 5) else ""


def _in_space(found: Survey) -> bool:
    return bool(found.cases[0].orientation)


def _volumes(found: Survey, case: CaseInfo) -> list[float]:
    """Of each structure or region, in ml; pixels of pictures."""
    size = math.prod(case.spacing_mm) / MM3_PER_ML if _in_space(found) else 1.0
    return [size * sum(case.label_voxels[part] for part in parts) for parts in found.labels.parts]


def _strips(
    ax: Axes, found: Survey, values: NDArray[np.float64], colours: Sequence[str], *, floor: float | None = None
) -> None:
    """A column of marks for each of the columns of `values` (cases, columns), a line at its median.

    Args:
        floor: where a value of 0 is drawn, as a cross; None draws it as any other.
    """
    unusual = {anomaly.case_id for anomaly in found.anomalies}
    start, step = -_WIDTH / 2, _WIDTH / max(1, len(values) - 1)
    for column, colour in enumerate(colours):
        for row, (case, value) in enumerate(zip(found.cases, values[:, column], strict=True)):
            x, y, marker = column + start + step * row, float(value), "o"
            if floor is not None and not value:
                y, marker = floor, "X"
            shown = UNUSUAL if case.case_id in unusual else colour
            ax.plot(x, y, marker, color=shown, markersize=6, mec="#333333", mew=0.5)
        there = values[:, column][values[:, column] > 0] if floor is not None else values[:, column]
        if len(there):
            ax.plot([column - 0.35, column + 0.35], [np.median(there)] * 2, color="#222222", linewidth=1.3)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
