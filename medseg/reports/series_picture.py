"""A picture of each scan of an inventory, with what was drawn on it: to see that both are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import MedsegError
from medseg.formats import Reading, Source, open_volume
from medseg.formats.dicom.annotations import masks
from medseg.formats.dicom.structures import Annotation
from medseg.reports.inventory import printable
from medseg.reports.overlay import save_figure, scan_figure
from medseg.volume import Grid

MAX_STRUCTURES = 255
"""Structures in one picture; further ones are not drawn."""
MAX_NAME = 40
"""Letters of a structure's name in the legend."""


def save_picture(
    path: Path, source: Source, annotations: Sequence[Annotation], *, title: str, reading: Reading
) -> tuple[list[str], dict[str, MedsegError]]:
    """Read a scan and what was drawn on it, and write three planes of it as PNG.

    The planes go through the middle, or where the structures are largest. Where structures overlap, the smaller one
    is on top. An annotation that cannot be read is left out.

    Args:
        path: of the PNG.
        source: the scan.
        annotations: those that belong to it.
        title: its heading; says nothing about the patient.
        reading: how the scan is read.
    Returns:
        Notes of the volume, with a sentence for structures that there was no room for; and for each annotation that
        cannot be read, by its UID, why.
    Raises:
        MedsegError: what reading the scan refuses; E_OUTPUT.
    """
    image = open_volume(source, reading)
    names, drawn, remarks, problems = _drawn(annotations, image.grid)
    save_figure(path, scan_figure(image, names=names, drawn=drawn if names else None, title=title))
    return [*image.notes, *remarks], problems


def _drawn(
    annotations: Sequence[Annotation], grid: Grid
) -> tuple[list[str], NDArray[np.uint8], list[str], dict[str, MedsegError]]:
    """Names of the structures 1, 2, …, their voxels, what there was no room for, and what cannot be read."""
    names: list[str] = []
    sizes = np.zeros(MAX_STRUCTURES + 1, dtype=np.int64)
    drawn = np.zeros(grid.shape, dtype=np.uint8)
    remarks: list[str] = []
    problems: dict[str, MedsegError] = {}
    for annotation in annotations:
        named = {s.number: printable(s.name) for s in annotation.structures}
        room = MAX_STRUCTURES - len(names)
        numbers = [s.number for s in annotation.structures]
        if len(numbers) > room:
            remarks.append(f"{annotation.kind}: {len(numbers) - room} structures are not in the picture")
        try:
            for number, mask in masks(annotation, grid, numbers[:room]) if room and numbers else ():
                names.append(named[number][:MAX_NAME])
                value = len(names)
                sizes[value] = np.count_nonzero(mask)
                covered = drawn[mask]
                drawn[mask] = np.where((covered == 0) | (sizes[covered] > sizes[value]), value, covered)
        except MedsegError as error:
            problems[annotation.uid] = error
    return names, drawn, remarks, problems
