"""SEG and RTSTRUCT files as label maps on the grid of their images."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from medseg.conversion.options import Options, check_targets, is_file_name, say_written
from medseg.conversion.tables import draw_label, table_for
from medseg.data.structure_table import StructureTable
from medseg.errors import Code, MedsegError
from medseg.formats import Source, read_grid, write_label
from medseg.formats.atomic import make_folder
from medseg.formats.content import Kind, kind_of
from medseg.formats.dicom.annotations import folded, masks, read_annotation
from medseg.formats.dicom.catalog import Catalog, CatalogSeries, read_catalog
from medseg.formats.dicom.structures import Annotation
from medseg.formats.label_table import CaseRecord, beside, write_table, written_names
from medseg.formats.remarks import gathered_warnings
from medseg.volume import Grid, Volume

logger = logging.getLogger(__name__)


def convert_annotation(path: Path, target: Path, console: Console, options: Options) -> list[Path]:
    """A SEG or RTSTRUCT file as a label file, or with `separate` as a folder of one file for each structure.

    Raises:
        MedsegError: E_OUTPUT, E_REFERENCE, E_GRID, E_LABEL, and what reading refuses.
    """
    annotation = read_annotation(path)
    if options.separate == is_file_name(target):
        raise MedsegError(
            Code.OUTPUT,
            "--separate writes several files, so the output is a folder"
            if options.separate
            else "one annotation becomes one file",
            where=target.name,
            expected="a folder" if options.separate else "a name that ends in .nii.gz",
            remedy=None
            if options.separate
            else "end the output in .nii.gz, or add --separate for a file per structure",
        )
    with gathered_warnings() as warnings, console.status("reading structures"):
        grid = _grid_for(annotation, options)
        if options.separate:
            make_folder(target)
            return write_separate(annotation, grid, target, path, console, options)
        table = table_for([annotation], options.labels)
        check_targets([target, beside(target)], [path], overwrite=options.overwrite)
        label = draw_label(table, [annotation], grid, path.name)
        make_folder(target.parent)
        write_label(target, label, written_names(table.labels))
        write_table(beside(target), table.labels.to_json(), {_stem(target): CaseRecord((target.name,), label.notes)})
    if options.image is None and annotation.kind == "SEG":
        warnings.append("on the SEG's own grid; --image SERIES puts it on that of its images")
    say_written(console, target, label, warnings, _classes(table))
    return [target]


def write_separate(
    annotation: Annotation, grid: Grid, folder: Path, source: Path, console: Console, options: Options
) -> list[Path]:
    """One binary label file for each structure, by its name."""
    wanted = {s.number: s.name for s in annotation.structures}
    if options.labels is not None:
        table = table_for([annotation], options.labels)
        chosen = {folded(name) for names in table.classes.values() for name in names}
        wanted = {number: name for number, name in wanted.items() if folded(name) in chosen}
    files = _file_names(wanted)
    check_targets([folder / name for name in files.values()], [source], overwrite=options.overwrite)
    written: list[Path] = []
    for number, mask in masks(annotation, grid, list(wanted)):
        label = Volume(mask.astype(np.uint8), grid)
        written.append(folder / files[number])
        write_label(written[-1], label, {1: wanted[number]})
        say_written(console, written[-1], label, (), f"{int(mask.sum())} voxels")
    return written


def look(root: Path, options: Options, progress: Callable[[int, int], None] | None = None) -> Catalog:
    """What lies in a tree; what is odd about single series is said when they are read."""
    with gathered_warnings():
        return read_catalog(root, progress, without_preamble=options.reading.without_preamble)


def series_of(annotation: Annotation, options: Options) -> CatalogSeries:
    """The series that an annotation was drawn on, searched beside the file and one folder higher.

    Raises:
        MedsegError: E_REFERENCE if it is not there.
    """
    reason: str | None = None
    for root in annotation.path.resolve().parents[:2]:
        if root in (Path.home(), Path(root.anchor)):
            break
        catalog = look(root, options)
        for series in catalog.series:
            if any(a.uid == annotation.uid for a in series.annotations):
                return series
        reason = next((why for orphan, why in catalog.orphans if orphan.uid == annotation.uid), reason)
    raise MedsegError(
        Code.REFERENCE,
        "the images that this file was drawn on were not found beside it",
        where=annotation.path.name,
        expected=f"a series {', '.join(annotation.series) or 'that it refers to'}",
        got=reason,
        remedy="give them: --image SERIES",
    )


def _grid_for(annotation: Annotation, options: Options) -> Grid:
    """The grid that the label is to lie on."""
    if options.image is not None:
        return read_grid(_referenced(annotation, options.image, options), options.reading)
    if annotation.kind == "SEG":
        from medseg.formats.dicom.seg import own_grid

        return own_grid(annotation)
    return read_grid(series_of(annotation, options).info, options.reading)


def _referenced(annotation: Annotation, image: Path, options: Options) -> Source:
    """The series in `image` that the annotation refers to, by its UID, else by the frame of reference.

    Raises:
        MedsegError: E_REFERENCE where it refers to others, or to this one in another frame of reference: another
            patient's grid may fit by chance.
    """
    if image.is_file() and kind_of(image) in (Kind.NIFTI, Kind.PICTURE):
        return image  # nothing tells whether it belongs: the grid must fit
    found = [s for s in look(image, options).series if options.reading.series in (None, s.info.uid, s.case_id)]
    space = annotation.frame_of_reference
    named = [s for s in found if s.info.uid in annotation.series]
    same_space = [s for s in found if space is not None and s.frame_of_reference == space]
    fitting = [s for s in named or same_space if space is None or s.frame_of_reference in (None, space)]
    if named and not fitting:
        raise MedsegError(
            Code.REFERENCE,
            "this file was drawn in another frame of reference than its images lie in",
            where=annotation.path.name,
            expected=f"the frame of reference {space}",
            got=", ".join(str(series.frame_of_reference) for series in named),
            remedy="export the images and the structures together again",
        )
    if len(fitting) == 1:
        if annotation.series and not named:
            logger.warning("it was drawn on another series than %s, in the same frame of reference", fitting[0].case_id)
        return fitting[0].info
    if fitting or not found or not (annotation.series or space):
        return image  # the reader says that there are several, or none
    raise MedsegError(
        Code.REFERENCE,
        "this file was drawn on other images",
        where=annotation.path.name,
        expected=f"the series {', '.join(annotation.series)}" if annotation.series else "its frame of reference",
        got=", ".join(series.info.uid for series in found),
        remedy="give the series that it refers to with --image; medseg inspect shows what belongs together",
    )


def _file_names(structures: dict[int, str]) -> dict[int, str]:
    """Structure number → file name; equal names get their number behind."""
    plain = {number: re.sub(r"[^\w+-]+", "_", name).strip("_") or "structure" for number, name in structures.items()}
    counts: dict[str, int] = {}
    for name in plain.values():
        counts[name.casefold()] = counts.get(name.casefold(), 0) + 1
    return {
        number: (name if counts[name.casefold()] == 1 else f"{name}_{number}") + ".nii.gz"
        for number, name in plain.items()
    }


def _classes(table: StructureTable) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(table.classes, start=1))


def _stem(path: Path) -> str:
    return beside(path).stem
