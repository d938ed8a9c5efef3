"""A scan as an array and where it lies: `Grid` and `Volume`.

Conventions, all in this one place:

- **Index order.** The spatial axes of an array stand in the order of its file: (i, j, k) for NIfTI and for DICOM
  (i along a row, j down the columns, k from slice to slice), (row, column) for pictures. The affine maps *these*
  indices; nothing is ever transposed without its grid.
- **World frame.** Millimetres in `WORLD_FRAME` (NIfTI's RAS+: x to the Right, y to the Anterior, z to the Superior).
  DICOM's LPS is converted where DICOM is read and written, nowhere else.
- **Spacing** is along the array's axes, in the array's order.
- **Model order.** Networks see volumes in `MODEL_ORIENTATION`: axis 0 runs to the Superior, 1 to the Posterior, 2 to
  the Left, so `array[d]` is an axial slice that looks as radiologists look at it.
- **Pictures** lie nowhere in a patient. Of PNG and TIFF the frame is `PIXEL_FRAME` and the spacing 1 pixel; of DICOM
  images without a position (X-rays) it is `PLANE_FRAME` and mm in the image's own plane, where the header tells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import Code, MedsegError

WORLD_FRAME = "RAS"
"""World coordinates of volumes: mm, +x Right, +y Anterior, +z Superior. NIfTI's frame, so most files need no change."""
PIXEL_FRAME = "pixel"
"""Frame of pictures, which have no position in a patient; distances are in pixels."""
PLANE_FRAME = "plane"
"""Frame of pictures that know the size of their pixels but not their place: mm in the image's own plane."""
MODEL_ORIENTATION = "SPL"
"""Axes of an array as networks see it: slices first, then rows downwards, then columns to the patient's left."""

GRID_TOLERANCE_MM = 1e-2
"""Corners of two grids further apart than this (mm) make them different grids. NIfTI stores affines as float32, and
quaternions lose another digit: 1e-3 mm is reached at 300 mm from the origin; a hundredth of a mm is never visible."""
SHEAR_TOLERANCE = 1e-3
"""Largest |cosine| between two axes that still counts as perpendicular (0.06 degrees)."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie.

    Args:
        shape: number of voxels along each array axis; 3 axes for volumes, 2 for pictures.
        affine: (n+1, n+1) matrix from array indices to world coordinates (mm; pixels for some pictures).
        frame: `WORLD_FRAME`, `PLANE_FRAME` or `PIXEL_FRAME`.
    Raises:
        MedsegError: E_AFFINE if the affine has the wrong shape, is not finite or is singular;
            E_SHEAR if its axes are not perpendicular.
    """

    shape: tuple[int, ...]
    affine: FloatArray
    frame: str = WORLD_FRAME

    def __post_init__(self) -> None:
        n = len(self.shape)
        affine = np.asarray(self.affine, dtype=np.float64)
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))
        object.__setattr__(self, "affine", affine)
        if affine.shape != (n + 1, n + 1):
            raise MedsegError(
                Code.AFFINE, "the affine does not fit the array", expected=(n + 1, n + 1), got=affine.shape
            )
        determinant, cosine = _regularity(self._axes(), n) if np.isfinite(affine).all() else (0.0, 0.0)
        if abs(determinant) < 1e-12:
            raise MedsegError(
                Code.AFFINE,
                "the affine is singular or not finite",
                got=np.array2string(affine, precision=4),
                remedy="repair the header with the position that the scanner recorded",
            )
        if cosine > SHEAR_TOLERANCE:
            raise MedsegError(
                Code.SHEAR,
                "the axes of the volume are not perpendicular",
                expected=f"|cosine| at most {SHEAR_TOLERANCE}",
                got=f"{cosine:.4f}",
                remedy="resample the volume to a rectangular grid first",
            )

    @classmethod
    def of_picture(cls, shape: tuple[int, ...], spacing_mm: tuple[float, ...] | None = None) -> Grid:
        """The grid of a picture: index space itself, in pixels, or in mm where the size of a pixel is known."""
        if spacing_mm is None:
            return cls(shape, np.eye(len(shape) + 1), PIXEL_FRAME)
        return cls(shape, np.diag([*spacing_mm, 1.0]), PLANE_FRAME)

    @property
    def is_picture(self) -> bool:
        """True where the array has no position in a patient."""
        return self.frame != WORLD_FRAME

    @property
    def ndim(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along each array axis, in mm (1 pixel for pictures)."""
        return _lengths(self._axes(), self.ndim)

    @property
    def direction(self) -> FloatArray:
        """(n, n) unit vectors of the array's axes in the world, as columns."""
        n = self.ndim
        direction: FloatArray = self.affine[:n, :n] / np.array(self.spacing_mm)
        return direction

    @property
    def orientation(self) -> str:
        """The nearest anatomical direction of each array axis ("RAS", "SPL"); "" for pictures."""
        if self.is_picture:
            return ""
        return _orientation(self._axes(), self.ndim)

    def to_world(self, index: ArrayLike) -> FloatArray:
        """World coordinates of voxel centres. `index` has shape (..., n), in array order."""
        n = self.ndim
        world: FloatArray = np.asarray(index, dtype=np.float64) @ self.affine[:n, :n].T + self.affine[:n, n]
        return world

    def to_index(self, world: ArrayLike) -> FloatArray:
        """Array indices (fractional) of world points of shape (..., n)."""
        n = self.ndim
        inverse = np.linalg.inv(self.affine)
        index: FloatArray = np.asarray(world, dtype=np.float64) @ inverse[:n, :n].T + inverse[:n, n]
        return index

    def corners(self) -> FloatArray:
        """World coordinates of the centres of the corner voxels, shape (2**n, n)."""
        index = np.stack(np.meshgrid(*[(0, s - 1) for s in self.shape], indexing="ij"), axis=-1)
        return self.to_world(index.reshape(-1, self.ndim))

    def difference(self, other: Grid, tolerance_mm: float = GRID_TOLERANCE_MM) -> str | None:
        """What makes two grids different, in words; None if they are the same within `tolerance_mm`."""
        if PIXEL_FRAME in (self.frame, other.frame) and self.is_picture and other.is_picture:
            return None if self.shape == other.shape else f"shape {self.shape} against {other.shape}"
        if self.frame != other.frame:
            return f"frame {self.frame} against {other.frame}"
        if self.shape != other.shape:
            return f"shape {self.shape} against {other.shape}"
        if np.array_equal(self.affine, other.affine):
            return None
        distance = float(np.linalg.norm(self.corners() - other.corners(), axis=1).max())
        if distance <= tolerance_mm:
            return None
        parts = [f"corners up to {distance:.4g} mm apart"]
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=0, atol=1e-4):
            parts.append(f"spacing {_short(self.spacing_mm)} against {_short(other.spacing_mm)} mm")
        if not np.allclose(self.direction, other.direction, atol=1e-4):
            parts.append(f"orientation {self.orientation} against {other.orientation}")
        offset = other.affine[:-1, -1] - self.affine[:-1, -1]
        if np.abs(offset).max() > tolerance_mm:
            parts.append(f"origin shifted by {_short(offset)} mm")
        return ", ".join(parts)

    def reoriented(self, orientation: str) -> Grid:
        """The same voxels with the array's axes permuted and flipped to `orientation`; pictures stay as they are."""
        if self.is_picture or self.orientation == orientation:
            return self
        order, flipped = self._axes_to(orientation)
        transform = np.zeros((self.ndim + 1, self.ndim + 1))
        transform[-1, -1] = 1
        for new, old in enumerate(order):
            transform[old, new] = -1 if flipped[old] else 1
            transform[old, -1] = self.shape[old] - 1 if flipped[old] else 0
        return Grid(tuple(self.shape[old] for old in order), self.affine @ transform, self.frame)

    def resampled(self, shape: tuple[int, ...]) -> Grid:
        """The same box in space cut into `shape` voxels: outer voxel *edges* coincide, not centres."""
        scale = np.asarray(self.shape, dtype=np.float64) / np.asarray(shape, dtype=np.float64)
        transform = np.eye(self.ndim + 1)
        transform[: self.ndim, : self.ndim] = np.diag(scale)
        transform[: self.ndim, self.ndim] = (scale - 1) / 2
        return Grid(shape, self.affine @ transform, self.frame)

    def boxed(self, box: tuple[slice, ...]) -> Grid:
        """The grid of a box of voxels, one slice with both ends for each axis."""
        if all(s.start == 0 and s.stop == n for s, n in zip(box, self.shape, strict=True)):
            return self
        affine = self.affine.copy()
        affine[:-1, -1] = self.to_world([s.start for s in box])
        return Grid(tuple(s.stop - s.start for s in box), affine, self.frame)

    def _axes(self) -> bytes:
        """The axes in the world, as the caches below know them."""
        return self.affine[: self.ndim, : self.ndim].tobytes()

    def _axes_to(self, orientation: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """For each axis of a reoriented array the axis that it was, and for each axis of this one whether it flips."""
        return _turn(self._axes(), self.ndim, orientation)


@dataclass(frozen=True, eq=False)
class Volume:
    """An array and where it lies.

    Args:
        array: shape (C, *grid.shape) for images, or grid.shape for label maps.
        grid: where its voxels lie.
        modality: "CT", "MR", "PT", ... where the file tells, else None.
        notes: what whoever uses the voxels should know of how they came to be, one sentence each ("lossy JPEG 2000",
            "resampled: gantry tilt of 18.5 degrees"); says nothing about the patient.
    Raises:
        MedsegError: E_GRID if the array does not fit the grid.
    """

    array: NDArray[np.generic]
    grid: Grid
    modality: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.grid.ndim
        if self.array.ndim not in (n, n + 1) or self.array.shape[-n:] != self.grid.shape:
            raise MedsegError(
                Code.GRID, "the array does not fit its grid", expected=self.grid.shape, got=self.array.shape
            )

    @property
    def is_label(self) -> bool:
        """True where there is no channel axis."""
        return self.array.ndim == self.grid.ndim

    def reoriented(self, orientation: str = MODEL_ORIENTATION) -> Volume:
        """Permute and flip the axes (a view, no copy) so that they run along `orientation`; pictures stay."""
        grid = self.grid.reoriented(orientation)
        if grid is self.grid:
            return self
        order, flipped = self.grid._axes_to(orientation)
        lead = self.array.ndim - grid.ndim
        array = self.array[(slice(None),) * lead + tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
        return replace(self, array=array.transpose(*range(lead), *(lead + old for old in order)), grid=grid)

    def oriented_as(self, grid: Grid) -> Volume:
        """Permute and flip the axes back to those of `grid`: the inverse of `reoriented`.

        Raises:
            MedsegError: E_GRID if the result does not lie on `grid`.
        """
        result = self if self.grid.is_picture else self.reoriented(grid.orientation)
        difference = result.grid.difference(grid)
        if difference is not None:
            raise MedsegError(Code.GRID, "the array does not lie on the grid asked for", got=difference)
        return replace(self, array=result.array, grid=grid)


# The scans of a data set have few different axes, and looking at small matrices takes as long as at a small scan.
@lru_cache(maxsize=1024)
def _lengths(axes: bytes, n: int) -> tuple[float, ...]:
    """Of each of n axes, the columns of a matrix in float64."""
    return tuple(float(s) for s in np.linalg.norm(_matrix(axes, n), axis=0))


@lru_cache(maxsize=1024)
def _regularity(axes: bytes, n: int) -> tuple[float, float]:
    """The determinant, and the largest |cosine| between two of the axes (0 where it is singular)."""
    matrix = _matrix(axes, n)
    determinant = float(np.linalg.det(matrix))
    if abs(determinant) < 1e-12:
        return determinant, 0.0
    direction = matrix / np.linalg.norm(matrix, axis=0)
    return determinant, float(np.abs(direction.T @ direction - np.eye(n)).max())


def _matrix(axes: bytes, n: int) -> FloatArray:
    return np.frombuffer(axes, dtype=np.float64).reshape(n, n)


@lru_cache(maxsize=1024)
def _orientation(axes: bytes, n: int) -> str:
    """The nearest anatomical direction of each axis."""
    import nibabel.orientations as nio

    return "".join(nio.ornt2axcodes(_nearest(axes, n)))


@lru_cache(maxsize=1024)
def _turn(axes: bytes, n: int, orientation: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """See `Grid._axes_to`."""
    import nibabel.orientations as nio

    transform = nio.ornt_transform(_nearest(axes, n), nio.axcodes2ornt(orientation))
    return tuple(int(old) for old in np.argsort(transform[:, 0])), tuple(bool(flip < 0) for flip in transform[:, 1])


def _nearest(axes: bytes, n: int) -> NDArray[np.floating[Any]]:
    """nibabel's orientation: row i = (world axis of array axis i, ±1)."""
    import nibabel.orientations as nio

    affine = np.eye(n + 1)
    affine[:n, :n] = _matrix(axes, n)
    return np.asarray(nio.io_orientation(affine), dtype=np.float64)


def _short(values: ArrayLike) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in np.asarray(values, dtype=np.float64)) + ")"
