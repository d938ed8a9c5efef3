"""The values of the pixels of DICOM images.

Stored values → significant bits only → inverted for MONOCHROME1 → rescale slope and intercept of that slice or frame
(or its modality LUT) → in CT, padding outside the field of view becomes air.

MONOCHROME1 says that the lowest value is displayed white. A stored value v becomes lowest + highest - v, with the
lowest and highest value that BitsStored and PixelRepresentation allow, so the result does not depend on the image's
content and is the same in training and prediction.

PixelPaddingValue marks pixels that were never measured (PS3.3 C.7.5.1.1.2), in CT often with -2000, which no tissue
has: there they become `AIR_HU`, the value of what is around a patient. In other modalities the value means nothing
that could be replaced better, so they keep it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGExtended12Bit

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.codestream import coded_size
from medseg.formats.dicom.header import Slice
from medseg.formats.dicom.parsing import inflate, quiet

AIR_HU = -1024.0
"""What padding becomes in CT."""
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
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
"""All that is parsed to decode what this module does not decode itself; nothing about the patient."""
CODEC_PACKAGES = {
    "HTJ2K": "pylibjpeg pylibjpeg-openjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG-LS": "pyjpegls",
    "JPEG 2000": "'medseg[codecs]'",
    "JPEG XL": "",
    "JPEG": "'medseg[codecs]'",
}
"""Words in a transfer syntax's name → the packages that decode it; "" where there is none."""
PREFERRED = ("pyjpegls", "pydicom")
"""Plug-ins of pydicom that are taken before others: the fastest for JPEG-LS, and its own for RLE, since pylibjpeg's
panics on damaged frames. For other syntaxes it chooses."""
GREY = ("MONOCHROME1", "MONOCHROME2")
VRS_WITH_LONG_LENGTH = (b"OB", b"OW", b"OF", b"OD", b"OL", b"UN")
NOT_INTEGER = {0x7FE00008: "f4", 0x7FE00009: "f8"}
"""FloatPixelData, DoubleFloatPixelData."""
DEFLATED_SLACK_BYTES = 2**16
"""What the pixel element of a deflated file may be longer than its pixels."""


def num_channels(item: Slice) -> int:
    """1 for grey images, 3 for all others."""
    return 1 if item.encoding.photometric in GREY and item.encoding.samples == 1 else 3


def check_readable(item: Slice, *, channels: bool) -> None:
    """Refuse what cannot be decoded, from the header.

    Raises:
        MedsegError: E_PHOTOMETRIC for colours that were not asked for, E_CODEC, E_MALFORMED for a description of the
            pixels that makes no sense, E_TRUNCATED for a rescale that is no number.
    """
    encoding = item.encoding
    if num_channels(item) != 1 and not channels:
        raise MedsegError(
            Code.PHOTOMETRIC,
            "the slice is not grey",
            where=item.path.name,
            expected="MONOCHROME1 or MONOCHROME2",
            got=encoding.photometric or "none",
            remedy="export the original grey images, or train and predict with three channels",
        )
    bits = (encoding.bits_allocated, encoding.bits_stored, encoding.high_bit)
    if bits[0] not in (8, 16, 32, 64) or not bits[1] - 1 <= bits[2] < bits[0]:
        raise MedsegError(
            Code.MALFORMED,
            "the header's description of the pixels makes no sense",
            where=item.path.name,
            expected="8, 16 or 32 bits allocated, and no more of them stored",
            got="BitsAllocated {}, BitsStored {}, HighBit {}".format(*bits),
            remedy="export the series again",
        )
    for tag, value in (("RescaleSlope", encoding.slope or np.nan), ("RescaleIntercept", encoding.intercept)):
        if not np.isfinite(value):
            raise _truncated(item.path, f"{tag} is 0 or not a number")
    if encoding.syntax.is_encapsulated:
        check_codec(encoding.syntax, item.path)
        if encoding.syntax == JPEGExtended12Bit and encoding.bits_stored > 8 and not _has_gdcm():
            raise _no_codec(encoding.syntax, item.path)  # Pillow claims the syntax, but decodes 8 bits only


def check_codec(syntax: UID, path: Path) -> None:
    """Refuse a transfer syntax that nothing installed can decode.

    Raises:
        MedsegError: E_CODEC names the transfer syntax and the package.
    """
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise _no_codec(syntax, path)


def read_pixels(items: Sequence[Slice], targets: Sequence[NDArray[np.float32]]) -> bool:
    """The values of images that lie in one file.

    Args:
        items: a file, or frames of it; all of one matrix.
        targets: for each (channels, rows, columns), is filled.
    Returns:
        Whether any pixel was padding that became air.
    Raises:
        MedsegError: E_TRUNCATED, and as `check_readable`, E_LIMIT for a deflated file that inflates to more than its
            header promises.
    """
    padded = False
    reader = _stored_natively if _is_native(items[0]) else _decoded
    for item, stored, target in zip(items, reader(items), targets, strict=True):
        if stored.ndim == 3:  # colours
            target[:] = np.moveaxis(stored, -1, 0)
        else:
            padded |= _rescale(stored, item, target[0])
    return padded


def same_pixels(a: Slice, b: Slice) -> bool:
    """True if two images hold the same values."""
    shape = (num_channels(a), *a.matrix[::-1])
    values = []
    for item in (a, b):
        check_readable(item, channels=True)
        values.append(np.empty(shape, dtype=np.float32))
        read_pixels([item], values[-1:])
    return np.array_equal(values[0], values[1])


def _is_native(item: Slice) -> bool:
    return not item.encoding.syntax.is_encapsulated and num_channels(item) == 1 and not item.encoding.has_lut


def _stored_natively(items: Sequence[Slice]) -> Iterator[NDArray[Any]]:
    """Stored values (rows, columns) of grey images that are not compressed, straight from the file."""
    path, columns_rows = items[0].path, items[0].matrix
    with io.FileIO(path) if items[0].deflated_at is None else _inflated(items[0]) as stream:
        stream.seek(items[0].pixels_at)
        dtype, swapped, length = _element(stream.read(12), items[0])
        start = stream.tell() if length[1] == 12 else stream.tell() - 4
        count = columns_rows[0] * columns_rows[1] * dtype.itemsize
        for item in items:
            offset = (item.frame or 0) * count
            if offset + count > length[0]:
                raise _truncated(path, f"{length[0]} bytes of pixels, not {(item.frame or 0) + 1} × {count}")
            content = np.empty(count + count % 2 if swapped else count, dtype=np.uint8)
            stream.seek(start + offset)
            if stream.readinto(content.data) != len(content):
                raise _truncated(path, "the file ends within the pixels")
            if swapped:  # bytes in words of the other order
                content = content.view(np.uint16).byteswap().view(np.uint8)[:count]
            yield content.view(dtype).reshape(columns_rows[::-1])


def _inflated(item: Slice) -> io.BytesIO:
    """The content of a deflated file, no more of it than its header promises."""
    columns, rows = item.matrix
    encoding = item.encoding
    needed = columns * rows * encoding.samples * item.frames * max(encoding.bits_allocated // 8, 1)
    limit = item.pixels_at + 12 + needed + DEFLATED_SLACK_BYTES
    content = inflate(item.path, item.deflated_at or 0, limit)
    if len(content) == limit:
        raise MedsegError(
            Code.LIMIT,
            "the file inflates to more than its header promises",
            where=item.path.name,
            expected=f"{needed} bytes of pixels",
            remedy="the file is damaged or forged: get it again from its source",
        )
    return io.BytesIO(content)


def _element(start: bytes, item: Slice) -> tuple[np.dtype[Any], bool, tuple[int, int]]:
    """Of the element that holds the pixels: the type of its values, whether its bytes are swapped in pairs, and its
    length and the size of its own header (8 with implicit VR)."""
    big = item.encoding.syntax == ExplicitVRBigEndian
    order = ">" if big else "<"
    head = start.ljust(12, b"\0")
    group, number = np.frombuffer(head, order + "u2", 2)
    explicit = head[4:6] in VRS_WITH_LONG_LENGTH  # read as a length these would be odd, which no length is
    length = int(np.frombuffer(head, order + "u4", 1, 8 if explicit else 4)[0])
    if length == 0xFFFFFFFF:
        raise _truncated(item.path, "pixels without a length")
    encoding = item.encoding
    kind = NOT_INTEGER.get(int(group) << 16 | int(number))
    if kind is None:
        kind = f"{'i' if encoding.signed else 'u'}{encoding.bits_allocated // 8}"
    swapped = big and kind[1:] == "1" and head[4:6] == b"OW"
    return np.dtype(order + kind), swapped, (length, 12 if explicit else 8)


def _decoded(items: Sequence[Slice]) -> Iterator[NDArray[Any]]:
    """Stored values (rows, columns), or colours (rows, columns, 3), by pydicom and its plug-ins."""
    first = items[0]
    path = first.path
    try:
        dataset = _dataset(first)
        decoder = get_decoder(dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
        plugin = next((p for p in PREFERRED if p in decoder.available_plugins), "")
        for item in items:
            if item.encoding.syntax.is_encapsulated:
                _check_coded_size(dataset, item)
            pixels, _ = decoder.as_array(dataset, index=item.frame or 0, decoding_plugin=plugin)
            if item.encoding.photometric == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, dataset)
            elif item.encoding.has_lut:
                pixels = apply_modality_lut(_inverted(_significant(pixels, item), item), dataset)
            expected = item.matrix[::-1] + ((3,) if num_channels(item) == 3 else ())
            if pixels.shape != expected:
                raise _truncated(path, f"{pixels.shape} pixels instead of {expected}")
            yield pixels
    except MedsegError:
        raise
    except Exception as error:  # pydicom and its plug-ins raise what they like on damaged pixels
        raise _truncated(path, type(error).__name__) from error


def _dataset(item: Slice) -> Dataset:
    """What pydicom needs to decode an image."""
    tags = [tag_for_keyword(keyword) or 0 for keyword in PIXEL_TAGS]
    if item.deflated_at is None:
        content = io.BytesIO(item.path.read_bytes())  # not the file, whose path warnings would show
        with quiet():
            return pydicom.dcmread(content, specific_tags=tags, force=True)  # `read_header` has seen to the preamble
    dataset = read_dataset(_inflated(item), False, True, specific_tags=tags)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _check_coded_size(dataset: Dataset, item: Slice) -> None:
    """Refuse a compressed image of another size than the header's: decoders believe it, and ask for its memory.

    Raises:
        MedsegError: E_MALFORMED.
    """
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    code = get_frame(dataset.PixelData, item.frame or 0, extended_offsets=offsets, number_of_frames=item.frames)
    size = coded_size(code)
    if size is not None and size != item.matrix:
        raise MedsegError(
            Code.MALFORMED,
            "the compressed image has another size than the header says",
            where=item.path.name,
            expected="{} × {} pixels".format(*item.matrix),
            got="{} × {}".format(*size),
            remedy="the file is damaged or forged: export the series again",
        )


def _rescale(stored: NDArray[Any], item: Slice, out: NDArray[np.float32]) -> bool:
    """Stored values → values; see the module's docstring. True if there was padding."""
    encoding = item.encoding
    if encoding.has_lut:  # done already
        out[:] = stored
        return False
    values = _significant(stored, item)
    padding = _padding(stored, values, item)
    values = _inverted(values, item)
    slope, intercept = encoding.slope, encoding.intercept
    if values.itemsize <= 2 and slope == 1 and intercept == int(intercept) and abs(intercept) < 2**23:
        out[:] = values  # float32 holds these and their sum exactly
        if intercept:
            out += np.float32(intercept)
    else:
        exact = values * np.float64(slope)
        exact += intercept
        out[:] = exact
    if padding is not None:
        out[padding] = AIR_HU
    return padding is not None


def _significant(stored: NDArray[Any], item: Slice) -> NDArray[Any]:
    """The bits that count: BitsStored of them up to HighBit, with the sign; what lies in the others is junk."""
    encoding = item.encoding
    bits = stored.itemsize * 8
    above, below = bits - 1 - encoding.high_bit, encoding.high_bit + 1 - encoding.bits_stored
    if stored.dtype.kind == "f" or bits != encoding.bits_allocated or not (above or below):
        return stored
    significant: NDArray[Any] = (stored << above) >> (above + below)  # keeps the sign of signed types
    return significant


def _inverted(values: NDArray[Any], item: Slice) -> NDArray[Any]:
    """MONOCHROME1 as MONOCHROME2; see the module's docstring."""
    encoding = item.encoding
    if encoding.photometric != "MONOCHROME1":
        return values
    lowest, highest = _range(encoding.bits_stored, encoding.signed)
    return lowest + highest - values.astype(np.int64)


def _padding(stored: NDArray[Any], values: NDArray[Any], item: Slice) -> NDArray[np.bool_] | None:
    """Where padding lies; None if there is none, or if it means nothing."""
    encoding = item.encoding
    if encoding.padding is None or item.modality != "CT" or encoding.rescale_type not in ("", "HU"):
        return None
    low, high = encoding.padding
    lowest, highest = _range(encoding.bits_stored, encoding.signed)
    where = values if lowest <= low and high <= highest else stored  # a value of more bits than are stored
    padding: NDArray[np.bool_] = where == low if low == high else (where >= low) & (where <= high)
    return padding if padding.any() else None


def _range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _has_gdcm() -> bool:
    return "gdcm" in get_decoder(JPEGExtended12Bit).available_plugins


def _no_codec(syntax: UID, path: Path) -> MedsegError:
    packages = next((p for word, p in CODEC_PACKAGES.items() if word in syntax.name), "")
    return MedsegError(
        Code.CODEC,
        "no decoder is installed for the compression of this series",
        where=path.name,
        expected="an uncompressed series, or a decoder",
        got=f"transfer syntax {syntax.name} ({syntax})",
        remedy=f"pip install {packages}" if packages else "export the series uncompressed, or as JPEG 2000 or RLE",
    )


def _truncated(path: Path, reason: str) -> MedsegError:
    return MedsegError(
        Code.TRUNCATED,
        "the pixels of a slice are cut or damaged",
        where=path.name,
        got=reason,
        remedy="export the series again",
    )
