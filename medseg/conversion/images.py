"""DICOM series as NIfTI files: one, or every one of a tree with what was drawn on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from medseg.conversion.options import Options, check_targets, say_written
from medseg.conversion.structures import look, write_separate
from medseg.conversion.tables import draw_label, table_for
from medseg.data.structure_table import StructureTable
from medseg.errors import Code, MedsegError
from medseg.formats import open_volume, write_image, write_label
from medseg.formats.atomic import make_folder
from medseg.formats.content import damage_with_content
from medseg.formats.dicom.catalog import Catalog, CatalogSeries
from medseg.formats.label_table import CaseRecord, beside, write_table, written_names
from medseg.formats.remarks import gathered_warnings
from medseg.labels import TABLE_FILE
from medseg.program import command
from medseg.volume import Grid, Volume

LABEL_ENDING = "_seg"
"""Behind a case's id: the name by which `medseg train` finds labels beside images."""
SERIES, DRAWN, ORPHAN, DAMAGED = "series", "label", "annotation without its images", "damaged file"
"""What can be left out of a tree's conversion."""
PLURALS = {DRAWN: "labels", ORPHAN: "annotations without their images", DAMAGED: "damaged files"}
MAX_LISTED = 20
"""Series that one message lists."""


def convert_series(source: Path, target: Path, console: Console, options: Options) -> list[Path]:
    """One series as one file; what is to be known of it stands in a table beside it.

    Raises:
        MedsegError: E_OUTPUT, and what reading refuses.
    """
    check_targets([target, beside(target)], [source], overwrite=options.overwrite)
    with console.status("reading"), gathered_warnings() as warnings:
        volume = open_volume(source, options.reading)
        make_folder(target.parent)
        write_image(target, volume)
        if volume.notes:
            write_table(beside(target), None, {beside(target).stem: CaseRecord((target.name,), volume.notes)})
    say_written(console, target, volume, warnings)
    return [target]


@dataclass
class _Tree:
    """A conversion of many series under way: images first, then what was drawn on those that could be read."""

    folder: Path
    console: Console
    options: Options
    records: dict[str, CaseRecord] = field(default_factory=dict)
    failed: list[tuple[Code, str]] = field(default_factory=list)
    """Code of each failure, and the kind of thing that was not converted."""

    def write_image(self, series: CatalogSeries) -> Grid | None:
        """One series; None where it cannot be read, which is kept for the end."""
        try:
            with gathered_warnings() as warnings:
                volume = open_volume(series.info, self.options.reading)
                path = self.folder / image_name(series.case_id, volume.grid)
                write_image(path, volume)
        except MedsegError as error:
            self.refused(SERIES, series.case_id, error)
            return None
        say_written(self.console, path, volume, warnings)
        self._record(series.case_id, [path], volume.notes)
        return volume.grid

    def write_label(self, series: CatalogSeries, grid: Grid, table: StructureTable) -> None:
        """What was drawn on one series; what is wrong is kept for the end."""
        name = series.case_id + LABEL_ENDING
        try:
            if self.options.separate:
                for number, annotation in enumerate(series.annotations, start=1):
                    folder = self.folder / (name if number == 1 else f"{name}_{number}")
                    make_folder(folder)
                    files = write_separate(annotation, grid, folder, annotation.path, self.console, self.options)
                    self._record(series.case_id, files, ())
                return
            with gathered_warnings() as warnings:
                label: Volume = draw_label(table, series.annotations, grid, series.case_id)
                path = self.folder / f"{name}.nii.gz"
                write_label(path, label, written_names(table.labels))
        except MedsegError as error:
            self.refused(DRAWN, f"{series.case_id}, what was drawn on it", error)
            return
        say_written(self.console, path, label, warnings, ", ".join(a.kind for a in series.annotations))
        self._record(series.case_id, [path], label.notes)

    def refused(self, kind: str, name: str, error: MedsegError) -> None:
        """Say what is wrong and what to do about it; the end counts it."""
        got = f" ({error.got})" if error.got is not None else ""
        self.left(kind, error.code, f"{name}: {error.code}: {error.message}{got}", error.remedy)

    def left(self, kind: str, code: Code, line: str, remedy: str | None) -> None:
        """Say that something is not converted."""
        self.failed.append((code, kind))
        self.console.print(line, style="red", highlight=False, soft_wrap=True, markup=False)
        if remedy is not None:
            self.console.print(f"    remedy: {remedy}", highlight=False, soft_wrap=True, markup=False)

    def _record(self, case: str, files: Sequence[Path], notes: tuple[str, ...]) -> None:
        old = self.records.get(case, CaseRecord(()))
        names = (*old.files, *(file.relative_to(self.folder).as_posix() for file in files))
        self.records[case] = CaseRecord(names, old.notes + notes)


def convert_tree(source: Path, folder: Path, console: Console, options: Options) -> list[Path]:
    """Every series of a tree as one NIfTI file, and what was drawn on it as a label file beside it.

    Raises:
        MedsegError: E_NO_CASES, E_OUTPUT; after all else is written, of what could not be converted.
    """
    with console.status("looking at the files") as status:
        catalog = look(source, options, lambda n, total: status.update(f"looking at the files ({n} of {total})"))
    chosen = _chosen(catalog, source, options)
    if options.labels is not None:  # a wrong table is refused before any work
        table_for([annotation for series in chosen for annotation in series.annotations], options.labels)
    targets = [folder / f"{s.case_id}{ending}" for s in chosen for ending in (".nii.gz", ".tif", "_seg.nii.gz")]
    check_targets([folder / TABLE_FILE, *targets], (), overwrite=options.overwrite)
    make_folder(folder)
    tree = _Tree(folder, console, options)
    drawn: list[tuple[CatalogSeries, Grid]] = []
    for number, series in enumerate(chosen, start=1):
        with console.status(f"{series.case_id} ({number} of {len(chosen)})"):
            grid = tree.write_image(series)
        if grid is not None and series.annotations:
            drawn.append((series, grid))
    table = _draw_all(tree, drawn)
    if tree.records:
        write_table(folder / TABLE_FILE, None if table is None else table.labels.to_json(), tree.records)
    _say_end(tree, catalog, len(chosen))
    return [folder / name for record in tree.records.values() for name in record.files]


def _draw_all(tree: _Tree, drawn: Sequence[tuple[CatalogSeries, Grid]]) -> StructureTable | None:
    """The labels of all series by one table, so that a value means the same everywhere."""
    if not drawn:
        return None
    try:
        table = table_for([a for series, _ in drawn for a in series.annotations], tree.options.labels)
    except MedsegError as error:
        tree.refused(DRAWN, "what was drawn", error)
        return None
    for number, (series, grid) in enumerate(drawn, start=1):
        with tree.console.status(f"{series.case_id}, what was drawn on it ({number} of {len(drawn)})"):
            tree.write_label(series, grid, table)
    if tree.options.separate:
        return None
    classes = ", ".join(f"{name}: {value}" for name, value in table.labels.to_json().items() if value)
    tree.console.print(f"classes: {classes}", highlight=False, soft_wrap=True, markup=False)
    return table


def image_name(case_id: str, grid: Grid) -> str:
    """Name of a series' file: NIfTI for volumes, TIFF for pictures."""
    return case_id + (".tif" if grid.is_picture else ".nii.gz")


def _chosen(catalog: Catalog, source: Path, options: Options) -> list[CatalogSeries]:
    wanted = options.reading.series
    chosen = [s for s in catalog.series if wanted in (None, s.info.uid, s.case_id)]
    if chosen:
        return chosen
    if wanted is not None and catalog.series:
        raise MedsegError(
            Code.MISSING,
            "there is no such series",
            where=source.name,
            expected="; ".join(str(s.info) for s in catalog.series[:MAX_LISTED]),
            got=wanted,
        )
    found = [f"{count} {kind}" for kind, count in catalog.others.items()]
    if catalog.orphans:
        found.append(f"{len(catalog.orphans)} annotations without images")
    if catalog.damaged:
        path, reason = catalog.damaged[0]
        why, _ = damage_with_content(path, reason)
        found.append(f"{len(catalog.damaged)} damaged files ({path.name}: {why})")
    raise MedsegError(
        Code.NO_CASES,
        "there is no DICOM image here",
        where=source.name,
        got=", ".join(found) or "no DICOM file",
        remedy="check the path; old files without a preamble are read with --without-preamble",
    )


def _say_end(tree: _Tree, catalog: Catalog, num_series: int) -> None:
    """What belongs to no series, a line that sums up, and a refusal where something was left behind.

    Raises:
        MedsegError: with the code of the first failure, and how many there are.
    """
    if tree.options.reading.series is None:
        inspect = f"{command('inspect', 'IN')} shows what belongs together"
        for annotation, why in catalog.orphans:
            line = f"{annotation.path.name}: {Code.REFERENCE}: {why.removeprefix(f'{Code.REFERENCE}: ')}"
            tree.left(ORPHAN, Code.REFERENCE, line, inspect)
        for path, reason in catalog.damaged:
            why, remedy = damage_with_content(path, reason)
            code = why.partition(":")[0]
            tree.left(DAMAGED, Code(code) if code in set(Code) else Code.TRUNCATED, f"{path.name}: {why}", remedy)
    written = f"{len(tree.records)} of {num_series} series written to {tree.folder}"
    tree.console.print(written, highlight=False, soft_wrap=True, markup=False)
    if tree.failed:
        raise MedsegError(tree.failed[0][0], _summed_up(Counter(kind for _, kind in tree.failed), num_series))


def _summed_up(failed: Counter[str], num_series: int) -> str:
    """ "2 of 20 series and 1 damaged file were not converted; see above"."""
    parts = [f"{failed[SERIES]} of {num_series} series"] if failed[SERIES] else []
    for kind in (DRAWN, ORPHAN, DAMAGED):
        noun = kind if failed[kind] == 1 else PLURALS[kind]
        parts += [f"{failed[kind]} {noun}"] if failed[kind] else []
    what = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{what} {'was' if failed.total() == 1 else 'were'} not converted; see above"
