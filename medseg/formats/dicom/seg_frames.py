"""The frames of a segmentation: what each is of and where it lies, then its pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.frames import read_frames
from medseg.formats.dicom.parsing import inflate
from medseg.formats.dicom.parsing import parse as parse_header
from medseg.formats.dicom.pixels import check_codec
from medseg.formats.dicom.planes import Plane, malformed, planes_of
from medseg.formats.dicom.stack import MAX_SLICE_PIXELS
from medseg.formats.limits import MAX_VOXELS, RATIO_SLACK_BYTES, check_size

PIXEL_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
HEADER_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "SegmentationType",
    "MaximumFractionalValue",
    "TotalPixelMatrixColumns",
)
"""All that is parsed beside the functional groups; nothing of it names the patient."""
SLIDE_DIMENSION = "RowPositionInTotalImagePixelMatrix"
"""What tells the tiles of a slide from frames in a patient."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: which structure and where."""

    index: int
    """Its number within the pixel data, from 0."""
    structure: int | None
    """None in a label map, whose frames hold all structures."""
    plane: Plane | None
    """None without a place in the patient; then no frame of the file has one."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The frames of a segmentation, without their pixels."""

    path: Path
    header: Dataset
    """Elements of `HEADER_TAGS`."""
    syntax: UID
    """Transfer syntax."""
    shape: tuple[int, int]
    """(rows, columns) of a frame."""
    bits: int
    """BitsAllocated."""
    kind: str
    """SegmentationType: BINARY, FRACTIONAL, LABELMAP."""
    frames: tuple[Frame, ...]
    step_mm: float
    """SpacingBetweenSlices, NaN where the file does not say."""
    thickness_mm: float
    """SliceThickness, likewise."""

    @property
    def num_bytes(self) -> int:
        """What all frames take without compression."""
        return -(-self.shape[0] * self.shape[1] * len(self.frames) * self.bits // 8)


def read_stored(path: Path) -> Stored:
    """What the frames of a segmentation are and where they lie.

    Raises:
        MedsegError: E_UNSUPPORTED for slides and unknown types; E_LIMIT, E_TRUNCATED, E_MALFORMED.
    """
    where = path.name
    header, _, deflated_at = parse_header(path, [tag_for_keyword(tag) or 0 for tag in HEADER_TAGS])
    try:
        shape = (int(header.Rows), int(header.Columns))
        count, bits = int(header.get("NumberOfFrames") or 1), int(header.BitsAllocated)
        syntax = DeflatedExplicitVRLittleEndian if deflated_at is not None else header.file_meta.TransferSyntaxUID
        compressed = syntax.is_encapsulated or syntax.is_deflated  # ValueError for a UID of something else
        kind = str(header.get("SegmentationType") or "")
    except (AttributeError, TypeError, ValueError, OverflowError, NotImplementedError) as error:  # of any value
        raise malformed("the frames have no size", where, got=type(error).__name__) from error
    if shape[0] * shape[1] > MAX_SLICE_PIXELS:
        raise absurd(where, f"{shape[1]} × {shape[0]} pixels per frame")
    needed = -(-shape[0] * shape[1] * count * bits // 8)
    check_size((needed,), 1, path.stat().st_size, where=where, compressed=compressed)
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise MedsegError(
            Code.UNSUPPORTED,
            "an unknown type of segmentation",
            where=where,
            expected="BINARY, FRACTIONAL or LABELMAP",
            got=kind or "none",
            remedy="export it as a binary segmentation",
        )
    found = read_frames(path)
    if found.organisation.startswith("TILED") or SLIDE_DIMENSION in found.dimensions:
        raise MedsegError(
            Code.UNSUPPORTED,
            "segmentations of slides are not read",
            where=where,
            expected="frames with a place in the patient",
            got=found.organisation or "tiles of a slide",
            remedy="use a viewer for digital pathology",
        )
    if found.segments is None and kind != "LABELMAP":
        raise malformed("a frame does not say which structure it belongs to", where)
    numbers: list[int | None] = [None] * count
    if kind != "LABELMAP" and found.segments is not None:
        numbers = found.segments.tolist()
    placed = planes_of(found, shape)
    planes: list[Plane | None] = [None] * count if placed is None else [*placed]
    frames = tuple(Frame(n, *parts) for n, parts in enumerate(zip(numbers, planes, strict=True)))
    return Stored(path, header, syntax, shape, bits, kind, frames, float(found.steps[0]), float(found.thicknesses[0]))


def decoder_of(stored: Stored) -> Callable[[int], NDArray[Any]]:
    """Frame number → bool (rows, columns); of a label map the values themselves. The pixel data are read here.

    Raises:
        MedsegError: E_CODEC, E_TRUNCATED, E_MALFORMED; the function E_TRUNCATED.
    """
    half = float(stored.header.get("MaximumFractionalValue") or 0) / 2
    if stored.kind == "FRACTIONAL" and half <= 0:
        raise malformed("a fractional segmentation without MaximumFractionalValue", stored.path.name)
    values_of = _stored_values(stored)

    def decode(index: int) -> NDArray[Any]:
        values = values_of(index)
        if stored.kind == "LABELMAP":
            return values
        return np.asarray(values >= half if stored.kind == "FRACTIONAL" else values != 0)

    return decode


def _stored_values(stored: Stored) -> Callable[[int], NDArray[Any]]:
    """Frame number → what is stored (rows, columns).

    Packed bits are unpacked here: pydicom 3.0 loses the last ones of frames that begin within a byte.
    """
    where, shape, syntax = stored.path.name, stored.shape, stored.syntax
    pixels = shape[0] * shape[1]
    if syntax.is_encapsulated:
        check_codec(syntax, stored.path)
    dataset = _parse_pixels(stored.path, stored.num_bytes)
    data = dataset.get("PixelData") or b""
    if not data or (not syntax.is_encapsulated and len(data) < stored.num_bytes):
        raise truncated(where, f"{len(data)} of {stored.num_bytes} bytes of pixels")

    def unpack(index: int) -> NDArray[Any]:
        first = index * pixels
        part = np.frombuffer(data, np.uint8, (first + pixels + 7) // 8 - first // 8, first // 8)
        return np.unpackbits(part, bitorder="little")[first % 8 :][:pixels].reshape(shape)

    def decode(index: int) -> NDArray[Any]:
        try:
            values, _ = get_decoder(syntax).as_array(dataset, index=index, raw=True, validate=False)
        except Exception as error:  # pydicom and its plug-ins raise what they like on damaged pixels
            raise truncated(where, type(error).__name__) from error
        if values.shape != shape:
            raise truncated(where, f"{values.shape} pixels instead of {shape}")
        return values

    return unpack if stored.bits == 1 and not syntax.is_encapsulated else decode


def parse(path: Path, tags: Sequence[str]) -> Dataset:
    """Some tags of a file, none of the pixels'. Raises as `medseg.formats.dicom.parsing.parse`."""
    return parse_header(path, [tag_for_keyword(tag) or 0 for tag in tags])[0]


def _parse_pixels(path: Path, needed: int) -> Dataset:
    """What it takes to decode the frames.

    Args:
        path: the file.
        needed: bytes of all frames; a deflated file is inflated no further.
    Raises:
        MedsegError: E_TRUNCATED.
    """
    _, pixels_at, deflated_at = parse_header(path, ())
    try:
        if deflated_at is None:
            return pydicom.dcmread(path, specific_tags=list(PIXEL_TAGS))
        content = inflate(path, deflated_at, (pixels_at or 0) + needed + RATIO_SLACK_BYTES)
        tags = [tag_for_keyword(tag) or 0 for tag in PIXEL_TAGS]
        return read_dataset(io.BytesIO(content), False, True, specific_tags=tags)
    except MedsegError:
        raise
    except Exception as error:  # pydicom raises a dozen types on damaged files
        raise truncated(path.name, type(error).__name__) from error


def truncated(where: str, got: str) -> MedsegError:
    """E_TRUNCATED of a segmentation."""
    return MedsegError(
        Code.TRUNCATED, "the segmentation is cut or damaged", where=where, got=got, remedy="export the file again"
    )


def absurd(where: str, got: str) -> MedsegError:
    """E_LIMIT of a segmentation."""
    return MedsegError(
        Code.LIMIT,
        "the header asks for an absurd amount of memory",
        where=where,
        expected=f"at most {MAX_SLICE_PIXELS} pixels per frame, {MAX_VOXELS} voxels in all",
        got=got,
        remedy="the header is damaged or forged: get the file again from its source",
    )


def no_place(where: str) -> MedsegError:
    """E_NO_GEOMETRY of a segmentation."""
    return MedsegError(
        Code.NO_GEOMETRY,
        "the frames do not say where in the patient they lie",
        where=where,
        expected="a position for each frame",
        remedy="give the picture that the structures were drawn on",
    )
