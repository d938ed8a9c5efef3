"""Masks and label maps out of annotation files, whichever kind they are.

The rule of overlaps: a label map holds one class per voxel, so where structures of two classes overlap, the class that
stands later in the table wins. Whoever writes the table chooses; `read_label` says how many voxels
it concerns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.structures import Annotation
from medseg.volume import Grid, Volume

logger = logging.getLogger(__name__)


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
        uint8, shape grid.shape: 0, and 1, 2, … as in `label.classes`.
    Raises:
        MedsegError: E_LABEL if the annotations hold none of the structures; as `masks`.
    """
    wanted = [{folded(name) for name in names} for names in label.classes]
    indices = np.zeros(grid.shape, dtype=np.uint8)
    overlap = 0
    found: set[int] = set()
    for value, names in enumerate(wanted, start=1):
        mine = np.zeros(grid.shape, dtype=np.bool_)
        for annotation in label.annotations:
            numbers = [s.number for s in annotation.structures if folded(s.name) in names]
            for _, mask in masks(annotation, grid, numbers) if numbers else ():
                mine |= mask
                found.add(value)
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
    notes = (f"{overlap} voxels lie in several classes; the later class in the table took them",) if overlap else ()
    for note in notes:
        logger.warning("%s: %s", label.name, note)
    return Volume(indices, grid, notes=notes)


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
