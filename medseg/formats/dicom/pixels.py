"""The grey values of one DICOM slice.

Stored values → inverted for MONOCHROME1 → rescale slope and intercept of that slice (or its modality LUT).

MONOCHROME1 says that the lowest value is displayed white. A stored value v becomes lowest + highest - v, with the
lowest and highest value that BitsStored and PixelRepresentation allow, so the result does not depend on the image's
content and is the same in training and prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.files import Slice, number

PIXEL_TAGS = (
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PlanarConfiguration",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
"""All that is parsed to decode a slice; nothing about the patient."""
CODEC_PACKAGES = {
    "JPEG-LS": "pyjpegls",
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "HTJ2K": "pylibjpeg pylibjpeg-openjpeg",
}
"""Words in a transfer syntax's name → the packages that decode it."""
OTHER_CODEC_PACKAGES = "pylibjpeg pylibjpeg-libjpeg"


def read_pixels(item: Slice) -> NDArray[np.float64]:
    """Grey values of one slice: float64 (rows, columns), inverted and rescaled as this module's docstring says.

    Raises:
        MedsegError: E_PHOTOMETRIC, E_CODEC, E_TRUNCATED.
    """
    try:
        dataset = pydicom.dcmread(item.path, specific_tags=list(PIXEL_TAGS))
    except Exception as error:  # pydicom raises a dozen types on damaged files
        raise _truncated(item, type(error).__name__) from error
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise MedsegError(
            Code.PHOTOMETRIC,
            "the slice is not grey",
            where=item.path.name,
            expected="MONOCHROME1 or MONOCHROME2",
            got=photometric or "none",
            remedy="export the original grey images, not a coloured copy",
        )
    stored = _decode(dataset, item)
    if photometric == "MONOCHROME1":
        bits = int(dataset.BitsStored)
        signed = int(dataset.get("PixelRepresentation") or 0) == 1
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        stored = lowest + highest - stored.astype(np.int64)
    if dataset.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    return stored * _rescale(dataset, item, "RescaleSlope", 1.0) + _rescale(dataset, item, "RescaleIntercept", 0.0)


def _rescale(dataset: Dataset, item: Slice, tag: str, default: float) -> float:
    """A rescale value; the default where the tag is missing or empty, a refusal where it is no number."""
    try:
        if dataset.get(tag) in (None, ""):
            return default
        value = number(dataset, tag)
    except ValueError:  # pydicom parses on access
        value = None
    if value is None:
        raise _truncated(item, f"{tag} is not a number")
    return value


def _decode(dataset: Dataset, item: Slice) -> NDArray[Any]:
    """Stored values (rows, columns)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        _check_codec(syntax, item)
    try:
        pixels: NDArray[Any] = dataset.pixel_array
    except Exception as error:  # pydicom and its plug-ins raise what they like on damaged pixels
        raise _truncated(item, type(error).__name__) from error
    expected = item.matrix[::-1]
    if pixels.shape != expected:
        raise _truncated(item, f"{pixels.shape} pixels instead of {expected}")
    return pixels


def _check_codec(syntax: UID, item: Slice) -> None:
    """Refuse a transfer syntax that nothing installed can decode."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        packages = next((p for word, p in CODEC_PACKAGES.items() if word in syntax.name), OTHER_CODEC_PACKAGES)
        raise MedsegError(
            Code.CODEC,
            "no decoder is installed for the compression of this series",
            where=item.path.name,
            expected="an uncompressed series, or a decoder",
            got=f"transfer syntax {syntax.name} ({syntax})",
            remedy=f"pip install {packages}",
        )


def _truncated(item: Slice, reason: str) -> MedsegError:
    return MedsegError(
        Code.TRUNCATED,
        "the pixels of a slice are cut or damaged",
        where=item.path.name,
        got=reason,
        remedy="export the series again",
    )
