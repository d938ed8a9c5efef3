"""Which DICOM files lie in a folder, and what their headers say: before any pixel is read.

Only the tags listed here are ever parsed, so that nothing about the patient can reach a log, a message or a file.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.errors import Code, MedsegError
from medseg.formats.content import is_dicom

logger = logging.getLogger(__name__)

SPLIT_TAGS = (
    "EchoNumbers",
    "EchoTime",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "TriggerTime",
    "InversionTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "ContentTime",
    "ImageType",
    "InstanceNumber",
)
"""Tags that may tell two slices at one position apart, the most telling first. Only their names are ever shown."""
HEADER_TAGS = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "LossyImageCompression",
    *SPLIT_TAGS,
)
DICOM_STORAGE = "1.2.840.10008.5.1.4.1.1."
NOT_IMAGES = tuple(
    DICOM_STORAGE + part for part in ("66", "88.", "11.", "9.", "67", "104.", *(f"481.{n}" for n in range(2, 20)))
)
"""SOP classes that are not images, as prefixes: raw data, registrations, segmentations and label maps (66…), reports
(88.), presentation states (11.), waveforms (9.), value maps (67), documents (104.), and of radiotherapy all (structure
sets, doses, plans) but RT images (481.1)."""
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""A DICOMDIR; never followed."""


@dataclass(frozen=True)
class Slice:
    """The header of one single-frame image."""

    path: Path
    header: Dataset
    position: NDArray[np.float64] | None
    """ImagePositionPatient: the centre of the first pixel, mm in LPS."""
    orientation: NDArray[np.float64] | None
    """ImageOrientationPatient: (2, 3), the direction along a row, then down a column, in LPS."""
    pixel_spacing_mm: tuple[float, float] | None
    """PixelSpacing: between rows, then between columns."""

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.header.get("SeriesInstanceUID", ""))

    @property
    def modality(self) -> str:
        """Modality, "" if the header has none."""
        return str(self.header.get("Modality") or "")

    @property
    def matrix(self) -> tuple[int, int]:
        """(columns, rows): the in-plane shape in index order (i, j)."""
        return int(self.header.Columns), int(self.header.Rows)

    @property
    def is_multi_frame(self) -> bool:
        """True for enhanced images and any others with more than one frame."""
        frames = int(self.header.get("NumberOfFrames") or 1)
        sop_class = self.header.get("SOPClassUID")
        return frames > 1 or (sop_class is not None and "Enhanced" in sop_class.name)


@dataclass(frozen=True)
class SeriesInfo:
    """One series in a folder, without a word about the patient."""

    uid: str
    """SeriesInstanceUID."""
    modality: str
    """Modality of the first file, "" if unknown."""
    num_slices: int
    """Number of image files."""
    shape: tuple[int, int, int]
    """(columns, rows, slices) of the first file's matrix; several matrices are found when the series is read."""
    files: tuple[Path, ...]
    """The image files, sorted by name."""

    @property
    def name(self) -> str:
        """What messages call it: its UID, since the names of its files and folders may hold the patient's."""
        return self.uid

    def __str__(self) -> str:
        size = " × ".join(str(n) for n in self.shape[:2])
        return f"{self.uid} {self.modality or '?'} {self.num_slices} slices {size}"


def find_files(path: Path) -> list[Path]:
    """The DICOM files of a folder; of its sub-folders if it holds none itself; or the one file that `path` is."""
    if not path.is_dir():
        return [path] if is_dicom(path) else []
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if is_dicom(entry)]
    if not files:
        files = [file for entry in entries if entry.is_dir() for file in sorted(entry.iterdir()) if is_dicom(file)]
    return files


def read_slices(files: list[Path]) -> list[Slice]:
    """The headers of those files that are images; the others are counted in the log.

    Raises:
        MedsegError: E_TRUNCATED for a header that cannot be parsed.
    """
    slices: list[Slice] = []
    for path in files:
        header = _read_header(path)
        if header is not None:
            slices.append(
                Slice(path, header, _numbers(header, "ImagePositionPatient", 3), _orientation(header), _spacing(header))
            )
    if len(slices) < len(files):
        logger.info("%d DICOM files are not images (SEG, RTSTRUCT, SR, …) and were left out", len(files) - len(slices))
    return slices


def find_series(folder: Path) -> list[SeriesInfo]:
    """One entry per SeriesInstanceUID, sorted by it; see `medseg.formats.find_series`."""
    return describe(read_slices(find_files(folder)))


def describe(slices: list[Slice]) -> list[SeriesInfo]:
    """Gather slices by SeriesInstanceUID."""
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for item in slices:
        by_uid[item.uid].append(item)
    return [
        SeriesInfo(
            uid, members[0].modality, len(members), (*members[0].matrix, len(members)), tuple(m.path for m in members)
        )
        for uid, members in sorted(by_uid.items())
    ]


def number(header: Dataset, tag: str) -> float | None:
    """The number of a tag; None if it is missing, empty or not a finite number."""
    try:
        value = float(header.get(tag))
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _read_header(path: Path) -> Dataset | None:
    """The header of an image, None for another DICOM object."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))
        sop_class = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        name, value = (sop_class.name, str(sop_class)) if sop_class is not None else ("", "")
        has_matrix = bool(header.get("Rows")) and bool(header.get("Columns"))
    except Exception as error:  # pydicom raises a dozen types on damaged files
        raise MedsegError(
            Code.TRUNCATED,
            "the DICOM header is cut or damaged",
            where=path.name,
            got=type(error).__name__,
            remedy="export the series again",
        ) from error
    if value == MEDIA_DIRECTORY or value.startswith(NOT_IMAGES):
        return None
    if has_matrix:
        return header
    if not value or name.endswith("Image Storage"):
        raise MedsegError(
            Code.TRUNCATED,
            "the DICOM header ends before the size of the image",
            where=path.name,
            expected="Rows and Columns",
            remedy="export the series again",
        )
    return None


def _numbers(header: Dataset, tag: str, count: int) -> NDArray[np.float64] | None:
    """The numbers of a tag, None unless there are exactly `count` finite ones."""
    try:
        numbers = np.array([float(v) for v in header.get(tag) or ()], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def _orientation(header: Dataset) -> NDArray[np.float64] | None:
    cosines = _numbers(header, "ImageOrientationPatient", 6)
    return None if cosines is None else cosines.reshape(2, 3)


def _spacing(header: Dataset) -> tuple[float, float] | None:
    spacing = _numbers(header, "PixelSpacing", 2)
    return None if spacing is None or (spacing <= 0).any() else (float(spacing[0]), float(spacing[1]))
