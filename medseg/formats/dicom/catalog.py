"""What lies in a tree of DICOM files, from headers alone: series of images, annotations, and which belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import MedsegError
from medseg.formats.dicom.files import SeriesInfo
from medseg.formats.dicom.structures import Annotation
from medseg.volume import Grid


@dataclass(frozen=True)
class CatalogSeries:
    """One series of images in a tree."""

    case_id: str
    """What medseg calls it everywhere: "CT_3f9a2c", modality and a digest of its SeriesInstanceUID. It is the same
    wherever the files lie and tells nothing about the patient."""
    info: SeriesInfo
    """UID and files."""
    patient: str
    """A name for the patient that tells nothing about them ("p_81bc2d"): a digest of the smallest StudyInstanceUID of
    all series that share a PatientID or a study."""
    study_uid: str
    frame_of_reference: str | None
    grid: Grid | None
    """None where the series cannot be read as one volume."""
    annotations: tuple[Annotation, ...]
    """Those that refer to this series."""
    problem: MedsegError | None
    """Why it cannot be read as one volume."""
    warnings: tuple[str, ...]
    """What a reader would warn of: duplicates, a localizer left out, lossy compression."""


@dataclass(frozen=True)
class Catalog:
    """What lies in a tree."""

    root: Path
    series: tuple[CatalogSeries, ...]
    """Sorted by case_id."""
    orphans: tuple[tuple[Annotation, str], ...]
    """Annotations that belong to no series here, and why."""
    others: dict[str, int]
    """Other DICOM objects by kind ("SR", "DICOMDIR", …) and how many."""
    damaged: tuple[tuple[Path, str], ...]
    """Files that cannot be read as DICOM though they should, and why."""


def read_catalog(root: Path, progress: Callable[[int, int], None] | None = None) -> Catalog:
    """Look at every file of a tree (or a zip), headers only.

    Args:
        root: folder, zip or single file.
        progress: called with (files done, all files).
    Raises:
        MedsegError: E_MISSING, E_LIMIT; whatever is wrong with single series is in the catalog.
    """
    raise NotImplementedError(root, progress)
