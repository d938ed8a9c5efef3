"""A classic DICOM series (one file per slice) as one volume.

Geometry first, from the headers; pixels only of a series that is known to be a whole, regular, rectangular stack.
Slices are sorted by their position along the normal of the image plane; InstanceNumber is never trusted.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.files import SPLIT_TAGS, SeriesInfo, Slice, describe, find_files, number, read_slices
from medseg.formats.dicom.pixels import read_pixels
from medseg.formats.limits import check_size
from medseg.formats.reading import STRICT, Reading
from medseg.volume import SHEAR_TOLERANCE, Grid, Volume

logger = logging.getLogger(__name__)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's patient frame (+x Left, +y Posterior, +z Superior) → `medseg.volume.WORLD_FRAME`."""
ORIENTATION_TOLERANCE = 1e-3
"""Direction cosines of two slices that differ by less belong to one stack (0.06 degrees)."""
PIXEL_SPACING_TOLERANCE = 1e-3
"""Relative difference of pixel spacing below which two slices belong to one stack."""
MAX_LOCALIZER_IMAGES = 3
"""Slices of another orientation within a series that are taken for a localizer and left out (with a warning)."""
SAME_POSITION_MM = 1e-3
"""Slices closer than this along the normal lie at one position."""
SPACING_TOLERANCE = 0.01
"""Relative deviation of a slice distance from the usual one that is still called regular: positions are written with
few digits, and 0.1 % of jitter is common."""
TILT_TOLERANCE_PIXELS = 0.5
"""Largest in-plane shift between slices over the whole stack, in pixels: less moves no pixel into its neighbour."""
MAX_SLICE_PIXELS = 2**28
"""Largest slice that is decoded (16384 × 16384)."""


def read_series(source: Path | SeriesInfo, reading: Reading = STRICT) -> Volume:
    """Read a series.

    Args:
        source: a folder, a single file, or a series as `medseg.formats.dicom.files.find_series` found it.
        reading: `series` is needed where there are several.
    Returns:
        float32 (1, columns, rows, slices); the grid in RAS+ mm; the modality.
    Raises:
        MedsegError: see `read_stack`; and E_PHOTOMETRIC, E_CODEC, E_TRUNCATED.
    """
    stack, grid = read_stack(source, reading)
    columns, rows, count = grid.shape
    buffer = np.empty((count, rows, columns), dtype=np.float32)
    for index, item in enumerate(stack):
        buffer[index] = read_pixels(item)
    return Volume(buffer.transpose(2, 1, 0)[None], grid, stack[0].modality or None)


def read_grid(source: Path | SeriesInfo, reading: Reading = STRICT) -> Grid:
    """The grid of a series, from its headers. Raises as `read_stack`."""
    return read_stack(source, reading)[1]


def read_stack(source: Path | SeriesInfo, reading: Reading) -> tuple[list[Slice], Grid]:
    """The slices of a series in spatial order and their grid; pixels are read only to compare slices at one position.

    Raises:
        MedsegError: E_NOT_DICOM, E_MULTI_SERIES, E_MISSING (no such series), E_UNSUPPORTED (multi-frame), E_MIXED,
            E_NO_GEOMETRY, E_DUPLICATE, E_GAP, E_SPACING, E_TILT, E_SHEAR, E_AFFINE, E_LIMIT, E_TRUNCATED.
    """
    path = source if isinstance(source, Path) else Path(source.name)
    slices = _select(path, reading.series) if isinstance(source, Path) else read_slices(list(source.files))
    multi_frame = next((s for s in slices if s.is_multi_frame), None)
    if multi_frame is not None:
        raise MedsegError(
            Code.UNSUPPORTED,
            "enhanced and other multi-frame DICOM is not read yet",
            where=multi_frame.path.name,
            expected="one file per slice",
            got=f"{multi_frame.header.get('NumberOfFrames', 1)} frames",
            remedy="convert it to NIfTI, for example with dcm2niix",
        )
    for item in slices:
        _check_header(item)
    stack = _one_stack(slices, path)
    columns, rows = stack[0].matrix
    stored = sum(s.path.stat().st_size for s in stack)
    check_size((columns, rows, len(stack)), 1, stored, where=path.name, compressed=True)
    stack = _without_duplicates(_sorted_by_position(stack), path)
    _check_regular(stack, path)
    return stack, Grid((columns, rows, len(stack)), _affine(stack, path))


def _select(path: Path, series: str | None) -> list[Slice]:
    """The slices of the only series, or of the one that was asked for."""
    slices = read_slices(find_files(path))
    if not slices:
        raise MedsegError(
            Code.NOT_DICOM,
            "there is no DICOM image here",
            where=path.name,
            expected='files with "DICM" at byte 128 in the folder, or in its sub-folders',
            remedy="check the path; files without a preamble must be rewritten with one",
        )
    found = describe(slices)
    listing = "; ".join(str(info) for info in found)
    if series is not None:
        slices = [s for s in slices if s.uid == series]
        if not slices:
            raise MedsegError(
                Code.MISSING, "there is no such series in the folder", where=path.name, expected=listing, got=series
            )
    elif len(found) > 1:
        raise MedsegError(
            Code.MULTI_SERIES,
            f"the folder holds {len(found)} series",
            where=path.name,
            expected="one series, or the UID of the one to read",
            got=listing,
            remedy="move each series into a folder of its own",
        )
    return slices


def _check_header(item: Slice) -> None:
    """Refuse a slice without geometry, or with an absurd size."""
    for tag, value in (
        ("ImagePositionPatient", item.position),
        ("ImageOrientationPatient", item.orientation),
        ("PixelSpacing", item.pixel_spacing_mm),
    ):
        if value is None:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "a slice does not say where it lies",
                where=item.path.name,
                expected=f"a valid {tag}",
                got="none",
                remedy="export the original series; secondary captures have no position",
            )
    columns, rows = item.matrix
    if columns * rows > MAX_SLICE_PIXELS:
        raise MedsegError(
            Code.LIMIT,
            "the header asks for an absurd amount of memory",
            where=item.path.name,
            expected=f"at most {MAX_SLICE_PIXELS} pixels per slice",
            got=f"{columns} × {rows}",
            remedy="the header is damaged or forged: export the series again",
        )
    samples = int(item.header.get("SamplesPerPixel") or 1)
    itemsize = max(int(item.header.get("BitsAllocated") or 8) // 8, 1)
    compressed = item.header.file_meta.TransferSyntaxUID.is_compressed
    if not compressed:
        size = item.path.stat().st_size
        check_size((columns, rows, samples), itemsize, size, where=item.path.name, compressed=False)


def _one_stack(slices: list[Slice], path: Path) -> list[Slice]:
    """The slices that share orientation, size and modality, if the rest is no more than a localizer."""
    groups: list[list[Slice]] = []
    for item in slices:
        group = next((g for g in groups if _fits(g[0], item)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    groups.sort(key=len, reverse=True)
    main, rest = groups[0], groups[1:]
    if not rest:
        return main
    if len(main) > MAX_LOCALIZER_IMAGES and all(_is_localizer(group, main) for group in rest):
        left_out = sum(len(group) for group in rest)
        logger.warning("%s: left out %d localizer images of another orientation", path.name, left_out)
        return main
    raise MedsegError(
        Code.MIXED,
        "one series holds slices that do not fit together",
        where=path.name,
        expected="one modality, orientation, matrix and pixel spacing",
        got="; ".join(_describe_group(group) for group in groups),
        remedy="move each kind into a folder of its own",
    )


def _fits(a: Slice, b: Slice) -> bool:
    if (a.matrix, a.modality) != (b.matrix, b.modality):
        return False
    return _same_orientation(a, b) and bool(
        np.allclose(a.pixel_spacing_mm or (), b.pixel_spacing_mm or (), rtol=PIXEL_SPACING_TOLERANCE, atol=0)
    )


def _same_orientation(a: Slice, b: Slice) -> bool:
    return bool(np.abs(_cosines(a) - _cosines(b)).max() <= ORIENTATION_TOLERANCE)


def _is_localizer(group: list[Slice], main: list[Slice]) -> bool:
    """A few images of another orientation. Slices *parallel* to the stack may belong to it, so they are left out only
    if they call themselves a localizer."""
    names_itself = all("LOCALIZER" in (s.header.get("ImageType") or ()) for s in group)
    parallel = _same_orientation(group[0], main[0])
    same_modality = group[0].modality == main[0].modality
    return len(group) <= MAX_LOCALIZER_IMAGES and same_modality and (names_itself or not parallel)


def _describe_group(group: list[Slice]) -> str:
    first = group[0]
    columns, rows = first.matrix
    cosines = ", ".join(f"{c:.3f}" for c in _cosines(first).ravel())
    return f"{len(group)} slices {first.modality} {columns} × {rows}, direction cosines ({cosines})"


def _cosines(item: Slice) -> NDArray[np.float64]:
    if item.orientation is None:  # refused by `_check_header`; said again for the type checker
        raise MedsegError(Code.NO_GEOMETRY, "a slice has no orientation", where=item.path.name)
    return item.orientation


def _positions(stack: list[Slice]) -> NDArray[np.float64]:
    """(n, 3) positions in LPS mm."""
    return np.array([s.position for s in stack], dtype=np.float64)


def _normal(item: Slice) -> NDArray[np.float64]:
    """Unit vector across the plane: along a row × down a column (PS3.3 C.7.6.2.1.1)."""
    along_row, down_column = _cosines(item)
    normal: NDArray[np.float64] = np.cross(along_row, down_column)
    length = float(np.linalg.norm(normal))
    if length < 0.5:
        raise MedsegError(
            Code.AFFINE,
            "the direction cosines do not span a plane",
            where=item.path.name,
            got=np.array2string(_cosines(item), precision=4),
            remedy="export the original series",
        )
    return normal / length


def _heights(stack: list[Slice]) -> NDArray[np.float64]:
    """Position of each slice along the normal, mm."""
    heights: NDArray[np.float64] = _positions(stack) @ _normal(stack[0])
    return heights


def _sorted_by_position(stack: list[Slice]) -> list[Slice]:
    return [stack[i] for i in np.argsort(_heights(stack), kind="stable")]


def _without_duplicates(stack: list[Slice], path: Path) -> list[Slice]:
    """Drop slices that are there twice; refuse others at one position."""
    heights = _heights(stack)
    kept = [0]
    for index in range(1, len(stack)):
        if heights[index] - heights[kept[-1]] > SAME_POSITION_MM:
            kept.append(index)
        elif not _same_picture(stack[kept[-1]], stack[index]):
            a, b = stack[kept[-1]], stack[index]
            tag = next((t for t in SPLIT_TAGS if a.header.get(t) != b.header.get(t)), None)
            raise MedsegError(
                Code.DUPLICATE,
                "two slices lie at one position and differ",
                where=path.name,
                got=f"{a.path.name} and {b.path.name}, both at {heights[index]:.3f} mm along the normal",
                remedy=f"split the series by {tag}" if tag else "remove one of the two files",
            )
    if len(kept) < len(stack):
        logger.warning("%s: left out %d slices that are there twice", path.name, len(stack) - len(kept))
    return [stack[i] for i in kept]


def _same_picture(a: Slice, b: Slice) -> bool:
    return bool(np.abs(_positions([a, b])[0] - _positions([a, b])[1]).max() <= SAME_POSITION_MM) and np.array_equal(
        read_pixels(a), read_pixels(b)
    )


def _check_regular(stack: list[Slice], path: Path) -> None:
    """Refuse gaps, uneven spacing and tilt; an uneven stack that is tilted as well is told both at once."""
    tilt = _tilt(stack)
    heights = _heights(stack)
    steps = np.diff(heights)
    if len(steps) > 1:
        usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # the lower median: a gap must not become the usual step
        wrong = np.flatnonzero(np.abs(steps - usual) > SPACING_TOLERANCE * usual)
        also = f"; also a gantry tilt of {tilt[0]:.1f} degrees" if tilt else ""
        multiples = steps[wrong] / usual
        if len(wrong) and (np.rint(multiples) >= 2).all() and _whole(multiples):
            places = [
                f"{round(m) - 1} between {heights[i]:.3f} and {heights[i + 1]:.3f} mm"
                for i, m in zip(wrong, multiples, strict=True)
            ]
            raise MedsegError(
                Code.GAP,
                "slices are missing within the series",
                where=path.name,
                expected=f"a slice every {usual:.4g} mm",
                got="missing " + ", ".join(places[:5]) + also,
                remedy="export the whole series again",
            )
        if len(wrong):
            raise MedsegError(
                Code.SPACING,
                "the distance between slices varies",
                where=path.name,
                expected=f"{usual:.4g} mm everywhere, within {SPACING_TOLERANCE:.0%}",
                got=f"{steps.min():.4g} to {steps.max():.4g} mm" + also,
                remedy="resample the series to even spacing, or export another reconstruction",
            )
    if tilt:
        raise MedsegError(
            Code.TILT,
            "the slices are shifted against each other: the gantry was tilted",
            where=path.name,
            expected=f"a shift of at most {TILT_TOLERANCE_PIXELS} pixels over the whole series",
            got=f"{tilt[0]:.2f} degrees, a shift of {tilt[1]:.2f} mm",
            remedy="resample the series to a rectangular grid first, for example with dcm2niix",
        )


def _whole(multiples: NDArray[np.float64]) -> bool:
    """True if each is a whole number within the tolerance of as many regular steps."""
    return bool((np.abs(multiples - np.rint(multiples)) <= SPACING_TOLERANCE * multiples).all())


def _tilt(stack: list[Slice]) -> tuple[float, float] | None:
    """(angle in degrees, shift in mm) of the slice most shifted in-plane against the first, None within tolerance."""
    offsets = _positions(stack) - _positions(stack[:1])
    heights = offsets @ _normal(stack[0])
    shifts = np.linalg.norm(offsets - np.outer(heights, _normal(stack[0])), axis=1)
    worst = int(shifts.argmax())
    if shifts[worst] <= TILT_TOLERANCE_PIXELS * min(stack[0].pixel_spacing_mm or (1.0,)):
        return None
    return math.degrees(math.atan2(float(shifts[worst]), float(heights[worst]))), float(shifts[worst])


def _affine(stack: list[Slice], path: Path) -> NDArray[np.float64]:
    """Indices (i along a row, j down a column, k across slices) → RAS+ mm.

    Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, with the third column from the first to the last position.
    PixelSpacing is (between rows, between columns), so its second number belongs to i.
    """
    first = stack[0]
    along_row, down_column = _cosines(first)
    between_rows, between_columns = first.pixel_spacing_mm or (math.nan, math.nan)
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = down_column * between_rows
    affine[:3, 2] = _step(stack, path)
    affine[:3, 3] = _positions(stack)[0]
    return LPS_TO_RAS @ affine


def _step(stack: list[Slice], path: Path) -> NDArray[np.float64]:
    """The vector from one slice to the next, LPS mm."""
    normal = _normal(stack[0])
    if len(stack) == 1:
        header = stack[0].header
        distance = number(header, "SpacingBetweenSlices") or number(header, "SliceThickness") or 0.0
        if distance <= 0:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "a single slice without a thickness",
                where=path.name,
                expected="SpacingBetweenSlices or SliceThickness",
                remedy="export the whole series",
            )
        logger.warning("%s: a single slice; its thickness of %g mm is taken as spacing", path.name, distance)
        return normal * distance
    positions = _positions(stack)
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(stack) - 1)
    sideways = np.abs(_cosines(stack[0]) @ step).max() / np.linalg.norm(step)
    if sideways > SHEAR_TOLERANCE:
        # less than TILT_TOLERANCE_PIXELS over the whole stack, or `_check_regular` had refused it
        logger.warning("%s: slices are shifted by less than half a pixel; the shift is ignored", path.name)
        step = normal * float(step @ normal)
    return step
