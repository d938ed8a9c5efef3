"""Masks and label maps out of annotation files, whichever kind they are.

The rule of overlaps: a label map holds one class per voxel, so where structures of two classes overlap, the class that
stands later in the table wins. Whoever writes the table chooses; `read_label` says how many voxels
it concerns. What several files hold of one class is united, and said too: they may be versions of one drawing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.structures import Annotation
from medseg.volume import Grid, Volume

logger = logging.getLogger(__name__)

OVERLAP = "voxels lie in several classes"
"""What `read_label` notes of overlapping classes, behind their number."""
MAX_NAMED = 10
"""Most structures that a note names."""


@dataclass(frozen=True)
class DrawnLabel:
    """A label map that is to be made from annotations."""

    annotations: tuple[Annotation, ...]
    """The SEG and RTSTRUCT files that refer to the image."""
    classes: tuple[tuple[str, ...], ...]
    """For class 1, 2, … the names of the structures that mean it, compared without case and outer blanks."""
    name: str
    """What messages call it; no file name, since names of files may hold the patient's."""


def masks(
    annotation: Annotation, grid: Grid, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The voxels of structures on the grid of the image that they were drawn on, one structure at a time.

    Args:
        annotation: the file, as `medseg.formats.dicom.catalog` found it.
        grid: of the image, in DICOM's index order (i along a row, j down the columns, k across slices).
        numbers: which structures; None is all.
    Returns:
        (Structure.number, bool mask of shape grid.shape), in the order of the file.
    Raises:
        MedsegError: E_GRID if the structures do not lie on the grid, E_TRUNCATED, E_MALFORMED, E_CODEC, E_LIMIT.
    """
    from medseg.formats.dicom import rtstruct, seg

    read = seg.masks if annotation.kind == "SEG" else rtstruct.masks
    return read(annotation, grid, numbers)


def read_label(label: DrawnLabel, grid: Grid) -> Volume:
    """A label map from the structures that a table names.

    Returns:
        uint8, shape grid.shape: 0, and 1, 2, … as in `label.classes`. Its notes tell of overlaps, and of classes that
        several annotations hold.
    Raises:
        MedsegError: E_LABEL if the annotations hold none of the structures; as `masks`.
    """
    wanted = [{folded(name) for name in names} for names in label.classes]
    indices = np.zeros(grid.shape, dtype=np.uint8)
    overlap = 0
    found: set[int] = set()
    united: list[str] = []
    for value, names in enumerate(wanted, start=1):
        mine = np.zeros(grid.shape, dtype=np.bool_)
        holders = [a for a in label.annotations if any(folded(s.name) in names for s in a.structures)]
        for annotation in holders:
            numbers = [s.number for s in annotation.structures if folded(s.name) in names]
            for _, mask in masks(annotation, grid, numbers):
                mine |= mask
                found.add(value)
        if len(holders) > 1:
            united += dict.fromkeys(s.name for a in holders for s in a.structures if folded(s.name) in names)
        overlap += int(np.count_nonzero(indices[mine]))
        indices[mine] = value
    if not found:
        raise MedsegError(
            Code.LABEL,
            "the annotations of this image hold none of the structures that were asked for",
            where=label.name,
            expected=" | ".join(", ".join(names) for names in label.classes),
            got=", ".join(s.name for a in label.annotations for s in a.structures) or "no structure",
            remedy="name the structures of this case in data.labels too: data.labels={tumour: [GTV-1, gtv]}",
        )
    notes = _notes(overlap, united)
    for note in notes:
        logger.warning("%s: %s", label.name, note)
    return Volume(indices, grid, notes=notes)


def overlap_of(notes: Iterable[str]) -> str | None:
    """How many voxels lie in several classes, in words; None where `read_label` notes none."""
    return next((note.partition(";")[0] for note in notes if OVERLAP in note), None)


def _notes(overlap: int, united: Sequence[str]) -> tuple[str, ...]:
    """What is to be known of a label map: voxels in several classes, structures out of several annotations."""
    notes = [f"{overlap} {OVERLAP}; the later class in the table took them"] if overlap else []
    if united:
        named = ", ".join(united[:MAX_NAMED]) + (f" and {len(united) - MAX_NAMED} more" * (len(united) > MAX_NAMED))
        notes.append(f"several annotations hold {named}: what they drew was united; are they versions of one drawing?")
    return tuple(notes)


def read_annotation(path: Path) -> Annotation:
    """The header of a SEG or RTSTRUCT file.

    Raises:
        MedsegError: E_UNSUPPORTED for another kind of file, E_TRUNCATED, E_MALFORMED.
    """
    from medseg.formats.dicom import rtstruct, seg

    if seg.is_mine(path):
        return seg.read_annotation(path)
    if rtstruct.is_mine(path):
        return rtstruct.read_annotation(path)
    raise MedsegError(
        Code.UNSUPPORTED,
        "not an annotation",
        where=path.name,
        expected="DICOM SEG or RTSTRUCT",
        remedy="check the path",
    )


def folded(name: str) -> str:
    """A structure's name as it is compared: without case and outer blanks."""
    return name.strip().casefold()
