"""A small oblique DICOM series, each slice of which a test may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, open_volume

CT = "1.2.840.10008.5.1.4.1.1.2"


COLUMNS, ROWS, SLICES = 5, 4, 6
PIXEL_SPACING = (1.5, 0.8)  # between rows, between columns
STEP = 2.5
ORIGIN = np.array([11.0, -23.0, 37.0])
CANARY = "CanaryPatient"

rotation, _ = np.linalg.qr(np.array([[1, 0.3, -0.2], [-0.25, 1, 0.35], [0.1, -0.4, 1]]))
ALONG_ROW, DOWN_COLUMN = rotation[:, 0], rotation[:, 1]
NORMAL = np.cross(ALONG_ROW, DOWN_COLUMN)
PIXELS = np.random.default_rng(0).integers(0, 4000, (SLICES, ROWS, COLUMNS)).astype(np.uint16)


def make(
    folder: Path, change: Callable[[Dataset, int], None] | None = None, *, uid: str = "1.2.3", name: str = "s"
) -> list[Path]:
    """A series of SLICES oblique slices; `change` may alter (or, by setting `skip`, leave out) each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(SLICES):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CT
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID, ds.SeriesDescription = CANARY, CANARY, CANARY
        ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = uid, "CT", k + 1
        ds.ImagePositionPatient = digits(ORIGIN + k * STEP * NORMAL)
        ds.ImageOrientationPatient = digits([*ALONG_ROW, *DOWN_COLUMN])
        ds.PixelSpacing, ds.SliceThickness = list(PIXEL_SPACING), 3.0
        ds.Rows, ds.Columns, ds.SamplesPerPixel = ROWS, COLUMNS, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = PIXELS[k].tobytes()
        if change is not None:
            change(ds, k)
        if not getattr(ds, "skip", False):
            paths.append(folder / f"{name}{k:02d}.dcm")
            ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def digits(numbers: object) -> list[str]:
    """Decimal strings have at most 16 characters."""
    return [f"{n:.10f}"[:16] for n in np.asarray(numbers)]


def position(ds: Dataset) -> np.ndarray:
    return np.array([float(v) for v in ds.ImagePositionPatient])


def moved(offset: Callable[[int], np.ndarray]) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = digits(position(ds) + offset(k))

    return change


def only(*kept: int) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        ds.skip = k not in kept

    return change


def setting(**tags: object) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        for tag, value in tags.items():
            setattr(ds, tag, value)

    return change


def refused(path: Path, code: Code, reading: Reading = STRICT) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        open_volume(path, reading)
    assert caught.value.code is code, caught.value
    assert CANARY not in str(caught.value)
    return caught.value


def expected_world(i: int, j: int, k: int) -> np.ndarray:
    """RAS+ mm of a voxel, written out from the standard: PixelSpacing[0] is between rows."""
    lps = ORIGIN + i * PIXEL_SPACING[1] * ALONG_ROW + j * PIXEL_SPACING[0] * DOWN_COLUMN + k * STEP * NORMAL
    return lps * (-1, -1, 1)
