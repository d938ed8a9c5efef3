"""The report's drawings as SVG that takes its ink from the page: dark on light paper, light on dark screens."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medseg.metrics.calibration import Calibration
from medseg.metrics.masks import State
from medseg.metrics.metric import Metric
from medseg.reports.confidence import volume_agreements
from medseg.reports.evaluation import Evaluation, Row
from medseg.reports.palette import class_colours

MAX_LINKED = 1500
"""Points of a drawing that are links to their case; more are one picture within the drawing, which bounds its size."""
MAX_PANELS = 12
"""Classes whose volumes are drawn: those that agree least. The table has all."""
VOLUMES = ("predicted_volume", "reference_volume")
INK, QUIET, FAINT = "#000000", "#555555", "#BBBBBB"
"""Colours that the page replaces by its own."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.image_inline": True,
    "font.size": 9,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_PAGE = {
    INK: "var(--ink)",
    "#222222": "var(--ink)",
    "#333333": "var(--ink)",
    QUIET: "var(--quiet)",
    FAINT: "var(--line)",
}
_MISSED_WIDTH = 0.12
"""Share of the axis of a distance that is kept for missed and spurious structures."""
_REFERENCES = re.compile(r'((?:\bid="|href="#|url\(#))(?!case-)')
_LINK = re.compile(r'<a xlink:href="#case-(\d+)"[^>]*>')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def drawing() -> AbstractContextManager[None]:
    """How figures look that are drawn within: of the size of the page's small text."""
    return mpl.rc_context(_SETTINGS)


def to_svg(figure: Figure, name: str, label: str, cases: Sequence[str] = ()) -> Markup:
    """A figure as inline SVG.

    Args:
        figure: drawn with `INK`, `QUIET` and `FAINT` where the page's colours belong.
        name: letters and digits; the prefix of its ids, which are unique within the page then.
        label: what it shows, for readers who do not see it.
        cases: ids that links of points (`#case-NUMBER`) count.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS | {"svg.hashsalt": name}):  # a salt: the same numbers give the same file
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = _METADATA.sub("", text[text.index("<svg") :], count=1)
    # Texts of files are escaped by Matplotlib and hold no tag: what follows changes tags alone.
    tags = re.split(r"(<[^>]*>)", text)
    for i in range(1, len(tags), 2):
        tag = tags[i]
        for colour, variable in _PAGE.items():
            tag = tag.replace(colour.lower(), variable)
        tag = _REFERENCES.sub(rf"\g<1>{name}-", tag)
        link = _LINK.match(tag)
        if link:
            number = link.group(1)
            tag = f'<a href="#case-{number}"><title>{html.escape(cases[int(number)])}</title>'
        tags[i] = tag
    width, height = figure.get_size_inches()
    tags[1] = (
        f'<svg role="img" aria-label="{html.escape(label)}" style="width:{96 * width:.0f}px" '
        f'viewBox="0 0 {72 * width:g} {72 * height:g}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup("".join(tags))  # noqa: S704 (made here; see the comment above)


def distribution_figure(evaluation: Evaluation, metric: Metric) -> Figure:
    """Points and boxes, a row per class: quartiles, median, whiskers to the last point within 1.5 interquartile ranges.

    A point is a case; a cross is one where one of the two masks is empty. Points link to the table of cases. Distances
    of such cases, the diagonals of their scans, would press all others together: they stand at the end of the axis.
    """
    names = evaluation.labels.foreground
    by_class = rows_by_class(evaluation)
    number = {case: i for i, case in enumerate(evaluation.cases)}
    figure = Figure(figsize=(4.7, 0.75 + 0.5 * max(2, len(names))), layout="constrained")
    ax = figure.subplots()
    linked = len(evaluation.rows) <= MAX_LINKED
    end = _end_of_distances(evaluation, metric)
    spread = _jitter(len(number))
    for place, (name, colour) in enumerate(zip(names, class_colours(len(names)), strict=True)):
        rows = [r for r in by_class[name] if not math.isnan(r.values[metric.name])]
        values = np.array([r.values[metric.name] for r in rows])
        if not len(values):
            ax.annotate("in no case", (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center",
                        color=QUIET, fontsize=8)  # fmt: skip
            continue
        heights = np.array([place + spread[number[r.case]] for r in rows])
        found = np.array([r.state is State.PRESENT for r in rows])
        size = 16 if len(rows) <= 100 else 8
        shown = values if end is None else np.where(found, values, end * (1 + _MISSED_WIDTH / 2))
        for marker, of, area in (("o", found, size), ("X", ~found, 34)):
            points = ax.scatter(shown[of], heights[of], s=area, marker=marker, color=colour, edgecolors=INK,
                                linewidths=0.4, alpha=0.9, clip_on=False, zorder=3, rasterized=not linked)  # fmt: skip
            if linked:
                points.set_urls([f"#case-{number[r.case]}" for r, chosen in zip(rows, of, strict=True) if chosen])
        if len(values) > 1:
            _box(ax, values, place)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if metric.dimension == "ratio" and metric.better:
        ax.set_xlim(_start_of_shares(evaluation, metric) - 0.02, 1.02)
    elif end is not None:
        ax.set_xlim(0, end * (1 + _MISSED_WIDTH))
        ax.axvspan(end, end * (1 + _MISSED_WIDTH), facecolor=FAINT, alpha=0.45, linewidth=0)
        ax.annotate("missed,\nspurious", (end * (1 + _MISSED_WIDTH / 2), 0), xycoords=("data", "axes fraction"),
                    xytext=(0, -4), textcoords="offset points", ha="center", va="top", fontsize=7)  # fmt: skip
        ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick < 0.93 * end])
    elif metric.better:
        ax.set_xlim(left=0)
    unit = metric.unit(evaluation.frame)
    ax.set_xlabel(f"{metric.title} ({unit})" if unit else metric.title)
    _quieten(ax, "x")
    ax.tick_params(axis="y", length=0)
    return figure


def _start_of_shares(evaluation: Evaluation, metric: Metric) -> float:
    """Where the axis of a share begins: below the lowest value, so that what differs can be seen; at most at 0.8."""
    values = [value for row in evaluation.rows if not math.isnan(value := row.values[metric.name])]
    return min(0.8, max(0.0, math.floor(10 * min(values, default=0.0) - 0.3) / 10))


def _end_of_distances(evaluation: Evaluation, metric: Metric) -> float | None:
    """Where the axis of a distance ends and its missed structures begin; None where they need no place of their own."""
    values = [(row.values[metric.name], row.state) for row in evaluation.rows if row.state is not State.ABSENT]
    found = [v for v, state in values if state is State.PRESENT and not math.isnan(v)]
    others = [v for v, state in values if state is not State.PRESENT and not math.isnan(v)]
    if metric.dimension != "length" or metric.better != "lower" or not found or not others:
        return None
    end = 1.05 * max(found)
    return end if 0 < end < min(others) else None


def agreement_figure(evaluation: Evaluation, metric: Metric) -> tuple[Figure, list[str]] | None:
    """Bland–Altman: for each class how much too large or too small predicted volumes are, over the volume.

    Args:
        evaluation: with predicted and reference volumes.
        metric: one of the volumes: its unit.
    Returns:
        The figure and the classes that there was no room for; None where no class has two cases.
    Source:
        Bland and Altman, Lancet 1986; limits as `statistics.agreement` has them.
    """
    agreements = {name: a for name, a in volume_agreements(evaluation).items() if a.n > 1}
    if not agreements:
        return None
    names = evaluation.labels.foreground
    worst = sorted(agreements, key=lambda name: _doubt(agreements[name].icc))[:MAX_PANELS]
    shown = [name for name in names if name in worst]
    by_class = rows_by_class(evaluation)
    number = {case: i for i, case in enumerate(evaluation.cases)}
    colours = dict(zip(names, class_colours(len(names)), strict=True))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.3, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    unit = metric.unit(evaluation.frame)
    linked = len(shown) * len(number) <= MAX_LINKED
    for ax in panels.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, name in zip(panels.flat, shown, strict=False):
        cases = [
            r for r in by_class[name] if not math.isnan(r.values["predicted_volume"] - r.values["reference_volume"])
        ]
        pair = np.array([[r.values["predicted_volume"], r.values["reference_volume"]] for r in cases])
        both = np.array([r.state is State.PRESENT for r in cases])
        for marker, of, area in (("o", both, 16), ("X", ~both, 34)):
            points = ax.scatter(pair[of].mean(axis=1), pair[of, 0] - pair[of, 1], s=area, marker=marker,
                                color=colours[name], edgecolors=INK, linewidths=0.4, alpha=0.9, zorder=3,
                                rasterized=not linked)  # fmt: skip
            if linked:
                points.set_urls([f"#case-{number[r.case]}" for r, chosen in zip(cases, of, strict=True) if chosen])
        agreement = agreements[name]
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.axhline(agreement.bias, color=INK, linewidth=1.2)
        for limit in (agreement.low, agreement.high):
            ax.axhline(limit, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.set_title(name, fontsize=9, loc="left", fontweight="bold", parse_math=False)
        ax.margins(y=0.12)
        _quieten(ax, "y")
    for ax in panels[:, 0]:
        ax.set_ylabel(f"predicted − reference ({unit})", fontsize=8)
    for place, ax in enumerate(panels.flat[: len(shown)]):
        if place >= len(shown) - columns:
            ax.set_xlabel(f"mean of both ({unit})", fontsize=8)
    return figure, [name for name in agreements if name not in shown]


def reliability_figure(bins: Mapping[str, Calibration], what: str = "voxels") -> Figure:
    """Accuracy over confidence, a panel for each set of voxels; below it how many voxels are that confident.

    Args:
        bins: heading → its voxels by confidence.
        what: is counted: voxels, or images.
    Source:
        Guo et al., ICML 2017, figure 1.
    """
    figure = Figure(figsize=(3.3 * len(bins) + 0.3, 3.4), layout="constrained")
    panels = figure.subplots(2, len(bins), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (title, one), (above, below) in zip(bins.items(), panels.T, strict=True):
        edges = np.linspace(0, 1, len(one.counts) + 1)
        some = one.counts > 0
        above.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
        above.plot(one.confidence[some], one.accuracy[some], color=INK, linewidth=1, marker="o", markersize=4)
        above.set_ylim(-0.02, 1.02)
        above.set_title(title, fontsize=9, loc="left", fontweight="bold")
        below.bar(edges[:-1], one.counts, np.diff(edges), align="edge", color=FAINT, edgecolor=QUIET, linewidth=0.4)
        below.set_yscale("log")
        below.set_xlim(0, 1)
        below.set_xlabel("confidence", fontsize=8)
        for ax in (above, below):
            _quieten(ax, "y")
    panels[0, 0].set_ylabel("accuracy", fontsize=8)
    panels[1, 0].set_ylabel(what, fontsize=8)
    return figure


def rows_by_class(evaluation: Evaluation) -> Mapping[str, list[Row]]:
    """Class name → its rows, in the order of the cases."""
    found: dict[str, list[Row]] = {name: [] for name in evaluation.labels.foreground}
    for row in evaluation.rows:
        found[row.class_name].append(row)
    return found


def _box(ax: Axes, values: NDArray[np.float64], place: float) -> None:
    first, median, third = np.percentile(values, (25, 50, 75))
    reach = 1.5 * (third - first)
    low, high = values[values >= first - reach].min(), values[values <= third + reach].max()
    ax.barh(place, third - first, left=first, height=0.62, facecolor="none", edgecolor=INK, linewidth=0.9, zorder=4)
    ax.plot([median, median], [place - 0.31, place + 0.31], color=INK, linewidth=2.2, zorder=5, solid_capstyle="butt")
    for start, end in ((low, first), (third, high)):
        ax.plot([start, end], [place, place], color=INK, linewidth=0.9, zorder=4)


def _jitter(num: int) -> NDArray[np.float64]:
    """Heights of points around their row, the same for each case in all rows, neighbours far apart."""
    golden = (5**0.5 - 1) / 2
    places: NDArray[np.float64] = (np.arange(num, dtype=np.float64) * golden + 0.5) % 1 - 0.5
    return 0.44 * places


def _quieten(ax: Axes, grid: str) -> None:
    ax.grid(axis=grid, color=FAINT, linewidth=0.5)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"] if grid == "x" else ["top", "right"]].set_visible(False)
    ax.spines[["bottom"] if grid == "x" else ["bottom", "left"]].set_color(QUIET)


def _doubt(icc: float) -> float:
    """Order by agreement; where it is undefined there is the most doubt."""
    return -2.0 if math.isnan(icc) else icc
