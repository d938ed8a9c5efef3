"""A scan with its reference and its prediction, as one picture for people.

Volumes are shown in three planes in radiological convention (the patient's right on the left of the picture, anterior
at the top of axial slices and on the left of sagittal ones), pictures as they are. The reference is a line, the
prediction a translucent fill of the same colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.labels import IGNORE_INDEX, Labels
from medseg.metrics.case import measure_case
from medseg.reports.layout import Layout, arrange
from medseg.reports.palette import class_colours
from medseg.reports.planes import View, slice_views, views_of
from medseg.volume import Grid, Volume

DPI = 150
BACKGROUND, TEXT, QUIET = "#101216", "#F2F2F2", "#A0A6B0"
FILL_ALPHA = 0.42
_HALO = [withStroke(linewidth=2.2, foreground="#000000A0")]
"""A dark rim that keeps letters and lines legible on bright tissue."""
MAX_LEGEND = 12
"""Classes in the legend; with more, those with the most voxels."""
FALSE_POSITIVE, FALSE_NEGATIVE, OTHER_CLASS = "#FF4136", "#2E8BFF", "#FFFFFF"
"""None of them is the colour of one of the first classes, which stand beside the error map."""
IGNORED = "#8A8F99"
"""A veil over voxels whose reference nobody knows."""
IGNORED_ALPHA = 0.55
_ERROR_NAMES = ((FALSE_POSITIVE, "too much"), (FALSE_NEGATIVE, "missed"), (OTHER_CLASS, "other class"))

IndexMap = NDArray[np.uint8]


@dataclass(frozen=True)
class _Masks:
    """Class indices on the image's grid, None where there is no such mask. The reference holds `IGNORE_INDEX` where
    voxels do not count; the prediction never."""

    reference: IndexMap | None
    predicted: IndexMap | None

    @property
    def leading(self) -> IndexMap | None:
        """What decides which slices are shown."""
        if self.reference is not None:
            known = np.where(self.reference == IGNORE_INDEX, np.uint8(0), self.reference)
            if known.any() or self.predicted is None:
                return known
        return self.predicted


def save_overlay(
    path: Path,
    image: Volume,
    *,
    labels: Labels,
    reference: Volume | None = None,
    predicted: Volume | None = None,
    title: str = "",
) -> None:
    """Write `overlay_figure` as PNG, whole or not at all; E_OUTPUT if it cannot be written."""
    save_figure(path, overlay_figure(image, labels=labels, reference=reference, predicted=predicted, title=title))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all; E_OUTPUT if it cannot be written."""
    with whole_file(path, ".png") as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor=BACKGROUND)


def overlay_figure(
    image: Volume,
    *,
    labels: Labels,
    reference: Volume | None = None,
    predicted: Volume | None = None,
    title: str = "",
) -> Figure:
    """Draw a case; the figure has its own Agg canvas and leaves pyplot alone.

    Args:
        image: shape (C, *grid.shape); pictures of 3 channels are shown in colour, else the first channel in grey.
        labels: the classes; masks hold their file values.
        reference: label map on the image's grid (axes may be flipped), drawn as lines.
        predicted: label map on the image's grid, drawn as a fill.
        title: a heading, such as the case id.
    Raises:
        MedsegError: E_GRID if a mask does not lie on the image's grid, E_LABEL for unknown values.
    """
    masks = _masks(reference, predicted, image.grid, labels)
    entries = _legend(labels.names, masks, None if labels.regions else image.grid)
    entries += _region_entries(labels, masks, image.grid)
    return _figure(_panels(image, masks), labels.num_classes - 1, title, entries)


def scan_figure(image: Volume, *, names: Sequence[str] = (), drawn: IndexMap | None = None, title: str = "") -> Figure:
    """Draw a scan as it is, and once more with the structures that were drawn on it, as lines.

    Args:
        image: shape (C, *grid.shape).
        names: of the structures 1, 2, … in `drawn`; a name may stand twice.
        drawn: shape grid.shape, 0 where there is nothing; None for the scan alone.
        title: a heading, such as the case id.
    """
    views = views_of(image, drawn, None, drawn)
    panels = [[_Panel(view, view.caption) for view in views]]
    if drawn is not None:
        panels.append([_Panel(view, "" if i else "structures", line=True) for i, view in enumerate(views)])
    return _figure(panels, len(names), title, _legend(("", *names), _Masks(drawn, None)))


def slices_figure(
    image: Volume,
    indices: Sequence[int],
    *,
    labels: Labels,
    reference: Volume,
    predicted: Volume,
    title: str = "",
) -> Figure:
    """Draw slices of a case: the image, the reference, the prediction, and where the two differ.

    Args:
        image: shape (C, *grid.shape).
        indices: the slices, as `planes.slice_axis` numbers them (from 0).
        labels: the classes; masks hold their file values.
        reference: label map on the image's grid.
        predicted: label map on the image's grid.
        title: a heading, such as the case id.
    Raises:
        MedsegError: E_GRID, E_LABEL as `overlay_figure`.
    """
    masks = _masks(reference, predicted, image.grid, labels)
    views = slice_views(image, masks.reference, masks.predicted, masks.leading, indices)
    # Dice beside these slices would be read as theirs, and it is the whole case's: names only.
    return _figure(_comparison(views), labels.num_classes - 1, title, _legend(labels.names, masks))


def _figure(panels: list[list[_Panel]], num_colours: int, title: str, entries: list[tuple[str, str]]) -> Figure:
    """Panels, indexed [thing][view], with the title above and the legend below."""
    aspects = [panel.view.aspect for panel in panels[0]]
    layout = arrange(aspects, num_rows=len(panels), title=bool(title), num_legend=len(entries))
    figure = Figure(figsize=layout.size, facecolor=BACKGROUND, dpi=DPI)
    FigureCanvasAgg(figure)
    colours = class_colours(num_colours)
    for row, boxes in zip(panels, layout.boxes, strict=True):
        for panel, box in zip(row, boxes, strict=True):
            _draw(figure.add_axes(box), panel, colours)
    _write_margins(figure, layout, title, entries)
    return figure


def figure_to_array(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure: uint8, shape (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Panel:
    """One view and what is drawn on it."""

    view: View
    heading: str
    fill: bool = False
    line: bool = False
    errors: bool = False


def _panels(image: Volume, masks: _Masks) -> list[list[_Panel]]:
    """Rows of panels that show the same thing in each view; one picture gets them side by side."""
    views = views_of(image, masks.reference, masks.predicted, masks.leading)
    has_reference, has_prediction = masks.reference is not None, masks.predicted is not None
    rows = [[_Panel(view, view.caption) for view in views]]
    if image.grid.ndim == 2 and has_reference and has_prediction:
        return _comparison(views)
    if has_reference or has_prediction:
        heading = " + ".join(["reference (line)"] * has_reference + ["prediction (fill)"] * has_prediction)
        rows.append(
            [
                _Panel(view, heading if i == 0 else "", fill=has_prediction, line=has_reference)
                for i, view in enumerate(views)
            ]
        )
    return rows


def _comparison(views: list[View]) -> list[list[_Panel]]:
    """Each view as it is, with the reference, with the prediction, with the errors."""
    return [
        [_Panel(view, view.caption) for view in views],
        [_Panel(view, "reference", line=True) for view in views],
        [_Panel(view, "prediction", fill=True) for view in views],
        [_Panel(view, "", errors=True) for view in views],  # headed by the key of its colours
    ]


def _masks(reference: Volume | None, predicted: Volume | None, grid: Grid, labels: Labels) -> _Masks:
    guess = _indices(predicted, grid, labels)
    if guess is not None:
        guess[guess == IGNORE_INDEX] = 0
    return _Masks(_indices(reference, grid, labels), guess)


def _indices(mask: Volume | None, grid: Grid, labels: Labels) -> IndexMap | None:
    """Class indices of a mask on `grid`."""
    if mask is None:
        return None
    if mask.grid.difference(grid) is not None:
        mask = mask.oriented_as(grid)
    if not mask.is_label:
        raise MedsegError(Code.CHANNELS, "a mask has no channel axis", expected=mask.grid.shape, got=mask.array.shape)
    return labels.to_index(mask.array)


def _draw(ax: Axes, panel: _Panel, colours: list[str]) -> None:
    view = panel.view
    rows, columns = view.image.shape[:2]
    ax.imshow(view.image, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="bilinear")
    ax.set_axis_off()
    if panel.errors and view.reference is not None and view.predicted is not None:
        ax.imshow(_error_map(view.reference, view.predicted), aspect="auto", interpolation="nearest")
        _error_key(ax)
    if panel.fill and view.predicted is not None:
        table = np.array([(0, 0, 0, 0), *(to_rgba(c, FILL_ALPHA) for c in colours)])
        ax.imshow(table[view.predicted], aspect="auto", interpolation="nearest")
    if panel.line and view.reference is not None:
        _veil(ax, view.reference == IGNORE_INDEX)
        for index in np.unique(view.reference[(view.reference > 0) & (view.reference != IGNORE_INDEX)]):
            # One voxel of background around it closes the line of a structure that touches the border.
            mask = np.pad(view.reference == index, 1).astype(np.float32)
            x, y = np.arange(-1, columns + 1), np.arange(-1, rows + 1)
            line = ax.contour(x, y, mask, levels=[0.5], colors=[colours[index - 1]], linewidths=1.5)
            line.set_path_effects([withStroke(linewidth=2.6, foreground="#00000080")])
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    _annotate(ax, panel)


def _veil(ax: Axes, ignored: NDArray[np.bool_]) -> None:
    """Dim what does not count."""
    if ignored.any():
        table = np.array([(0, 0, 0, 0), to_rgba(IGNORED, IGNORED_ALPHA)])
        ax.imshow(table[ignored.astype(np.uint8)], aspect="auto", interpolation="nearest")


def _annotate(ax: Axes, panel: _Panel) -> None:
    """Heading above the panel, letters of the patient's sides and a ruler within."""
    ax.text(0, 1.0, panel.heading, transform=ax.transAxes, color=QUIET, fontsize=8, va="bottom", ha="left")
    left, right, top, bottom = panel.view.sides
    places = (
        (0.015, 0.5, left, "left", "center"),
        (0.985, 0.5, right, "right", "center"),
        (0.5, 0.985, top, "center", "top"),
        (0.5, 0.015, bottom, "center", "bottom"),
    )
    for x, y, letter, ha, va in places:
        ax.text(
            x, y, letter, transform=ax.transAxes, color=TEXT, fontsize=8, fontweight="bold", ha=ha, va=va,
            path_effects=_HALO,
        )  # fmt: skip
    ruler = panel.view.ruler
    if ruler is not None:
        length, text = ruler
        ends = [0.04, 0.04 + length]
        ax.plot(ends, [0.05, 0.05], transform=ax.transAxes, color=TEXT, linewidth=1.6, path_effects=_HALO)
        ax.text(0.04, 0.07, text, transform=ax.transAxes, color=TEXT, fontsize=6.5, va="bottom", path_effects=_HALO)


def _error_map(reference: IndexMap, predicted: IndexMap) -> NDArray[np.float64]:
    """RGBA, shape (H, W, 4): where the two differ and how; a veil over the rest."""
    errors = np.zeros((*reference.shape, 4))
    errors[...] = (*to_rgb(BACKGROUND), 0.55)
    errors[(predicted > 0) & (reference == 0)] = to_rgba(FALSE_POSITIVE)
    errors[(predicted == 0) & (reference > 0)] = to_rgba(FALSE_NEGATIVE)
    errors[(predicted > 0) & (reference > 0) & (predicted != reference)] = to_rgba(OTHER_CLASS)
    errors[reference == IGNORE_INDEX] = to_rgba(IGNORED, IGNORED_ALPHA)
    return errors


def _error_key(ax: Axes) -> None:
    handles = [Patch(facecolor=colour, label=name) for colour, name in _ERROR_NAMES]
    ax.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, labelcolor=QUIET,
        fontsize=7, handlelength=1, handleheight=0.8, columnspacing=0.8, handletextpad=0.4, borderaxespad=0,
        borderpad=0.2,
    )  # fmt: skip


def _legend(names: Sequence[str], masks: _Masks, grid: Grid | None = None) -> list[tuple[str, str]]:
    """(colour, text) of the classes that the masks hold, with their Dice where there are both and a grid is given;
    `names` begin with the background."""
    present = [mask for mask in (masks.reference, masks.predicted) if mask is not None]
    if not present:
        return []
    counts = np.sum([np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1) for mask in present], axis=0)
    num_ignored, counts = counts[IGNORE_INDEX], counts[: len(names)]
    chosen = sorted(np.argsort(-counts[1:], kind="stable")[:MAX_LEGEND] + 1)
    texts = {index: names[index] for index in chosen if counts[index]}
    if masks.reference is not None and masks.predicted is not None and grid is not None:
        results = measure_case(masks.predicted, masks.reference, grid, num_classes=len(names), names=("dice",))
        texts = {index: f"{text}   Dice {results[index - 1].values['dice']:.3f}" for index, text in texts.items()}
    colours = class_colours(len(names) - 1)
    entries = [(colours[index - 1], text) for index, text in texts.items()]
    left_out = int((counts[1:] > 0).sum()) - len(entries)
    if left_out > 0:
        entries.append((BACKGROUND, f"and {left_out} more"))
    return [*entries, (IGNORED, "ignored")] if num_ignored else entries


def _region_entries(labels: Labels, masks: _Masks, grid: Grid) -> list[tuple[str, str]]:
    """The Dice of regions, which have no colour of their own: what is drawn are the classes beneath them."""
    if not labels.regions or masks.reference is None or masks.predicted is None:
        return []
    results = measure_case(
        masks.predicted, masks.reference, grid,
        num_classes=labels.num_classes, regions=labels.regions, names=("dice",),
    )  # fmt: skip
    scores = [(name, r.values["dice"]) for name, r in zip(labels.region_names, results, strict=True)]
    return [(BACKGROUND, f"{name}   Dice {dice:.3f}") for name, dice in scores if not np.isnan(dice)][:MAX_LEGEND]


def _write_margins(figure: Figure, layout: Layout, title: str, entries: list[tuple[str, str]]) -> None:
    if title:
        x, y = layout.title_at
        figure.text(x, y, title, color=TEXT, fontsize=11, fontweight="bold", ha="left", va="center", parse_math=False)
    if entries:
        handles = [
            Line2D([], [], marker="s", markersize=7, linestyle="", color=colour, label=text) for colour, text in entries
        ]
        legend = figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=layout.legend_at, ncols=layout.legend_columns,
            frameon=False, labelcolor=TEXT, fontsize=8.5, handlelength=1, columnspacing=1.6, handletextpad=0.3,
            borderaxespad=0, borderpad=0,
        )  # fmt: skip
        for text in legend.get_texts():  # names may hold a dollar
            text.set_parse_math(False)
