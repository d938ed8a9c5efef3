"""Two-dimensional views of a case: the slices of a volume in radiological convention, or a picture itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.volume import MODEL_ORIENTATION, PIXEL_FRAME, Grid, Volume

WINDOW_PERCENTILES = (0.5, 99.5)
"""Intensities from black to white, so that a few bright voxels do not darken the rest."""
SOFT_TISSUE_HU = (-160.0, 240.0)
"""The radiologists' window of the abdomen, for CT whose structures lie within it; air and metal would flatten the
percentiles."""
NARROWEST = 1 / 8
"""Least share of a slice's longer side, in mm, that its shorter side takes: narrower ones show nothing."""
COARSER = 1.2
"""A scan has slices along the axis whose spacing is more than this times that of the others."""
_WINDOW_SAMPLES = 2_000_000
_RULER_MM = (1, 2, 5, 10, 20, 50, 100, 200)
_RULER_SHARE = 0.3
"""The ruler is the longest of these that takes at most this share of the width."""

_WHITE = (1.0, 255.0, 65535.0)
"""White in pictures of fractions, of 8 bits and of 16 bits."""

IndexMap = NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """A slice as it is drawn: row 0 at the top, column 0 on the left.

    Args:
        image: float, shape (H, W) or (H, W, 3), 0 … 1.
        reference: class indices, shape (H, W), or None.
        predicted: class indices, shape (H, W), or None.
        pixel_mm: (height, width) of a pixel; 1 for pictures that do not know it.
        caption: which slice it is.
        sides: letters at the left, right, top and bottom; empty for pictures.
        ruler: (share of the width, text), None where the size is not known.
    """

    image: NDArray[np.float32]
    reference: IndexMap | None
    predicted: IndexMap | None
    pixel_mm: tuple[float, float]
    caption: str
    sides: tuple[str, str, str, str]
    ruler: tuple[float, str] | None

    @property
    def aspect(self) -> float:
        """Physical width over height."""
        height, width = int(self.image.shape[0]), int(self.image.shape[1])
        return width * self.pixel_mm[1] / (height * self.pixel_mm[0])


@dataclass(frozen=True)
class _Plane:
    """How a slice is cut from an array in `MODEL_ORIENTATION` (axes to the superior, posterior, left)."""

    name: str
    axis: int
    upside_down: bool
    sides: tuple[str, str, str, str]


_PLANES = (
    _Plane("axial", 0, False, ("R", "L", "A", "P")),
    _Plane("coronal", 1, True, ("R", "L", "S", "I")),
    _Plane("sagittal", 2, True, ("A", "P", "S", "I")),
)


def views_of(
    image: Volume, reference: IndexMap | None, predicted: IndexMap | None, leading: IndexMap | None
) -> list[View]:
    """The views of a case.

    Args:
        image: shape (C, *grid.shape).
        reference: class indices on the image's grid, or None.
        predicted: class indices on the image's grid, or None.
        leading: volumes are cut where this mask is largest, in the middle if it is None or empty.
    Returns:
        The axial, coronal and sagittal slice (those that are more than a strip), or the picture.
    """
    if image.grid.is_picture:
        return [_picture_view(image, reference, predicted)]
    case = _Case.of(image, reference, predicted, leading)
    shape = case.image.shape
    planes = [p for p in _PLANES if case.narrowness(p) >= NARROWEST] or [max(_PLANES, key=case.narrowness)]
    return [case.view(plane, _largest_slice(case.leading, plane.axis, shape[plane.axis])) for plane in planes]


def slice_views(
    image: Volume,
    reference: IndexMap | None,
    predicted: IndexMap | None,
    leading: IndexMap | None,
    indices: Sequence[int],
) -> list[View]:
    """Slices of a case in the plane in which it was scanned (`slice_axis`).

    Args:
        image: shape (C, *grid.shape).
        reference: class indices on the image's grid, or None.
        predicted: class indices on the image's grid, or None.
        leading: the mask that settles the window of a CT.
        indices: along `slice_axis`, in `MODEL_ORIENTATION`; a picture is its own only slice.
    """
    if image.grid.is_picture:
        return [_picture_view(image, reference, predicted) for _ in indices]
    case = _Case.of(image, reference, predicted, leading)
    plane = _PLANES[slice_axis(image.grid)]
    return [case.view(plane, index) for index in indices]


def slice_axis(grid: Grid) -> int:
    """The axis, in `MODEL_ORIENTATION`, across which a volume was scanned: the coarsest one if one is clearly coarser
    than the rest, else the axis to the superior."""
    spacing = grid.reoriented(MODEL_ORIENTATION).spacing_mm
    *_, second, coarsest = sorted(spacing)
    return spacing.index(coarsest) if coarsest > COARSER * second else 0


def grey_window(
    array: NDArray[np.generic], modality: str | None, drawn: NDArray[np.generic] | None
) -> tuple[float, float]:
    """The intensities from black to white.

    Args:
        array: one channel of a volume.
        modality: of the scan; soft tissue in CT has a window of its own.
        drawn: a mask of the same shape, 0 where there is nothing: of CT it says whether soft tissue is looked at.
    """
    return SOFT_TISSUE_HU if modality == "CT" and _in_soft_tissue(array, drawn) else _window(array)


@dataclass(frozen=True)
class _Case:
    """Everything in `MODEL_ORIENTATION`, and the intensities from black to white."""

    image: NDArray[np.generic]
    reference: NDArray[np.generic] | None
    predicted: NDArray[np.generic] | None
    leading: NDArray[np.generic] | None
    spacing_mm: tuple[float, ...]
    window: tuple[float, float]

    @classmethod
    def of(
        cls, image: Volume, reference: IndexMap | None, predicted: IndexMap | None, leading: IndexMap | None
    ) -> _Case:
        turned = image.reoriented(MODEL_ORIENTATION)
        truth, guess, lead = (
            None if m is None else Volume(m, image.grid).reoriented().array for m in (reference, predicted, leading)
        )
        window = grey_window(turned.array[0], image.modality, lead)
        return cls(turned.array[0], truth, guess, lead, turned.grid.spacing_mm, window)

    def narrowness(self, plane: _Plane) -> float:
        """Shorter side of the slices of a plane over their longer side, in mm; 0 for a single row of voxels."""
        sides = [
            (n, n * s)
            for axis, (n, s) in enumerate(zip(self.image.shape, self.spacing_mm, strict=True))
            if axis != plane.axis
        ]
        shorter, longer = sorted(mm for _, mm in sides)
        return shorter / longer if min(n for n, _ in sides) > 1 else 0.0

    def view(self, plane: _Plane, index: int) -> View:
        height_mm, width_mm = (s for axis, s in enumerate(self.spacing_mm) if axis != plane.axis)
        cuts = [None if m is None else _cut(m, plane, index).astype(np.uint8) for m in (self.reference, self.predicted)]
        pixels = _scaled(_cut(self.image, plane, index), self.window)
        return View(
            pixels,
            cuts[0],
            cuts[1],
            (height_mm, width_mm),
            f"{plane.name}  {index + 1}/{self.image.shape[plane.axis]}",
            plane.sides,
            _ruler(pixels.shape[1] * width_mm),
        )


def _picture_view(image: Volume, reference: IndexMap | None, predicted: IndexMap | None) -> View:
    height_mm, width_mm = image.grid.spacing_mm
    ruler = None if image.grid.frame == PIXEL_FRAME else _ruler(image.grid.shape[1] * width_mm)
    return View(_picture(image.array), reference, predicted, (height_mm, width_mm), "image", ("", "", "", ""), ruler)


def _cut(array: NDArray[np.generic], plane: _Plane, index: int) -> NDArray[np.generic]:
    cut: NDArray[np.generic] = np.take(array, index, axis=plane.axis)
    return cut[::-1] if plane.upside_down else cut


def _largest_slice(mask: NDArray[np.generic] | None, axis: int, size: int) -> int:
    if mask is None:
        return size // 2
    areas = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    return int(areas.argmax()) if areas.any() else size // 2


def _picture(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """Three channels (of four, the fourth is transparency) in colour, else the first one in grey."""
    if array.shape[0] not in (3, 4):
        return _scaled(array[0], _window(array[0]))
    colour = np.moveaxis(array[:3], 0, -1).astype(np.float32)
    brightest = next((limit for limit in _WHITE if colour.max() <= limit), float(colour.max()))
    return _scaled(colour, (0.0, brightest))


def _window(array: NDArray[np.generic]) -> tuple[float, float]:
    values = array.reshape(-1)[:: max(1, array.size // _WINDOW_SAMPLES)].astype(np.float32)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, WINDOW_PERCENTILES)
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def _in_soft_tissue(array: NDArray[np.generic], mask: NDArray[np.generic] | None) -> bool:
    if mask is None or not mask.any():
        return True
    low, high = SOFT_TISSUE_HU
    return bool(low < float(np.median(array[mask != 0].astype(np.float32))) < high)


def _scaled(array: NDArray[np.generic], window: tuple[float, float]) -> NDArray[np.float32]:
    low, high = window
    scaled: NDArray[np.float32] = np.clip((array.astype(np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    return np.nan_to_num(scaled)


def _ruler(width_mm: float) -> tuple[float, str] | None:
    fitting = [length for length in _RULER_MM if length <= _RULER_SHARE * width_mm]
    return (fitting[-1] / width_mm, f"{fitting[-1]} mm") if fitting else None
