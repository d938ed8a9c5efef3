"""The header of one image file, without its pixels.

Only the tags listed here are ever parsed, so that nothing about the patient can reach a log, a message or a file; the
PatientID is turned into a key that is worth nothing outside this process. Values are taken from their bytes: a tree
has hundreds of thousands of headers, and most of a data element that pydicom makes is not needed.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.parsing import cut_short, not_dicom, parse, quiet
from medseg.formats.dicom.sop_classes import is_image, name_of, names_image

SPLIT_TAGS = (
    "EchoNumbers",
    "EchoTime",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "TriggerTime",
    "InversionTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "ContentTime",
    "ImageType",
    "InstanceNumber",
)
"""Tags that may tell two slices at one position apart, the most telling first. Only their names are ever shown."""
HEADER_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagesInAcquisition",
    "NumberOfSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "LossyImageCompression",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ModalityLUTSequence",
    *SPLIT_TAGS,
)
LOSSY_SYNTAXES = {
    "1.2.840.10008.1.2.4.50": True,  # JPEG baseline
    "1.2.840.10008.1.2.4.51": True,  # JPEG extended
    "1.2.840.10008.1.2.4.81": True,  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.91": False,  # JPEG 2000: either
    "1.2.840.10008.1.2.4.93": False,  # JPEG 2000 part 2: either
    "1.2.840.10008.1.2.4.203": False,  # HTJ2K: either
}
"""Transfer syntaxes that lose detail: True always, False unless LossyImageCompression says 00."""

_TAGS: dict[str, int] = {keyword: tag_for_keyword(keyword) or 0 for keyword in HEADER_TAGS}
_WANTED = tuple(_TAGS.values())
_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the pixels of a file are stored."""

    syntax: UID
    """Transfer syntax; Implicit VR Little Endian where the file does not say."""
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None
    """PixelPaddingValue and PixelPaddingRangeLimit (the same value without one), in order, as stored values."""
    slope: float
    """RescaleSlope: 1 where the header has none, NaN where it is no number."""
    intercept: float
    """RescaleIntercept: 0 where the header has none, NaN where it is no number."""
    rescale_type: str
    has_lut: bool
    """Whether a ModalityLUTSequence takes the place of slope and intercept."""
    lossy: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """The header of one image: a file, or a frame of one."""

    path: Path
    uid: str
    """SeriesInstanceUID, "" if the header has none; likewise below."""
    study_uid: str
    sop_uid: str
    sop_class: str
    frame_of_reference: str
    patient_key: str
    """The same for all files of this process with the same PatientID, "" without one; tells nothing about it."""
    modality: str
    matrix: tuple[int, int]
    """(columns, rows): the in-plane shape in index order (i, j)."""
    frames: int
    """NumberOfFrames of the file, 1 where it says nothing."""
    position: NDArray[np.float64] | None
    """ImagePositionPatient: the centre of the first pixel, mm in LPS."""
    orientation: NDArray[np.float64] | None
    """ImageOrientationPatient: (2, 3), the direction along a row, then down a column, in LPS."""
    pixel_spacing_mm: tuple[float, float] | None
    """PixelSpacing: between rows, then between columns."""
    imager_spacing_mm: tuple[float, float] | None
    """ImagerPixelSpacing, likewise: at the detector, not in the patient."""
    thickness_mm: float | None
    step_mm: float | None
    """SpacingBetweenSlices."""
    number: int | None
    """InstanceNumber. For warnings only."""
    expected: int | None
    """How many images the header says there are (ImagesInAcquisition, NumberOfSlices)."""
    split: Mapping[str, object]
    """What may tell it from another at the same position: of files the bytes of `SPLIT_TAGS`, of frames the values of
    `medseg.formats.dicom.frames.TRAITS`."""
    encoding: Encoding
    pixels_at: int
    """Where the element with the pixels begins: in the file, or in what a deflated file inflates to."""
    deflated_at: int | None
    """Where the deflated part of the file begins, None for others."""
    frame: int | None = None
    """Its index in a multi-frame file, from 0; None for a file that has not been looked into, or has but one."""

    @property
    def is_multi_frame(self) -> bool:
        """True for a file whose geometry stands in functional groups, or with more than one frame."""
        if self.frame is not None:
            return False
        return self.frames > 1 or "Enhanced" in name_of(self.sop_class)


def read_header(path: Path, start: bytes | None = None, *, without_preamble: bool = False) -> Slice | str:
    """The header of an image file, or the SOPClassUID of another DICOM object ("" if it names none).

    Args:
        path: the file.
        start: its first bytes, where somebody has read them already.
        without_preamble: read it though it does not have "DICM" at byte 128.
    Raises:
        MedsegError: E_NOT_DICOM, E_TRUNCATED for a header that cannot be parsed, or without pixels behind it,
            E_MALFORMED, E_LIMIT for a deflated header without end, E_UNSUPPORTED for a file that cannot be opened.
    """
    dataset, pixels_at, deflated_at = parse(path, _WANTED, start, without_preamble=without_preamble)
    try:
        with quiet():
            return _read_header(path, dataset, pixels_at, deflated_at, without_preamble=without_preamble)
    except MedsegError:
        raise
    except Exception as error:  # pydicom raises a dozen types on damaged files
        raise cut_short(path, "the DICOM header is cut or damaged", None, type(error).__name__) from error


def _read_header(
    path: Path, dataset: Dataset, pixels_at: int | None, deflated_at: int | None, *, without_preamble: bool
) -> Slice | str:
    tags = _Tags(dataset)
    meta: Dataset = getattr(dataset, "file_meta", Dataset())
    sop_class = tags.text("SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", ""))
    rows, columns = tags.integer("Rows"), tags.integer("Columns")
    if not is_image(sop_class) or (not (rows and columns) and sop_class and not names_image(sop_class)):
        return sop_class
    if without_preamble and not sop_class and not (rows and columns):
        raise not_dicom(path)
    syntax = DeflatedExplicitVRLittleEndian if deflated_at is not None else meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = ExplicitVRLittleEndian if not dataset.original_encoding[0] else ImplicitVRLittleEndian
    if pixels_at is None or not rows or not columns:
        raise cut_short(path, "the DICOM header ends before the pixels", "Rows, Columns and pixels")
    if not UID(syntax).is_transfer_syntax:
        raise MedsegError(
            Code.MALFORMED,
            "the header names a transfer syntax that is none",
            where=path.name,
            got=str(syntax)[:64],
            remedy="the header is damaged: export the series again",
        )
    return _slice(path, tags, UID(syntax), sop_class, (columns, rows), pixels_at, deflated_at)


def _slice(
    path: Path,
    tags: _Tags,
    syntax: UID,
    sop_class: str,
    matrix: tuple[int, int],
    pixels_at: int,
    deflated_at: int | None,
) -> Slice:
    orientation = tags.numbers("ImageOrientationPatient", 6)
    frames = tags.integer("NumberOfFrames")
    return Slice(
        path,
        uid=tags.text("SeriesInstanceUID"),
        study_uid=tags.text("StudyInstanceUID"),
        sop_uid=tags.text("SOPInstanceUID"),
        sop_class=sop_class,
        frame_of_reference=tags.text("FrameOfReferenceUID"),
        patient_key=_patient_key(tags.bytes("PatientID")),
        modality=tags.text("Modality"),
        matrix=matrix,
        frames=1 if frames is None else max(frames, 1),
        position=tags.numbers("ImagePositionPatient", 3),
        orientation=None if orientation is None else orientation.reshape(2, 3),
        pixel_spacing_mm=tags.lengths("PixelSpacing"),
        imager_spacing_mm=tags.lengths("ImagerPixelSpacing"),
        thickness_mm=tags.number("SliceThickness"),
        step_mm=tags.number("SpacingBetweenSlices"),
        number=tags.integer("InstanceNumber"),
        expected=tags.integer("ImagesInAcquisition") or tags.integer("NumberOfSlices"),
        split={keyword: value for keyword in SPLIT_TAGS if (value := tags.bytes(keyword))},
        encoding=_encoding(tags, syntax),
        pixels_at=pixels_at,
        deflated_at=deflated_at,
    )


def _encoding(tags: _Tags, syntax: UID) -> Encoding:
    bits = tags.integer("BitsAllocated") or 0
    stored = tags.integer("BitsStored") or bits
    high_bit = tags.integer("HighBit")
    signed = tags.integer("PixelRepresentation") == 1
    padding = tags.integer("PixelPaddingValue", signed=signed)
    limit = tags.integer("PixelPaddingRangeLimit", signed=signed)
    return Encoding(
        syntax,
        samples=tags.integer("SamplesPerPixel") or 1,
        photometric=tags.text("PhotometricInterpretation"),
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else high_bit,
        signed=signed,
        padding=None if padding is None else _ordered(padding, padding if limit is None else limit),
        slope=tags.rescale("RescaleSlope", 1.0),
        intercept=tags.rescale("RescaleIntercept", 0.0),
        rescale_type=tags.text("RescaleType"),
        has_lut="ModalityLUTSequence" in tags,
        lossy=_is_lossy(syntax, tags.text("LossyImageCompression")),
    )


def _ordered(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _is_lossy(syntax: str, flag: str) -> bool:
    return flag == "01" or LOSSY_SYNTAXES.get(syntax, False) or (syntax in LOSSY_SYNTAXES and flag != "00")


def _patient_key(patient_id: bytes) -> str:
    patient_id = patient_id.strip(b" \0")
    return hmac.digest(_KEY, patient_id, "sha256").hex()[:32] if patient_id else ""


class _Tags:
    """The values of a header, from their bytes."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __contains__(self, keyword: str) -> bool:
        return _TAGS[keyword] in self._dataset

    def bytes(self, keyword: str) -> bytes:
        """The value as it stands in the file, b"" if there is none."""
        element = self._dataset.get_item(_TAGS[keyword])
        value = getattr(element, "value", None)
        return value if isinstance(value, bytes) else b""

    def text(self, keyword: str) -> str:
        """Of a tag of ASCII text, without padding; "" if there is none."""
        return self.bytes(keyword).decode("latin-1").strip(" \0")

    def number(self, keyword: str) -> float | None:
        """The number of a decimal string; None if it is missing, empty or not finite."""
        return _float(self.text(keyword))

    def numbers(self, keyword: str, count: int) -> NDArray[np.float64] | None:
        """The numbers of a decimal string, None unless there are exactly `count` finite ones."""
        values = [_float(part) for part in self.text(keyword).split("\\")]
        known = [v for v in values if v is not None]
        return np.array(known) if len(known) == len(values) == count else None

    def lengths(self, keyword: str) -> tuple[float, float] | None:
        """Two positive numbers."""
        values = self.numbers(keyword, 2)
        return None if values is None or (values <= 0).any() else (float(values[0]), float(values[1]))

    def rescale(self, keyword: str, default: float) -> float:
        """The default where the tag is missing or empty, NaN where it is no number."""
        text = self.text(keyword)
        value = _float(text)
        return default if not text else float("nan") if value is None else value

    def integer(self, keyword: str, *, signed: bool = False) -> int | None:
        """The number of a tag of two binary bytes (US, SS), or of an integer string."""
        value = self.bytes(keyword)
        if not value:
            return None
        if _vr(keyword) in ("US", "SS", "US or SS"):
            little = getattr(self._dataset.get_item(_TAGS[keyword]), "is_little_endian", True)
            return int.from_bytes(value[:2], "little" if little else "big", signed=signed)
        number = _float(value.decode("latin-1").strip(" \0").split("\\")[0])
        return None if number is None else int(number)


@cache
def _vr(keyword: str) -> str:
    return dictionary_VR(_TAGS[keyword])


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
