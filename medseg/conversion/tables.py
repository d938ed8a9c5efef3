"""Which structures become which values of a label file: as the user says, or all of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

import yaml

from medseg.data.structure_table import BACKGROUND, MAX_CLASSES, StructureTable, declared_table
from medseg.errors import Code, MedsegError, nearest
from medseg.formats.dicom.annotations import DrawnLabel, folded, overlap_of, read_label
from medseg.formats.dicom.structures import Annotation
from medseg.formats.label_table import table_of
from medseg.volume import Grid, Volume

EXAMPLE = '--labels "{tumour: [GTV-1, gtv], lung: Lung}"'


def table_for(annotations: Sequence[Annotation], text: str | None) -> StructureTable:
    """The table that the user wrote, or one of all structures.

    Args:
        annotations: of all images that are converted together.
        text: `{tumour: [GTV-1, gtv]}` as on a command line, in YAML; None takes all.
    Raises:
        MedsegError: E_LABEL if the text is no such table or no annotation has the structures of a class.
    """
    if text is None:
        return _of_all(annotations)
    table = _parsed(text)
    known = {folded(s.name): s.name for annotation in annotations for s in annotation.structures}
    for name, structures in table.classes.items():
        if not any(folded(structure) in known for structure in structures):
            raise MedsegError(
                Code.LABEL,
                f"nothing that was drawn is called {' or '.join(map(repr, structures))}",
                where=f"--labels, class {name}",
                expected=", ".join(known.values()) or "no structure at all",
                remedy=nearest(structures[0], known.values()) if known else None,
            )
    return table


def draw_label(table: StructureTable, annotations: Sequence[Annotation], grid: Grid, name: str) -> Volume:
    """The label map of one image.

    Args:
        table: the classes.
        annotations: what was drawn on the image.
        grid: of the image.
        name: what messages call it.
    Raises:
        MedsegError: E_LABEL where structures overlap and the user did not say which wins, or none is there; as
            `masks`.
    """
    try:
        volume = read_label(DrawnLabel(tuple(annotations), tuple(table.classes.values()), name), grid)
    except MedsegError as error:
        if error.code is not Code.LABEL:
            raise
        raise MedsegError(
            error.code,
            error.message,
            where=error.where,
            expected=error.expected,
            got=error.got,
            remedy=f"name the structures of this image too: {EXAMPLE}",
        ) from error
    overlap = overlap_of(volume.notes)
    if overlap is not None and not table.is_declared:
        whole = {name: list(structures) for name, structures in table.classes.items()}
        pasted = shlex.quote(yaml.safe_dump(whole, default_flow_style=True, sort_keys=False, width=10**6).strip())
        raise MedsegError(
            Code.LABEL,
            "structures overlap, and a label file holds one per voxel",
            where=name,
            got=overlap,
            remedy=f"choose some, those that win last: --labels {pasted}; or --separate: a file for each",
        )
    return volume


def _of_all(annotations: Iterable[Annotation]) -> StructureTable:
    """Every structure a class of its name, in the order of their numbers; equal names are one class."""
    names: dict[str, str] = {}
    for annotation in annotations:
        for structure in annotation.structures:
            names.setdefault(folded(structure.name), structure.name)
    names.pop(BACKGROUND, None)
    if len(names) > MAX_CLASSES:
        raise MedsegError(
            Code.LABEL,
            "there are more structures than a label file takes",
            expected=f"at most {MAX_CLASSES}",
            got=f"{len(names)} names",
            remedy=f"choose some: {EXAMPLE}; or --separate: a file for each",
        )
    return StructureTable({name: (name,) for name in names.values()}, is_declared=False)


def _parsed(text: str) -> StructureTable:
    return declared_table(table_of(text), key="--labels", example=EXAMPLE)
