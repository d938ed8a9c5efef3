"""The structures of a label: of a label map by value, of SEG and RTSTRUCT files by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError, nearest
from medseg.formats.dicom.annotations import folded, masks
from medseg.formats.dicom.structures import Annotation
from medseg.label_values import integer_values
from medseg.labels import Labels
from medseg.volume import Grid, Volume


@dataclass(frozen=True, eq=False)
class Region:
    """One structure of a case.

    Args:
        name: of the class or structure.
        value: what stands for it in the file: a value, or the number of a structure.
        mask: bool, on the image's grid.
    """

    name: str
    value: int
    mask: NDArray[np.bool_]


def regions_of_map(
    label: Volume, grid: Grid, table: Labels | None, wanted: Sequence[str], where: str
) -> Iterator[Region]:
    """The structures of a label map.

    Args:
        label: with the values of files; its axes may be flipped or permuted.
        grid: of the image.
        table: what the values mean; None makes every value but 0 a structure ("label_3").
        wanted: names or values; () is all. One that the map does not hold gives an empty region.
        where: case id for messages.
    Raises:
        MedsegError: E_GRID if the map does not lie on the image's grid; E_LABEL for values that are no whole numbers,
            that the table does not know, or for names without a table.
    """
    array = integer_values(aligned(label, grid, where).array, where=where)
    if table is None:
        found = [int(v) for v in np.unique(array) if v]
        values = [_value(name) for name in wanted] if wanted else found
        for value in values or [0]:  # an empty map says so in its row
            yield Region(f"label_{value}" if value else "", value, (array == value) & (array != 0))
        return
    indices = table.to_index(array, where=where)
    written = table.written_values()
    for name, classes in zip(table.foreground, table.parts, strict=True):
        values_of = {str(v) for index in classes for v in table.values[index]}
        if not wanted or any(folded(w) == folded(name) or w in values_of for w in wanted):
            yield Region(name, written[classes[0]], np.isin(indices, classes))


def check_wanted(table: Labels | None, wanted: Sequence[str]) -> None:
    """Refuse names of structures that no label map can hold.

    Raises:
        MedsegError: E_NAME for a name that the table does not have, E_LABEL for a name where there is none.
    """
    for name in wanted:
        if table is None:
            _value(name)
            continue
        known = {folded(n) for n in table.foreground} | {str(v) for values in table.values[1:] for v in values}
        if folded(name) not in known:
            raise MedsegError(
                Code.NAME, f"there is no structure {name!r}", where="--label", remedy=nearest(name, table.foreground)
            )


def regions_of_annotations(
    annotations: Sequence[Annotation], grid: Grid, wanted: Sequence[str], where: str
) -> Iterator[Region]:
    """The structures of SEG and RTSTRUCT files, each as it was drawn: they may overlap.

    What several files hold under one name has the file's pseudonym behind it: they may be versions of one drawing.

    Args:
        annotations: of one image.
        grid: of the image, as its reader gives it.
        wanted: names or numbers; () is all.
        where: case id for messages.
    Raises:
        MedsegError: E_LABEL if the files hold none of the structures that are wanted; what reading them refuses.
    """
    there = [structure.name for annotation in annotations for structure in annotation.structures]
    held = Counter(name for a in annotations for name in {folded(s.name) for s in a.structures})
    given = {folded(name) for name in wanted}
    any_wanted = False
    for annotation in annotations:
        names = {
            s.number: s.name
            for s in annotation.structures
            if not wanted or folded(s.name) in given or str(s.number) in given
        }
        if not names:
            continue
        for number, mask in masks(annotation, grid, list(names)):
            any_wanted = True
            several = held[folded(names[number])] > 1
            name = f"{names[number]} ({annotation.pseudonym})" if several else names[number]
            yield Region(name, number, mask)
    if not any_wanted:
        raise MedsegError(
            Code.LABEL,
            "none of the structures that are wanted was drawn on this image",
            where=where,
            expected=", ".join(wanted) or "any structure",
            got=", ".join(there) or "no structure",
            remedy=nearest(wanted[0], there) if wanted and there else None,
        )


def aligned(label: Volume, grid: Grid, where: str) -> Volume:
    """A label map with its axes in the order of the image's.

    Raises:
        MedsegError: E_GRID if the two do not lie on one grid.
    """
    if label.grid.difference(grid) is None:
        return label
    try:
        return label.oriented_as(grid)
    except MedsegError as error:
        raise MedsegError(
            Code.GRID,
            "image and label do not lie on one grid",
            where=where,
            expected=f"shape {grid.shape}, spacing {_times(grid.spacing_mm)} (image)",
            got=f"shape {label.grid.shape}: {label.grid.difference(grid)}",
            remedy="draw on this image, or resample the label onto it with nearest neighbour",
        ) from error


def _times(spacing: Sequence[float]) -> str:
    return " × ".join(f"{s:.4g}" for s in spacing)


def _value(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise MedsegError(
            Code.LABEL,
            f"nothing says which value is {name!r}",
            where="--label",
            expected="a value of the label files, or names beside them",
            remedy='say what the values mean: --labels "{tumour: 1}"',
        ) from None
