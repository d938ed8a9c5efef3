"""`medseg inspect`: what lies at a path, which of it can be read, and what belongs together.

Names of folders and of DICOM files may hold the patient's, so they are shown only where they are asked for. An
inventory is a report: what is wrong with a scan stands in it and stops nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg.errors import Code, MedsegError
from medseg.formats import IMAGE_SUFFIXES, STRICT, Reading, Source, is_image_file, read_grid, strip_suffix
from medseg.formats.content import Kind, damage_with_content, kind_of
from medseg.formats.dicom.archive import ZIP_REMEDY, ZIPS
from medseg.formats.dicom.catalog import Catalog, CatalogSeries, read_catalog
from medseg.formats.dicom.structures import Annotation
from medseg.formats.remarks import gathered_warnings
from medseg.reports.progress import counting_bar
from medseg.volume import Grid

SCHEMA = 1
"""Of the JSON; another number where a key changes its meaning."""
IRREGULAR = (Code.GAP, Code.SPACING, Code.TILT)
"""What resampling mends."""
_LEAST_LETTERS = 5
"""Of a file's name that is kept out of messages: "1" or "28" would be taken for numbers in them."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scan:
    """A series of DICOM images, or an image file."""

    name: str
    """The catalog's case id, or the name of an image file without its ending, numbered where others have it."""
    kind: str
    """Modality of a series; "NIfTI" or "picture" for a file."""
    source: Source
    files: tuple[Path, ...]
    grid: Grid | None
    problem: MedsegError | None
    warnings: tuple[str, ...] = ()
    series: CatalogSeries | None = None
    """What else is known of a DICOM series."""
    picture: str | None = None
    """File name of its picture, if one was drawn."""
    undrawable: Mapping[str, MedsegError] = field(default_factory=dict)
    """UID of each annotation that cannot be read on this scan, and why: known where pictures were drawn."""

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """What was drawn on it."""
        return self.series.annotations if self.series else ()

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders of a series, or the file."""
        return tuple(sorted({file.parent for file in self.files})) if self.series else self.files


@dataclass(frozen=True)
class Inventory:
    """All that lies at a path."""

    catalog: Catalog
    """Empty where there is no DICOM."""
    scans: tuple[Scan, ...]
    """The series of the catalog, then the image files."""


def inspect_path(
    path: Path,
    console: Console,
    *,
    as_json: bool = False,
    pictures: Path | None = None,
    paths: bool = False,
    reading: Reading = STRICT,
) -> None:
    """Say what lies at a path: a table, or JSON alone; progress goes to the standard error.

    Args:
        path: a tree or zip of DICOM files, a folder of images, or one file.
        console: where the table or the JSON goes.
        as_json: print JSON.
        pictures: folder for a picture of each scan; reads the voxels, which finds more that is wrong than headers do.
        paths: show where each scan lies, relative to `path`.
        reading: how scans are judged and drawn; `series` shows one only: its SeriesInstanceUID or case id.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_LIMIT; E_OUTPUT if pictures cannot be written.
    """
    from medseg.reports.inventory_table import show_inventory

    series = reading.series
    reading = replace(reading, channels=True, series=None)
    with gathered_warnings(), counting_bar(Console(stderr=True), "headers") as progress:
        inventory = take_inventory(path, reading, progress)
    if series is not None:
        inventory = _only(inventory, series)
    if pictures is not None:
        with gathered_warnings(), counting_bar(Console(stderr=True), "pictures") as progress:
            inventory = draw_pictures(inventory, pictures, reading, progress)
    if as_json:
        console.out(json.dumps(inventory_json(inventory, paths=paths), indent=2), highlight=False)
    else:
        show_inventory(inventory, console, paths=paths)
    if pictures is not None:
        drawn = sum(scan.picture is not None for scan in inventory.scans)
        teller = Console(stderr=True) if as_json else console
        what = f"{drawn} {'picture' if drawn == 1 else 'pictures'} in {pictures}"
        teller.print(what, highlight=False, soft_wrap=True, markup=False)


def take_inventory(path: Path, reading: Reading, progress: Progress | None = None) -> Inventory:
    """Look at what lies at a path, headers only.

    Args:
        path: a tree or zip of DICOM files, a folder of images, or one file.
        reading: how the scans would be read.
        progress: called with (files done, all files).
    Raises:
        MedsegError: E_MISSING, E_LIMIT; E_NO_CASES if nothing is there.
    """
    if path.is_file() and kind_of(path) in (Kind.NIFTI, Kind.PICTURE):
        return Inventory(Catalog(path, (), (), {}, ()), (_scan_of_file(path, reading),))
    catalog = read_catalog(path, progress, without_preamble=reading.without_preamble)
    images = [_scan_of_file(file, reading) for file in _image_files(catalog.root)]
    scans = tuple(_numbered((*(_scan_of_series(s, reading) for s in catalog.series), *images)))
    zips = catalog.others.get(ZIPS, 0)
    if not (scans or catalog.orphans or catalog.others.keys() - {ZIPS} or catalog.damaged):
        raise MedsegError(
            Code.NO_CASES,
            "there are no images here",
            where=path.name,
            expected="DICOM, NIfTI, PNG, TIFF, JPEG or GIF files",
            got=f"{zips} zip files" if zips else "files of other kinds, or none",
            remedy=ZIP_REMEDY if zips else "check the path",
        )
    return Inventory(catalog, scans)


def draw_pictures(inventory: Inventory, folder: Path, reading: Reading, progress: Progress | None = None) -> Inventory:
    """Write a PNG of each scan that can be read.

    Args:
        inventory: of the scans.
        folder: is made where it does not exist; pictures of the same name are replaced.
        reading: how the scans are read.
        progress: called with (scans done, all scans).
    Returns:
        The inventory with the pictures' names, and with what reading the voxels found to be wrong.
    Raises:
        MedsegError: E_OUTPUT if a picture cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise MedsegError(Code.OUTPUT, "the folder for pictures is a file", where=folder.name, remedy="name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    scans = []
    for done, scan in enumerate(inventory.scans, start=1):
        if scan.problem is None:
            scan = _drawn(scan, folder / f"{scan.name}.png", reading)
        scans.append(scan)
        if progress is not None:
            progress(done, len(inventory.scans))
    return replace(inventory, scans=tuple(scans))


def _drawn(scan: Scan, path: Path, reading: Reading) -> Scan:
    from medseg.reports.series_picture import save_picture

    try:
        remarks, undrawable = save_picture(path, scan.source, scan.annotations, title=scan.name, reading=reading)
    except MedsegError as error:
        if error.code is Code.OUTPUT:
            raise
        return replace(scan, problem=error)
    warnings = tuple(dict.fromkeys((*scan.warnings, *remarks)))
    return replace(scan, picture=path.name, warnings=warnings, undrawable=undrawable)


def _numbered(scans: Iterable[Scan]) -> Iterator[Scan]:
    """The scans under names that tell them apart, also where files' names do not tell A from a: "scan", "scan (2)"."""
    taken: set[str] = set()
    for scan in scans:
        name, number = scan.name, 1
        while name.casefold() in taken:
            number += 1
            name = f"{scan.name} ({number})"
        taken.add(name.casefold())
        yield scan if number == 1 else replace(scan, name=name)


def inventory_json(inventory: Inventory, *, paths: bool = False) -> dict[str, Any]:
    """The inventory for programs: numbers as numbers, null for what is not known.

    Args:
        inventory: what was found.
        paths: say where things lie, relative to the root.
    """
    catalog = inventory.catalog
    return {
        "schema": SCHEMA,
        "summary": counts(inventory),
        "series": [_scan_json(inventory, scan, paths) for scan in inventory.scans if scan.series],
        "images": [_scan_json(inventory, scan, paths) for scan in inventory.scans if not scan.series],
        "orphans": [
            {**_annotation_json(annotation), "reason": reason, **_place_json(catalog, annotation.path, paths)}
            for annotation, reason in catalog.orphans
        ],
        "others": catalog.others,
        "damaged": [
            {"reason": why, "remedy": remedy, **_place_json(catalog, path, paths)}
            for path, reason in catalog.damaged
            for why, remedy in [damage_with_content(path, reason)]
        ],
    }


def counts(inventory: Inventory) -> dict[str, int]:
    """How many there are of everything."""
    catalog = inventory.catalog
    return {
        "series": len(catalog.series),
        "patients": len({s.patient for s in catalog.series}),
        "images": sum(scan.series is None for scan in inventory.scans),
        "with_problems": sum(scan.problem is not None for scan in inventory.scans),
        "with_warnings": sum(bool(scan.warnings) for scan in inventory.scans),
        "annotations": len({a.uid for s in catalog.series for a in s.annotations}) + len(catalog.orphans),
        "orphans": len(catalog.orphans),
        "annotations_with_problems": len({uid for scan in inventory.scans for uid in scan.undrawable}),
        "others": sum(catalog.others.values()),
        "damaged": len(catalog.damaged),
    }


def place_of(catalog: Catalog, path: Path) -> str:
    """A path relative to the root."""
    root = catalog.root if catalog.root.is_dir() else catalog.root.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def told(scan: Scan, text: object) -> str | None:
    """A part of a refusal, without the names of the DICOM files concerned; None stays None."""
    if text is None:
        return None
    files = scan.files if scan.series else ()
    numbers = {f.name: n for n, f in enumerate(files, start=1) if len(f.name) >= _LEAST_LETTERS}
    names = "|".join(re.escape(name) for name in sorted(numbers, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({names})(?!\w)", lambda m: f"file {numbers[m[1]]}", str(text)) if numbers else str(text)


def printable(text: str) -> str:
    """Text from a file without control characters, which could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _scan_json(inventory: Inventory, scan: Scan, paths: bool) -> dict[str, Any]:
    grid, error, series = scan.grid, scan.problem, scan.series
    entry: dict[str, Any] = {
        "case_id": scan.name,
        "kind": scan.kind,
        "num_files": len(scan.files),
        "shape": list(grid.shape) if grid else None,
        "spacing_mm": list(grid.spacing_mm) if grid else None,
        "orientation": grid.orientation if grid else None,
        "frame": grid.frame if grid else None,
        "affine": grid.affine.tolist() if grid else None,
        "problem": _problem_json(scan, error),
        "warnings": [told(scan, warning) for warning in scan.warnings],
        "picture": scan.picture,
    }
    if series is not None:
        entry |= {
            "modality": series.info.modality or None,
            "series_uid": series.info.uid,
            "study_uid": series.study_uid,
            "frame_of_reference_uid": series.frame_of_reference,
            "patient": series.patient,
            "annotations": [
                {
                    **_annotation_json(a),
                    "problem": _problem_json(scan, scan.undrawable.get(a.uid)),
                    **_place_json(inventory.catalog, a.path, paths),
                }
                for a in series.annotations
            ],
        }
    if paths:
        entry |= _place_json(inventory.catalog, scan.places[0], paths)
        entry["paths"] = [place_of(inventory.catalog, place) for place in scan.places]
    return entry


def _problem_json(scan: Scan, error: MedsegError | None) -> dict[str, str | None] | None:
    keys = ("code", "message", "expected", "got", "remedy")
    return None if error is None else {key: told(scan, getattr(error, key)) for key in keys}


def _annotation_json(annotation: Annotation) -> dict[str, Any]:
    return {
        "kind": annotation.kind,
        "detail": annotation.detail,
        "uid": annotation.uid,
        "series_uid": annotation.series_uid,
        "structures": [
            {
                "number": s.number,
                "name": s.name,
                "concept": None if s.concept is None else s.concept._asdict(),
                "category": None if s.category is None else s.category._asdict(),
                "color": None if s.color is None else list(s.color),
            }
            for s in annotation.structures
        ],
    }


def _place_json(catalog: Catalog, path: Path, paths: bool) -> dict[str, str]:
    return {"path": place_of(catalog, path)} if paths else {}


def _scan_of_series(series: CatalogSeries, reading: Reading) -> Scan:
    scan = Scan(
        series.case_id,
        series.info.modality,
        series.info,
        series.info.files,
        series.grid,
        series.problem,
        series.warnings,
        series,
    )
    if reading.resample_irregular and series.problem is not None and series.problem.code in IRREGULAR:
        try:
            grid = read_grid(series.info, reading)
        except MedsegError as error:
            return replace(scan, problem=error)
        note = f"resampled to a regular grid; without it {series.problem.code}: {series.problem.message}"
        return replace(scan, grid=grid, problem=None, warnings=(*scan.warnings, note))
    return scan


def _scan_of_file(path: Path, reading: Reading) -> Scan:
    kind = grid = problem = None
    try:
        kind = kind_of(path)
        grid = read_grid(path, reading)
    except MedsegError as error:
        problem = error
    return Scan(strip_suffix(path.name), kind.value if kind else "", path, (path,), grid, problem)


def _image_files(root: Path) -> Iterator[Path]:
    """The image files of a tree that are not DICOM; links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if not name.lower().endswith(".dcm") and _is_picture_or_nifti(path):
                yield path


def _is_picture_or_nifti(path: Path) -> bool:
    try:
        return is_image_file(path) and kind_of(path) is not Kind.DICOM
    except MedsegError:  # it cannot be opened: `_scan_of_file` says why
        return path.name.lower().endswith(IMAGE_SUFFIXES)


def _only(inventory: Inventory, wanted: str) -> Inventory:
    """One scan of an inventory, by its SeriesInstanceUID or case id."""
    scans = [s for s in inventory.scans if wanted in (s.name, s.series and s.series.info.uid)]
    if not scans:
        raise MedsegError(
            Code.MISSING,
            "there is no such series here",
            where=inventory.catalog.root.name,
            expected=", ".join(s.name for s in inventory.scans) or "no series",
            got=wanted,
        )
    kept = tuple(s.series for s in scans if s.series)
    return Inventory(Catalog(inventory.catalog.root, kept, (), {}, ()), tuple(scans))
