"""Oblique grids, and structure sets with contours of one's own, for tests of RTSTRUCT."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ImplicitVRLittleEndian,
    RTStructureSetStorage,
)
from scipy.spatial.transform import Rotation

from medseg.formats.dicom import rtstruct
from medseg.volume import Grid, Volume

ORDERS = list(itertools.permutations(range(3)))


def oblique_grid(shape: tuple[int, int, int], seed: int = 0, angle: float = 25.0) -> Grid:
    """A right-handed, asymmetric grid anywhere in space."""
    rng = np.random.default_rng(seed)
    turn = Rotation.from_euler("xyz", rng.uniform(-angle, angle, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -1.0, 1.0]) * rng.uniform([0.4, 0.4, 1.0], [2.0, 2.0, 6.0])
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return Grid(shape, affine)


def turned(volume: Volume, order: Sequence[int], flips: Sequence[bool]) -> Volume:
    """The same voxels with the axes permuted and flipped."""
    array, affine = volume.array, volume.grid.affine.copy()
    for axis, flip in enumerate(flips):
        if flip:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    array = array.transpose(order)
    affine[:3, :3] = affine[:3, list(order)]
    return Volume(array, Grid(array.shape, affine))


def read(path: Path, grid: Grid, numbers: Sequence[int] | None = None) -> dict[int, NDArray[np.bool_]]:
    return dict(rtstruct.masks(rtstruct.read_annotation(path), grid, numbers))


def square(grid: Grid, k: float, low: float = 2.5, high: float = 6.5) -> NDArray[np.float64]:
    """A square of the indices between `low` and `high` on slice k, LPS mm."""
    index = [[low, low, k], [low, high, k], [high, high, k], [high, low, k]]
    return grid.to_world(index) * [-1, -1, 1]


def write_contours(
    path: Path,
    contours: Sequence[NDArray[np.float64] | str],
    *,
    kinds: Sequence[str] = (),
    edit: Callable[[Dataset], None] | None = None,
    syntax: str = ImplicitVRLittleEndian,
) -> Path:
    """A structure set with one region of these contours (points or the text of ContourData)."""
    items = []
    for number, contour in enumerate(contours):
        item = Dataset()
        item.ContourGeometricType = kinds[number] if kinds else "CLOSED_PLANAR"
        item.NumberOfContourPoints = 1
        with warnings.catch_warnings(action="ignore"):  # texts that are no numbers
            values = contour if isinstance(contour, str) else "\\".join(f"{v:.6f}" for v in contour.ravel())
            item.add(pydicom.dataelem.RawDataElement(0x30060050, "DS", len(values), values.encode(), 0, True, True))
            item.set_original_encoding(True, True, "iso8859")
        items.append(item)
    roi, drawn, observation = Dataset(), Dataset(), Dataset()
    roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = 7, " GTV-1 ", "1.2.3"
    drawn.ReferencedROINumber, drawn.ContourSequence = 7, items
    observation.ObservationNumber = observation.ReferencedROINumber = 7
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = RTStructureSetStorage, "1.2.8", "1.2.9"
    dataset.PatientName = "CANARY^SECRET"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [drawn]
    dataset.RTROIObservationsSequence = [observation]
    if edit is not None:
        edit(dataset)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.8"
    dataset.save_as(path, enforce_file_format=True)
    return path


GRID = oblique_grid((12, 11, 9), seed=3)
