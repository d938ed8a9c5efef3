"""Images of one series as a stack in space: which belong to it, in what order, and whether they make a volume.

Slices are sorted by their position along the normal of the image plane; InstanceNumber is never trusted. No pixel is
read but to compare two slices at one position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import Code, MedsegError
from medseg.formats.dicom import geometry
from medseg.formats.dicom.frames import TRAITS
from medseg.formats.dicom.header import SPLIT_TAGS, Slice
from medseg.formats.dicom.pixels import num_channels, same_pixels
from medseg.formats.limits import check_size
from medseg.volume import Grid

ORIENTATION_TOLERANCE = 1e-3
"""Direction cosines of two slices that differ by less belong to one stack (0.06 degrees)."""
PIXEL_SPACING_TOLERANCE = 1e-3
"""Relative difference of pixel spacing below which two slices belong to one stack."""
MAX_LOCALIZER_IMAGES = 3
"""Slices of another orientation within a series that are taken for a localizer and left out (with a warning)."""
LOCALIZER_DEGREES = 30.0
"""Smallest angle of a localizer against the stack. A plane turned by less is rather a slice gone wrong."""
SAME_POSITION_MM = 1e-3
"""Slices closer than this along the normal lie at one position."""
SLIDE = "SM"
"""Modality of slide microscopy: tiles of a plane, not slices of a patient."""
MAX_SLICE_PIXELS = 2**28
"""Largest slice that is decoded (16384 × 16384)."""


@dataclass(frozen=True)
class Stack:
    """The images that make a volume, or a picture."""

    slices: tuple[Slice, ...]
    """In the order of their positions."""
    grid: Grid | None
    """None if `irregular`."""
    irregular: MedsegError | None
    """Why the slices make no regular rectangular grid as they are: E_GAP, E_SPACING, E_TILT."""
    notes: tuple[str, ...]
    """What a reader should warn of."""

    @property
    def first(self) -> Slice:
        """The slice at the beginning."""
        return self.slices[0]

    @property
    def positions(self) -> geometry.FloatArray:
        """(n, 3) positions in LPS mm."""
        return geometry.slice_positions(self.slices)


def arrange(slices: Sequence[Slice], name: str) -> Stack:
    """Make a stack of the images of one series; a lone image without a position is a picture.

    Args:
        slices: at least one, whose files have passed `check_claims`; multi-frame files as their frames.
        name: what messages call the series.
    Raises:
        MedsegError: E_NO_GEOMETRY, E_MIXED, E_4D, E_DUPLICATE, E_SHEAR, E_AFFINE, E_LIMIT, E_TRUNCATED.
    """
    notes: list[str] = []
    if len(slices) == 1 and (slices[0].position is None or slices[0].orientation is None):
        return Stack(tuple(slices), picture_grid(slices[0]), None, tuple(_remarks(slices)))
    for item in slices:
        _check_geometry(item, slices)
    _check_patients(slices, name)
    _check_stacks(slices, name)
    stack = _one_stack(slices, name, notes)
    columns, rows = stack[0].matrix
    channels = num_channels(stack[0])
    stored = sum({s.path: s.path.stat().st_size for s in stack}.values())
    check_size((channels, columns, rows, len(stack)), 1, stored, where=name, compressed=True)
    stack = _without_duplicates(_sorted_by_position(stack), name, notes)
    notes += _remarks(stack)
    irregular = geometry.irregularity(stack, name)
    grid = None if irregular else Grid((columns, rows, len(stack)), geometry.stack_affine(stack, name, notes))
    return Stack(tuple(stack), grid, irregular, tuple(notes))


def picture_grid(item: Slice) -> Grid:
    """The grid of an image that lies nowhere in a patient: (rows, columns)."""
    return Grid.of_picture(item.matrix[::-1], item.pixel_spacing_mm or item.imager_spacing_mm)


def check_claims(item: Slice) -> None:
    """Refuse a file whose header asks for more pixels than it can hold.

    Raises:
        MedsegError: E_LIMIT, E_TRUNCATED.
    """
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
    encoding = item.encoding
    shape = (columns, rows, encoding.samples, item.frames)
    whole = encoding.syntax.is_encapsulated or item.deflated_at is not None
    size = item.path.stat().st_size
    check_size(shape, max(encoding.bits_allocated // 8, 1), size, where=item.path.name, compressed=whole)


def _check_geometry(item: Slice, slices: Sequence[Slice]) -> None:
    """Refuse a slice that does not say where it lies."""
    for tag, value in (
        ("ImagePositionPatient", item.position),
        ("ImageOrientationPatient", item.orientation),
        ("PixelSpacing", item.pixel_spacing_mm),
    ):
        if value is None:
            files = len({s.path for s in slices})
            pictures = item.position is None and item.frame is None and files > 1
            if item.modality == SLIDE:
                raise MedsegError(
                    Code.UNSUPPORTED,
                    "slides of microscopy are not read",
                    where=item.path.name,
                    got=f"modality {SLIDE}",
                    remedy="export the region of interest as TIFF or PNG",
                )
            raise MedsegError(
                Code.NO_GEOMETRY,
                "a slice does not say where it lies",
                where=item.path.name,
                expected=f"a valid {tag}",
                got="none",
                remedy="read each picture by itself, by its file"
                if pictures
                else "export the original series; secondary captures have no position",
            )


def _check_patients(slices: Sequence[Slice], name: str) -> None:
    """Refuse a SeriesInstanceUID that several patients share, as careless anonymising leaves it."""
    patients = {s.patient_key for s in slices} - {""}
    if len(patients) > 1:
        raise MedsegError(
            Code.MIXED,
            "one series holds images of several patients",
            where=name,
            expected="one PatientID",
            got=f"{len(patients)} of them",
            remedy="move each patient's files into a folder of their own",
        )


def _check_stacks(slices: Sequence[Slice], name: str) -> None:
    """Refuse frames of several stacks."""
    stacks = {str(s.split["StackID"]) for s in slices if "StackID" in s.split}
    if len(stacks) > 1:
        raise _several_volumes(slices, "StackID", name)


def _several_volumes(slices: Sequence[Slice], trait: str, name: str) -> MedsegError:
    values = sorted({str(s.split.get(trait, "none")) for s in slices}, key=lambda v: (len(v), v))
    files = {s.path: str(s.split.get(trait)) for s in slices}
    alone = all(str(s.split.get(trait)) == files[s.path] for s in slices) and len(files) > 1
    return MedsegError(
        Code.FOUR_D,
        "the series holds several volumes",
        where=name,
        expected="one volume",
        got=f"{trait}: " + ", ".join(values[:10]) + (", …" if len(values) > 10 else ""),
        remedy="read one of its files by itself" if alone else f"split the series by {trait} first",
    )


def _one_stack(slices: Sequence[Slice], name: str, notes: list[str]) -> list[Slice]:
    """The slices that share orientation, size, modality and frame of reference, if the rest is but a localizer."""
    groups: list[list[Slice]] = []
    for item in sorted(slices, key=lambda s: not s.frame_of_reference):  # a slice without one fits any
        group = next((g for g in groups if _fits(g[0], item)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    groups.sort(key=len, reverse=True)
    main, rest = groups[0], groups[1:]
    if not rest:
        return main
    others = sum(len(group) for group in rest)
    if len(main) > MAX_LOCALIZER_IMAGES >= others and all(_is_localizer(group, main) for group in rest):
        notes.append(f"left out {others} localizer images of another orientation")
        return main
    raise MedsegError(
        Code.MIXED,
        "one series holds slices that do not fit together",
        where=name,
        expected="one modality, orientation, matrix, pixel spacing and frame of reference",
        got="; ".join(_describe_group(group) for group in groups[:6]),
        remedy="move each kind into a folder of its own",
    )


def _fits(a: Slice, b: Slice) -> bool:
    kind_a, kind_b = ((s.matrix, s.modality, num_channels(s)) for s in (a, b))
    frames = {s.frame_of_reference for s in (a, b)} - {""}
    if kind_a != kind_b or len(frames) > 1:
        return False
    return _same_orientation(a, b) and bool(
        np.allclose(a.pixel_spacing_mm or (), b.pixel_spacing_mm or (), rtol=PIXEL_SPACING_TOLERANCE, atol=0)
    )


def _same_orientation(a: Slice, b: Slice) -> bool:
    return bool(np.abs(geometry.cosines(a) - geometry.cosines(b)).max() <= ORIENTATION_TOLERANCE)


def _is_localizer(group: list[Slice], main: list[Slice]) -> bool:
    """Images of quite another orientation. Slices nearly *parallel* to the stack may belong to it, so they are left
    out only if they call themselves a localizer."""
    names_itself = all(b"LOCALIZER" in bytes(_split(s, "ImageType")).split(b"\\") for s in group)
    cosine = abs(float(geometry.plane_normal(group[0]) @ geometry.plane_normal(main[0])))
    turned = cosine < math.cos(math.radians(LOCALIZER_DEGREES))
    return group[0].modality == main[0].modality and (names_itself or turned)


def _split(item: Slice, tag: str) -> bytes:
    value = item.split.get(tag, b"")
    return value.strip() if isinstance(value, bytes) else b""


def _describe_group(group: list[Slice]) -> str:
    first = group[0]
    columns, rows = first.matrix
    cosines = ", ".join(f"{c:.3f}" for c in geometry.cosines(first).ravel())
    between_rows, between_columns = first.pixel_spacing_mm or (np.nan, np.nan)
    return (
        f"{len(group)} slices {first.modality} {columns} × {rows} of {between_columns:g} × {between_rows:g} mm, "
        f"direction cosines ({cosines})"
    )


def _sorted_by_position(stack: list[Slice]) -> list[Slice]:
    return [stack[i] for i in np.argsort(geometry.slice_heights(stack), kind="stable")]


def _without_duplicates(stack: list[Slice], name: str, notes: list[str]) -> list[Slice]:
    """Drop slices that are there twice; refuse others at one position."""
    heights, positions = geometry.slice_heights(stack), geometry.slice_positions(stack)
    kept = [0]
    for index in range(1, len(stack)):
        last = kept[-1]
        if heights[index] - heights[last] > SAME_POSITION_MM:
            kept.append(index)
            continue
        a, b = stack[last], stack[index]
        aside = float(np.abs(positions[index] - positions[last]).max()) > SAME_POSITION_MM
        tag = _difference(a, b)
        if tag is not None and isinstance(a.split.get(tag, b.split.get(tag)), str):  # of frames, not of files
            raise _several_volumes(stack, tag, name)
        if aside or not same_pixels(a, b):
            raise MedsegError(
                Code.DUPLICATE,
                "two slices lie at one position and differ",
                where=name,
                got=f"{_place(a)} and {_place(b)}, both at {heights[index]:.3f} mm along the normal",
                remedy=f"split the series by {tag}" if tag else "remove one of the two files",
            )
    if len(kept) < len(stack):
        notes.append(f"left out {len(stack) - len(kept)} slices that are there twice")
    return [stack[i] for i in kept]


_DIMENSIONS = (*TRAITS, "DiffusionGradientOrientation")


def _difference(a: Slice, b: Slice) -> str | None:
    """What tells two images apart, the most telling first."""
    tags = dict.fromkeys((*_DIMENSIONS, *(k for k in a.split if k.endswith(" index")), *SPLIT_TAGS))
    return next((tag for tag in tags if a.split.get(tag) != b.split.get(tag)), None)


def _place(item: Slice) -> str:
    return item.path.name if item.frame is None else f"frame {item.frame + 1} of {item.path.name}"


def _remarks(stack: Sequence[Slice]) -> list[str]:
    """What the headers tell of images that is worth a warning."""
    remarks = []
    lossy = next((s for s in stack if s.encoding.lossy), None)
    if lossy is not None:
        syntax = lossy.encoding.syntax
        remarks.append("lossy compression" + (f": {syntax.name}" if syntax.is_encapsulated else ""))
    numbers = sorted({s.number for s in stack if s.number is not None and s.frame is None})
    expected = min((s.expected for s in stack if s.expected is not None), default=0)
    if len(stack) == len(numbers) > 1 and numbers[0] > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        remarks.append(
            f"slices may be missing at an end: InstanceNumber runs from {numbers[0]} to {numbers[-1]}, not from 1"
        )
    elif len({s.path for s in stack}) < expected and all(s.frame is None for s in stack):
        remarks.append(f"slices may be missing at an end: {len(stack)} of {expected} that the header speaks of")
    return remarks
