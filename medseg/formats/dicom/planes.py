"""Single planes in space - frames of a SEG, slices of a series - and which voxels of a grid they are.

Nothing is interpolated: each pixel of a plane is a voxel of the grid, or the plane does not belong to it. The grid may
have its axes in any order and direction, since it may have come from a NIfTI file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.frames import Frames
from medseg.formats.dicom.geometry import LPS_TO_RAS
from medseg.volume import SHEAR_TOLERANCE, Grid

CENTRE_TOLERANCE = 0.05
"""Largest distance of a pixel's centre from its voxel's, along each axis in voxels. Series themselves jitter by a
hundredth of a step, positions are written with few digits; no voxel is mistaken for its neighbour before a half."""

FloatArray = NDArray[np.float64]
Element = TypeVar("Element", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Plane:
    """Where the pixels of one plane lie."""

    position: FloatArray
    """(3,) centre of the first pixel, LPS mm."""
    orientation: FloatArray
    """(2, 3) unit vectors along a row, then down a column, LPS."""
    spacing_mm: tuple[float, float]
    """Between rows, then between columns."""
    shape: tuple[int, int]
    """(rows, columns)."""

    @property
    def affine(self) -> FloatArray:
        """(3, 3): columns for a step along a row, a step down a column, and the origin; RAS mm.

        Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1.
        """
        steps = self.orientation * np.array(self.spacing_mm)[::-1, None]
        lps = np.stack([*steps, self.position], axis=1)
        return np.asarray(LPS_TO_RAS[:3, :3] @ lps, dtype=np.float64)


@dataclass(frozen=True)
class Spot:
    """The voxels of a grid that a plane is."""

    axes: tuple[int, int, int]
    """Grid axis that runs down the columns, along the rows, across the plane."""
    low: tuple[int, int, int]
    """Lowest index along the same three axes."""
    flips: tuple[bool, bool]
    """Whether the index falls down the columns, along the rows."""
    shape: tuple[int, int]
    """(rows, columns)."""

    def view(self, array: NDArray[Element]) -> NDArray[Element]:
        """The plane's pixels (rows, columns) within an array of the grid's shape: a view, to read and to write."""
        (row, column, across), (rows, columns) = self.low, self.shape
        plane = array.transpose(self.axes)[row : row + rows, column : column + columns, across]
        return plane[:: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1]


def planes_of(frames: Frames, shape: tuple[int, int]) -> list[Plane] | None:
    """Where the frames of a file lie, in their order; None unless all say so.

    Raises:
        MedsegError: E_MALFORMED for direction cosines that are no unit vectors at right angles.
    """
    if frames.positions is None or frames.orientations is None or frames.pixel_spacings is None:
        return None
    planes = []
    for position, cosines, spacing in zip(frames.positions, frames.orientations, frames.pixel_spacings, strict=True):
        if np.abs(cosines @ cosines.T - np.eye(2)).max() > SHEAR_TOLERANCE:
            raise malformed(
                "the direction cosines of a frame span no plane",
                frames.path.name,
                expected="two unit vectors at right angles",
                got=np.array2string(cosines, precision=4),
            )
        planes.append(Plane(position, cosines, (float(spacing[0]), float(spacing[1])), shape))
    return planes


def locate(plane: Plane, grid: Grid, *, where: str) -> Spot:
    """The voxels of a volume's grid that a plane is.

    Raises:
        MedsegError: E_GRID if the pixels do not fall on voxels, or if some lie outside.
    """
    inverse = np.linalg.inv(grid.affine)
    index = inverse[:3, :3] @ plane.affine  # (3 grid axes; per column, per row, origin)
    index[:, 2] += inverse[:3, 3]
    along_row, down_column = (int(np.abs(index[:, n]).argmax()) for n in range(2))
    rows, columns = plane.shape
    steps = np.zeros((3, 2))
    steps[along_row, 0], steps[down_column, 1] = np.sign(index[along_row, 0]), np.sign(index[down_column, 1])
    origin = np.rint(index[:, 2])
    offset = index[:, 2] - origin
    stretch = np.abs(index[:, :2] - steps) @ np.array([columns - 1, rows - 1])
    last = origin + steps @ np.array([columns - 1, rows - 1])
    low = np.minimum(origin, last).astype(int)
    outside = bool((low < 0).any() or (np.maximum(origin, last) >= grid.shape).any())
    if along_row == down_column or outside or (np.abs(offset) + stretch).max() > CENTRE_TOLERANCE:
        raise MedsegError(
            Code.GRID,
            "the structures do not lie on the grid of the image",
            where=where,
            expected=_describe_grid(grid),
            got=_describe_plane(plane, grid, offset, outside=outside),
            remedy="use the images that the structures were drawn on, in their original geometry",
        )
    across = 3 - along_row - down_column
    axes = (down_column, along_row, across)
    return Spot(
        axes=axes,
        low=(int(low[axes[0]]), int(low[axes[1]]), int(low[axes[2]])),
        flips=(bool(steps[down_column, 1] < 0), bool(steps[along_row, 0] < 0)),
        shape=plane.shape,
    )


def malformed(message: str, where: str, *, expected: object = None, got: object = None) -> MedsegError:
    """E_MALFORMED of a DICOM file."""
    return MedsegError(Code.MALFORMED, message, where=where, expected=expected, got=got, remedy="export the file again")


def _describe_grid(grid: Grid) -> str:
    spacing = " × ".join(f"{value:.4g}" for value in grid.spacing_mm)
    return f"{' × '.join(str(n) for n in grid.shape)} voxels of {spacing} mm, {grid.orientation}"


def _describe_plane(plane: Plane, grid: Grid, offset: FloatArray, *, outside: bool) -> str:
    """Size, spacing, direction and offset of a plane against a grid, in the words of `Grid.difference`."""
    rows, columns = plane.shape
    parts = [f"a frame of {columns} × {rows} pixels of {plane.spacing_mm[1]:.4g} × {plane.spacing_mm[0]:.4g} mm"]
    turned = np.abs(grid.direction.T @ plane.affine[:, :2] / plane.spacing_mm[::-1]).max(axis=0).min()
    if turned < np.cos(np.radians(0.1)):
        parts.append(f"turned by {np.degrees(np.arccos(min(turned, 1.0))):.3g} degrees")
    shift = np.abs(offset) * grid.spacing_mm
    if np.abs(offset).max() > CENTRE_TOLERANCE:
        parts.append("between the voxels, off by (" + ", ".join(f"{value:.4g}" for value in shift) + ") mm")
    if outside:
        first = grid.to_index(plane.affine[:, 2])
        parts.append("outside the image, from voxel (" + ", ".join(f"{value:.1f}" for value in first) + ")")
    return ", ".join(parts)
