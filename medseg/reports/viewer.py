"""A validation case to scroll through in a notebook: NiiVue where the front end draws widgets, figures elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from medseg.formats import nifti
from medseg.labels import IGNORE_INDEX
from medseg.reports.browse import ValidationCase
from medseg.reports.overlay import BACKGROUND, FALSE_NEGATIVE, FALSE_POSITIVE, OTHER_CLASS, QUIET
from medseg.reports.palette import class_colours
from medseg.reports.planes import View, grey_window, slice_views
from medseg.volume import Grid, Volume

FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID")
"""Variables of the environment that a kernel has where somebody looks: of Jupyter's server and of VS Code. A notebook
that is only executed has none of them, and what it keeps must be pictures."""
WIDGETS = ("ipyniivue", "ipywidgets")
MAX_VOXELS = 2**25
"""Larger volumes are shown with every second (third, …) voxel: all of it goes to the browser."""
HEIGHT = 480
"""Of the viewer, in pixels."""
ERRORS = (("too much", FALSE_POSITIVE), ("missed", FALSE_NEGATIVE), ("other class", OTHER_CLASS))
"""Kinds of errors, 1, 2 and 3 in an error map, and their colours."""

IndexMap = NDArray[np.uint8]


def has_front_end() -> bool:
    """Whether this kernel belongs to a front end that draws widgets, and they are installed."""
    return any(os.environ.get(name) for name in FRONT_ENDS) and all(find_spec(name) for name in WIDGETS)


def error_map(case: ValidationCase) -> IndexMap:
    """What is wrong in each voxel, on the image's grid: 0 nothing (or it does not count), else as in `ERRORS`."""
    reference, predicted = _indices(case.reference, case), _indices(case.predicted, case)
    errors = np.zeros(reference.shape, dtype=np.uint8)
    errors[(predicted > 0) & (reference == 0)] = 1
    errors[(predicted == 0) & (reference > 0)] = 2
    errors[(predicted > 0) & (reference > 0) & (predicted != reference)] = 3
    errors[reference == IGNORE_INDEX] = 0
    return errors


def case_viewer(case: ValidationCase, uncertainty: Volume | None = None) -> Any | None:
    """A viewer to scroll through a volume with its masks, each with a slider for how much is seen of it.

    Args:
        case: with image, reference and prediction.
        uncertainty: 0 … 1, on the image's grid; None leaves it out.
    Returns:
        A widget; None where `has_front_end` says no, and for pictures.
    """
    if case.image.grid.is_picture or not has_front_end():
        return None
    import ipywidgets
    from ipyniivue import NiiVue

    viewer = NiiVue(height=HEIGHT, is_colorbar=False, is_radiological_convention=True)
    layers = viewer_layers(case, uncertainty)
    sliders = [
        ipywidgets.FloatSlider(
            value=layer["opacity"], min=0, max=1, step=0.05, readout=False,
            description=layer["name"].partition(".")[0], layout={"width": "220px"},
        )
        for layer in layers
    ]  # fmt: skip

    def load(*_: object) -> None:
        # A front end that is still making its canvas does not draw what it was sent before, and one that was sent a
        # volume twice draws it without its colours: volumes are made when the canvas is there, and always new ones.
        before = viewer.volumes
        viewer.load_volumes(
            [
                {**{k: v for k, v in layer.items() if k != "colours"}, "opacity": slider.value}
                for layer, slider in zip(layers, sliders, strict=True)
            ]
        )
        for volume, layer in zip(viewer.volumes, layers, strict=True):
            if "colours" in layer:
                volume.set_colormap_label(layer["colours"])
        for volume in before:
            volume.close()

    def show(_: object) -> None:
        for volume, slider in zip(viewer.volumes, sliders, strict=False):  # no volumes yet without a canvas
            volume.opacity = slider.value

    for slider in sliders:
        slider.observe(show, "value")
    viewer.on_canvas_attached(load)
    reload = ipywidgets.Button(description="reload", tooltip="if the viewer stays black", layout={"width": "80px"})
    reload.on_click(load)
    return ipywidgets.VBox([ipywidgets.HBox([*sliders, reload], layout={"flex_flow": "row wrap"}), viewer])


def viewer_layers(case: ValidationCase, uncertainty: Volume | None = None) -> list[dict[str, Any]]:
    """What a viewer shows of a volume, from below: arguments of NiiVue's volumes, as NIfTI files in memory.

    Masks have `colours` besides: a table of colours for the numbers in them.
    """
    grid, image = case.image.grid, case.image.array[0]
    step = max(1, math.ceil((image.size / MAX_VOXELS) ** (1 / 3)))
    reference, predicted = _indices(case.reference, case), _indices(case.predicted, case)
    low, high = grey_window(image, case.image.modality, np.where(reference == IGNORE_INDEX, 0, reference))
    names = case.labels.names
    classes = _colour_table(names, ["#000000", *class_colours(len(names) - 1)])
    errors = _colour_table(["", *(name for name, _ in ERRORS)], ["#000000", *(colour for _, colour in ERRORS)])

    def layer(name: str, array: NDArray[Any], opacity: float, **more: Any) -> dict[str, Any]:
        return {"name": f"{name}.nii", "data": _nifti(array, grid, step), "opacity": opacity, **more}

    layers = [
        layer("image", _small(image), 1.0, colormap="gray", cal_min=low, cal_max=high),
        layer("reference", np.where(reference == IGNORE_INDEX, np.uint8(0), reference), 0.0, colours=classes),
        layer("prediction", predicted, 0.45, colours=classes),
        layer("errors", error_map(case), 0.0, colours=errors),
    ]
    if uncertainty is not None:
        heat = uncertainty.array.astype(np.float32)
        layers.append(layer("uncertainty", heat, 0.0, colormap="inferno", cal_min=0.05, cal_max=1.0))
    return layers


def uncertainty_figure(case: ValidationCase, uncertainty: Volume, indices: Sequence[int]) -> Figure:
    """Slices of a case, of its uncertainty and of its errors, below each other; the figure has its own Agg canvas.

    Args:
        case: with image, reference and prediction.
        uncertainty: 0 … 1, on the image's grid.
        indices: the slices, as `planes.slice_axis` numbers them (from 0).
    """
    reference = _indices(case.reference, case)
    levels = np.asarray(np.rint(255 * uncertainty.array.astype(np.float32)), dtype=np.uint8)
    views = slice_views(case.image, levels, error_map(case), np.where(reference == IGNORE_INDEX, 0, reference), indices)
    width = 2.6 * sum(view.aspect for view in views)
    figure = Figure(figsize=(min(12.0, max(5.0, width)) + 0.9, 8.0), layout="constrained", facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(views), squeeze=False, width_ratios=[view.aspect for view in views])
    for column, view in zip(axes.T, views, strict=True):
        heat = _draw_column(column, view)
    bar = figure.colorbar(heat, ax=axes[1, -1], fraction=0.05)
    bar.set_label("uncertainty", color=QUIET)
    bar.ax.tick_params(colors=QUIET)
    handles = [Patch(facecolor=colour, label=name) for name, colour in ERRORS]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor=QUIET, fontsize=8)
    for row, name in zip(axes[:, 0], ("image", "uncertainty", "errors"), strict=True):
        row.text(-0.02, 0.5, name, transform=row.transAxes, color=QUIET, rotation=90, ha="right", va="center")
    return figure


def _draw_column(column: Sequence[Any], view: View) -> Any:
    """One slice from above; returns what the scale of colours is made for."""
    height, width = view.image.shape[:2]
    extent = (0.0, width * view.pixel_mm[1], height * view.pixel_mm[0], 0.0)
    table = np.array([(0, 0, 0, 0), *((*to_rgb(colour), 1.0) for _, colour in ERRORS)])
    for ax in column:
        ax.set_axis_off()
        ax.imshow(view.image, cmap="gray", vmin=0, vmax=1, extent=extent)
    column[0].set_title(view.caption, color=QUIET, fontsize=9)
    assert view.reference is not None and view.predicted is not None  # noqa: S101, both were given
    heat = column[1].imshow(view.reference / 255, cmap="inferno", vmin=0, vmax=1, extent=extent)
    column[2].imshow(table[view.predicted], extent=extent, interpolation="nearest")
    return heat


def _indices(mask: Volume, case: ValidationCase) -> IndexMap:
    """Class indices on the image's grid; the prediction's axes may be flipped."""
    grid = case.image.grid
    turned = mask if mask.grid.difference(grid) is None else mask.oriented_as(grid)
    return case.labels.to_index(turned.array)


def _small(image: NDArray[Any]) -> NDArray[Any]:
    """As int16 where that holds it, else as float32."""
    array = np.asarray(image, dtype=np.float32)
    whole = np.array_equal(array, np.rint(array)) and np.abs(array).max(initial=0) < 2**15
    return array.astype(np.int16) if whole else array


def _nifti(array: NDArray[Any], grid: Grid, step: int) -> bytes:
    """A NIfTI file of every `step`-th voxel."""
    thinned = np.ascontiguousarray(array[::step, ::step, ::step])
    affine = grid.affine @ np.diag([step, step, step, 1.0])
    content: bytes = nifti.placed(thinned, Grid(thinned.shape, affine)).to_bytes()
    return content


def _colour_table(names: Sequence[str], colours: Sequence[str]) -> dict[str, list[Any]]:
    """NiiVue's table for the numbers 0, 1, …; 0 is seen through."""
    parts = np.rint(255 * np.array([to_rgb(colour) for colour in colours])).astype(int)
    channels = {name: parts[:, i].tolist() for i, name in enumerate("RGB")}
    number = len(colours)
    return {**channels, "A": [0] + [255] * (number - 1), "I": list(range(number)), "labels": list(names)}
