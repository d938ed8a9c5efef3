"""Planar contours in the patient → voxels of an image's grid.

The contours of a region lie in planes across one axis of the grid. On each slice they are filled by the rule of
`medseg.formats.dicom.polygons` and combined by exclusive or: a contour within another is a hole, one within the hole an
island, and a keyhole contour is what it looks like. Nothing is drawn between slices.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.geometry import LPS_TO_RAS
from medseg.formats.dicom.polygons import fill
from medseg.volume import Grid

logger = logging.getLogger(__name__)

FLATNESS_SLICES = 0.5
"""A contour that strays further from its plane than this, in slices, does not lie in a slice of the grid."""
PLANE_SLICES = 0.125
"""How far the planes of a region may lie from the slices, in slices, after an offset that all of them share: positions
are written with few digits. Contours that were drawn on slices of another spacing deviate more."""
OFFSET_WARNING_SLICES = 0.1
"""An offset of all planes from the slices beyond this is told."""
HALFWAY_SLICES = 0.49
"""Planes further than this from the nearest slice lie between two of them: nobody can tell which one was meant."""
SAME_PLANE_SLICES = 0.05
"""Contours on one slice whose planes are further apart were drawn on several slices of another image."""
SNAP_DECIMALS = 3
"""Vertices are rounded to thousandths of a voxel: contours are often drawn through the very centres of voxels, and
PixelSpacing has six digits; rounding errors must not decide which of those voxels belong."""

FloatArray = NDArray[np.float64]


def voxels(contours: list[FloatArray], grid: Grid, where: str, name: str) -> NDArray[np.bool_]:
    """The voxels of one region.

    Args:
        contours: closed polygons, (n, 3) each, LPS mm; none for an empty region.
        grid: of the image, 3D, its axes in any order.
        where: what refusals call the region.
        name: what the log calls it; no file name, since names of files may hold the patient's.
    Returns:
        bool, grid.shape; what lies beyond the image's edge is cut off. Copies of a contour count once: by exclusive or
        they would undo each other.
    Raises:
        MedsegError: E_GRID if a contour does not lie in a slice of the grid, or wholly outside of it.
    """
    mask = np.zeros(grid.shape, dtype=np.bool_)
    if not contours:
        return mask
    every = np.round(grid.to_index(np.concatenate(contours) @ LPS_TO_RAS[:3, :3]), SNAP_DECIMALS)
    points = np.split(every, np.cumsum([len(contour) for contour in contours])[:-1])
    axis, slices = _slices(points, grid, where, name)
    in_plane = [a for a in range(3) if a != axis]
    last = np.array([grid.shape[a] for a in in_plane]) - 0.5
    num_cut = num_copies = 0
    drawn: set[tuple[int, bytes]] = set()
    for contour, index in zip(points, slices, strict=True):
        flat = contour[:, in_plane]
        low, high = flat.min(axis=0), flat.max(axis=0)
        if (high < -0.5).any() or (low > last).any():
            expected = " × ".join(f"0 to {(n - 1) * s:.4g}" for n, s in zip(grid.shape, grid.spacing_mm, strict=True))
            got = " × ".join(
                f"{a * s:.4g} to {b * s:.4g}"
                for a, b, s in zip(contour.min(axis=0), contour.max(axis=0), grid.spacing_mm, strict=True)
            )
            raise _off_grid("a contour lies outside the image", where, f"{expected} mm from its corner", f"{got} mm")
        if (index, flat.tobytes()) in drawn:
            num_copies += 1
            continue
        drawn.add((index, flat.tobytes()))
        num_cut += int((low < -0.5).any() or (high > last).any())
        layer = np.moveaxis(mask, axis, 0)[index]  # a view
        layer ^= fill(flat, (layer.shape[0], layer.shape[1]))
    if num_cut:
        logger.warning("%s: %d contours reach beyond the image and were cut off at its edge", name, num_cut)
    if num_copies:
        logger.warning("%s: %d contours are copies of others and were left out", name, num_copies)
    return mask


def _slices(points: list[FloatArray], grid: Grid, where: str, name: str) -> tuple[int, list[int]]:
    """The axis of the grid across which all contours lie, and the slice of each; `points` in index coordinates."""
    thickness = np.array([np.ptp(contour, axis=0) for contour in points]).max(axis=0) * grid.spacing_mm
    axis = 2 - int(thickness[::-1].argmin())  # DICOM's, the last one, where several are flat
    spacing = grid.spacing_mm[axis]
    heights = np.array([contour[:, axis].mean() for contour in points])
    stray = max(float(np.abs(contour[:, axis] - h).max()) for contour, h in zip(points, heights, strict=True))
    if stray > FLATNESS_SLICES:
        raise _off_grid(
            "contours do not lie in slices of the image",
            where,
            f"planes across an axis of the image, within {FLATNESS_SLICES * spacing:.4g} mm",
            f"points {stray * spacing:.4g} mm off their plane",
        )
    # The offset that all planes share: the mean angle, where a slice is once around.
    offset = float(np.angle(np.exp(2j * np.pi * heights).mean())) / (2 * np.pi)
    slices = np.rint(heights - offset).astype(int)
    _check_planes(heights, slices, offset, spacing, where)
    count = grid.shape[axis]
    if slices.min() < 0 or slices.max() >= count:
        raise _off_grid(
            "a contour lies above or below the image",
            where,
            f"at most {0.5 * spacing:.4g} mm beyond the centres of the first and the last of {count} slices",
            f"{max(-heights.min(), heights.max() - (count - 1)) * spacing:.4g} mm",
        )
    if abs(offset) > OFFSET_WARNING_SLICES:
        logger.warning("%s: all contours lie %.4g mm beside the slices of the image", name, abs(offset) * spacing)
    steps = np.diff(np.unique(slices))
    if len(steps) > 1 and steps.min() > 1:
        logger.warning("%s: contours on one slice of %d only; the slices between stay empty", name, steps.min())
    return axis, [int(index) for index in slices]


def _check_planes(heights: FloatArray, slices: NDArray[np.int_], offset: float, spacing: float, where: str) -> None:
    """Refuse planes (`heights` in slices) that are those of another image."""
    stray = float(np.abs(heights - offset - slices).max())
    away = float(np.abs(heights - slices).max())
    apart = max(float(np.ptp(heights[slices == index])) for index in np.unique(slices))
    expected = f"planes {spacing:.4g} mm apart, or a multiple"
    if stray > PLANE_SLICES:
        got = f"planes that lie {stray * spacing:.4g} mm beside the slices, each another way"
    elif apart > SAME_PLANE_SLICES:
        got = f"planes {apart * spacing:.4g} mm apart on one slice"
    elif away > HALFWAY_SLICES:
        got = f"planes between the slices, {away * spacing:.4g} mm from the nearest"
    else:
        return
    raise _off_grid("the planes of the contours are not the image's slices", where, expected, got)


def _off_grid(message: str, where: str, expected: str, got: str) -> MedsegError:
    return MedsegError(
        Code.GRID,
        message,
        where=where,
        expected=expected,
        got=got,
        remedy="give the image series that the structures were drawn on",
    )
