"""A DICOM series as one volume, or one picture.

Geometry first, from the headers (`stack`); pixels only of a series that is known to make a volume.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom import irregular
from medseg.formats.dicom.archive import ZIP_REMEDY, ZIPS
from medseg.formats.dicom.files import (
    EMPTY_FILES,
    LINKS,
    NO_OBJECTS,
    Scan,
    SeriesInfo,
    describe,
    read_slices,
    scan,
    series_names,
)
from medseg.formats.dicom.frames import expanded
from medseg.formats.dicom.geometry import LPS_TO_RAS
from medseg.formats.dicom.header import Slice
from medseg.formats.dicom.pixels import check_readable, num_channels, read_pixels
from medseg.formats.dicom.stack import Stack, arrange, check_claims
from medseg.formats.reading import STRICT, Reading
from medseg.volume import Grid, Volume

logger = logging.getLogger(__name__)

NUM_THREADS = 2
"""Slices that are decoded at once."""


@dataclass(frozen=True)
class Assessment:
    """What the headers of a series tell of it."""

    grid: Grid | None
    """Where its voxels lie; None if it does not make one volume."""
    problem: MedsegError | None
    """Why it does not, or why it cannot be decoded."""
    notes: tuple[str, ...]
    """What a reader would warn of."""


def read_series(source: Path | SeriesInfo, reading: Reading = STRICT) -> Volume:
    """Read a series.

    Args:
        source: a folder with all below it, a zip, a single file, or a series as `files.find_series` found it.
        reading: `series` is needed where there are several.
    Returns:
        float32 (channels, columns, rows, slices), the grid in RAS+ mm; of a lone image without a position (channels,
        rows, columns) on a picture's grid; the modality; what was done or is doubtful in the notes.
    Raises:
        MedsegError: E_NOT_DICOM, E_UNSUPPORTED (DICOM, but no image), E_MISSING, E_MULTI_SERIES; what `stack.arrange`
            refuses; E_GAP, E_SPACING, E_TILT unless resampling was asked for; E_PHOTOMETRIC, E_CODEC, E_MALFORMED,
            E_TRUNCATED.
    """
    stack, notes = _read_stack(source, reading)
    array, padded = _pixels(stack.slices)
    if padded:
        notes.append("pixels outside the field of view (PixelPaddingValue) became air, -1024 HU")
    if stack.grid is not None and stack.grid.is_picture:
        volume = Volume(array[0], stack.grid, stack.first.modality or None, tuple(notes))
    else:
        grid = stack.grid
        if grid is None:
            plan = _plan(stack)
            array = np.stack([irregular.resampled(channel, plan) for channel in np.moveaxis(array, 1, 0)], axis=1)
            grid = _planned_grid(plan)
            notes.append(plan.note)
        volume = Volume(array.transpose(1, 3, 2, 0), grid, stack.first.modality or None, tuple(notes))
    name = series_names({stack.first.uid: stack.first.modality})[stack.first.uid]
    for note in notes:
        logger.warning("%s: %s", name, note)  # names of folders may hold the patient's
    return volume


def read_grid(source: Path | SeriesInfo, reading: Reading = STRICT) -> Grid:
    """The grid that `read_series` gives, from headers alone. Raises as `read_series`."""
    stack, _ = _read_stack(source, reading)
    return stack.grid if stack.grid is not None else _planned_grid(_plan(stack))


def series_files(source: Path | SeriesInfo, reading: Reading = STRICT) -> list[Path]:
    """The files of the images that `read_series` uses, in the order of its slices, each once.

    Raises as `read_series`."""
    stack, _ = _read_stack(source, reading)
    return list(dict.fromkeys(item.path for item in stack.slices))


def assess(slices: Sequence[Slice]) -> Assessment:
    """Whether images of one series, as `files.scan` found them, make one volume; pixels are read only to compare
    slices at one position.

    Returns:
        The grid, or why there is none. Colours and missing codecs are problems too, though the grid is known.
    """
    name = slices[0].uid
    try:
        stack = arrange(_expanded(slices), name)
    except MedsegError as error:
        return Assessment(None, error, ())
    try:
        _check_readable(stack.slices, STRICT)
    except MedsegError as error:
        return Assessment(stack.grid, stack.irregular or error, stack.notes)
    return Assessment(stack.grid, stack.irregular, stack.notes)


def _read_stack(source: Path | SeriesInfo, reading: Reading) -> tuple[Stack, list[str]]:
    """The images of a series in spatial order, and what to warn of; raises as `read_series`."""
    notes: list[str] = []
    if isinstance(source, Path):
        slices = _select(source, reading, notes)
    else:
        slices = read_slices(source.files, without_preamble=reading.without_preamble)
    stack = arrange(_expanded(slices), source.name)
    if stack.irregular is not None and not reading.resample_irregular:
        raise stack.irregular
    _check_readable(stack.slices, reading)
    return stack, [*notes, *stack.notes]


def _expanded(slices: Iterable[Slice]) -> list[Slice]:
    """Files as their frames; what a header claims is judged before a frame is made of it."""
    planes = []
    for item in slices:
        check_claims(item)
        planes += expanded(item)
    return planes


def _check_readable(slices: Iterable[Slice], reading: Reading) -> None:
    for item in slices:
        check_readable(item, channels=reading.channels)


def _select(path: Path, reading: Reading, notes: list[str]) -> list[Slice]:
    """The images of the only series, or of the one that was asked for."""
    found = scan(path, without_preamble=reading.without_preamble)
    if not found.slices:
        raise _no_image(path, found)
    slices = list(found.slices)
    infos = describe(slices)
    listing = "; ".join(str(info) for info in infos)
    if reading.series is not None:
        chosen = {info.uid for info in infos if reading.series in (info.uid, info.name)}
        slices = [s for s in slices if s.uid in chosen]
        if not slices:
            raise MedsegError(
                Code.MISSING,
                "there is no such series in the folder",
                where=path.name,
                expected=listing,
                got=reading.series,
                remedy="give the name or the UID of one of them",
            )
    elif len(infos) > 1:
        raise MedsegError(
            Code.MULTI_SERIES,
            f"the folder holds {len(infos)} series",
            where=path.name,
            expected="one series, or --series with the name or UID of one of them",
            got=listing,
            remedy="pick one with --series",
        )
    _check_damaged(slices, found, notes)
    return slices


def _no_image(path: Path, found: Scan) -> MedsegError:
    if found.refusals:
        return found.refusals[0][1]
    objects = {**found.others, **({"SEG or RTSTRUCT": len(found.annotations)} if found.annotations else {})}
    is_dicom = any(kind not in NO_OBJECTS for kind in objects)
    return MedsegError(
        Code.UNSUPPORTED if is_dicom else Code.NOT_DICOM,
        "there is no DICOM image here",
        where=path.name,
        expected='image files with "DICM" at byte 128, in the folder or below it',
        got=", ".join(f"{count} {kind}" for kind, count in objects.items()) or None,
        remedy="links are not followed: give the folder that holds the files themselves"
        if LINKS in objects
        else ZIP_REMEDY
        if ZIPS in objects
        else "check the path; files without a preamble are read with --without-preamble",
    )


def _check_damaged(slices: Sequence[Slice], found: Scan, notes: list[str]) -> None:
    """A damaged file beside the images may be one of them: refuse it; elsewhere in the tree it is only noted."""
    folders = {s.path.parent for s in slices}
    for file, error in found.refusals:
        if file.parent in folders:
            raise error
    if EMPTY_FILES in found.others:
        notes.append(f"slices may be missing: {found.others[EMPTY_FILES]} empty files lie beside the images")
    if found.refusals:
        notes.append(f"left out {len(found.refusals)} damaged files in other folders")


def _pixels(slices: Sequence[Slice]) -> tuple[NDArray[np.float32], bool]:
    """(slices, channels, rows, columns), and whether padding became air."""
    columns, rows = slices[0].matrix
    array = np.empty((len(slices), num_channels(slices[0]), rows, columns), dtype=np.float32)
    by_file: dict[Path, list[int]] = defaultdict(list)
    for index, item in enumerate(slices):
        by_file[item.path].append(index)

    def read(files: Iterable[list[int]]) -> bool:
        padded = [read_pixels([slices[i] for i in file], [array[i] for i in file]) for file in files]
        return any(padded)

    tasks = list(by_file.values())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        padded = list(pool.map(read, (tasks[n::NUM_THREADS] for n in range(NUM_THREADS))))
    return array, any(padded)


def _plan(stack: Stack) -> irregular.Plan:
    first = stack.first
    if first.orientation is None or first.pixel_spacing_mm is None:  # `arrange` has seen to it
        raise MedsegError(
            Code.NO_GEOMETRY,
            "a slice does not say where it lies",
            where=first.path.name,
            expected="ImagePositionPatient and ImageOrientationPatient",
            got="none",
            remedy="export the original series again",
        )
    return irregular.plan_grid(
        first.matrix[::-1],
        stack.positions,
        first.orientation,
        first.pixel_spacing_mm,
        where=series_names({first.uid: first.modality})[first.uid],
    )


def _planned_grid(plan: irregular.Plan) -> Grid:
    return Grid(plan.shape[::-1], LPS_TO_RAS @ plan.affine_lps)
