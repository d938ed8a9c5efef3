"""Some elements of a DICOM file, up to its pixels, by pydicom: within bounds, whatever the file says."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_partial

from medseg.errors import Code, MedsegError

NO_TAG = 0
"""Stands where no tag is wanted, since to pydicom no tags are all tags."""
MAX_HEADER_BYTES = 2**24
"""What the part before the pixels of a deflated file may inflate to; real headers have some kilobytes, of enhanced
images some megabytes."""
_PIXELS = frozenset(tag_for_keyword(k) for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))


def parse(
    path: Path, tags: Sequence[int], start: bytes | None = None, *, without_preamble: bool = False
) -> tuple[Dataset, int | None, int | None]:
    """Some elements of a file, up to its pixels.

    Args:
        path: the file.
        tags: of the elements.
        start: as in `read_header`.
        without_preamble: as in `read_header`.
    Returns:
        the elements; where the pixels begin (None if there are none); where the deflated part begins (None if there
        is none).
    Raises:
        MedsegError: as `read_header`.
    """
    try:
        if start is not None:
            with suppress(Exception):  # cut within an element: the whole file tells
                found = _parse(_Bytes(start), tags, without_preamble)
                if found is not None and found[1] is not None:
                    return *found, None
        with _File(io.FileIO(path)) as stream:
            found = _parse(stream, tags, without_preamble)
            return (*found, None) if found is not None else _parse_deflated(path, stream, tags)
    except MedsegError:
        raise
    except InvalidDicomError:
        raise not_dicom(path) from None
    except RecursionError:
        raise _nested(path) from None
    except Exception as error:  # pydicom raises a dozen types on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_open(path, error) from error
        raise cut_short(path, "the DICOM header is cut or damaged", None, type(error).__name__) from error


def _parse(stream: BinaryIO, tags: Sequence[int], without_preamble: bool) -> tuple[Dataset, int | None] | None:
    """The elements and where the pixels begin; None for a deflated file, whose stream then is where that begins."""
    try:
        with quiet():
            dataset = read_partial(
                stream, stop_when=_at_pixels, force=without_preamble, specific_tags=list(tags) or [NO_TAG]
            )
    except _DeflatedError:
        return None
    place = stream.tell()
    return dataset, place if _pixels_follow(stream, dataset) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings: what matters of them is refused here, in words that tell no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inflate(path: Path, start: int, limit: int) -> bytes:
    """The first `limit` bytes of what a deflated file inflates to, or all if it is less.

    Raises:
        MedsegError: E_TRUNCATED.
    """
    with path.open("rb") as stream:
        return _inflate(path, stream, start, limit)


def cannot_open(path: Path, error: OSError) -> MedsegError:
    """The refusal of a file or folder that the system does not open."""
    return MedsegError(
        Code.UNSUPPORTED,
        f"the {'folder' if path.is_dir() else 'file'} cannot be opened",
        where=path.name,
        got=error.strerror or type(error).__name__,
        remedy="check its permissions",
    )


def not_dicom(path: Path) -> MedsegError:
    """The refusal of a file that ought to be DICOM."""
    return MedsegError(
        Code.NOT_DICOM,
        "the file is not DICOM",
        where=path.name,
        expected="DICM at byte 128",
        remedy="old files without a preamble are read with --without-preamble",
    )


class _DeflatedError(Exception):
    """pydicom is about to inflate a file."""


class _NeverWhole:
    """A stream that is never read to its end at once: pydicom does that to inflate a deflated file, with no limit."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise _DeflatedError
        content: bytes = super().read(size)  # type: ignore[misc]
        return content


class _File(_NeverWhole, io.BufferedReader):
    name = "a file"  # what pydicom's warnings call it: paths may hold the patient's name


class _Bytes(_NeverWhole, io.BytesIO):
    name = "a file"


def _at_pixels(tag: int, _vr: str | None, _length: int) -> bool:
    return tag in _PIXELS


def _pixels_follow(stream: BinaryIO, dataset: Dataset) -> bool:
    """True if the element at the stream's place holds pixels."""
    start = stream.read(4)
    group, element = struct.unpack("<HH" if dataset.original_encoding[1] else ">HH", start.ljust(4, b"\0"))
    return (group << 16 | element) in _PIXELS


def _parse_deflated(path: Path, stream: BinaryIO, tags: Sequence[int]) -> tuple[Dataset, int | None, int]:
    start = stream.tell()
    content = _inflate(path, stream, start, MAX_HEADER_BYTES)
    buffer = io.BytesIO(content)
    dataset = read_dataset(buffer, False, True, stop_when=_at_pixels, specific_tags=list(tags) or [NO_TAG])
    place = buffer.tell()
    found = _pixels_follow(buffer, dataset)
    if not found and len(content) == MAX_HEADER_BYTES:
        raise MedsegError(
            Code.LIMIT,
            "the header inflates to an absurd size",
            where=path.name,
            expected=f"pixels within the first {MAX_HEADER_BYTES} bytes",
            remedy="the file is damaged or forged: get it again from its source",
        )
    return dataset, place if found else None, start


def _inflate(path: Path, stream: BinaryIO, start: int, limit: int) -> bytes:
    stream.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    parts, size = [], 0
    try:
        while size < limit and not inflater.eof:
            chunk = inflater.unconsumed_tail or stream.read(2**16)
            part = inflater.decompress(chunk, limit - size)
            if not chunk and not part:
                break  # whoever misses what should follow says so
            parts.append(part)
            size += len(part)
    except zlib.error as error:
        raise cut_short(path, "the deflated part of the file is damaged", None, str(error)) from error
    return b"".join(parts)


def cut_short(path: Path, message: str, expected: str | None, got: str | None = None) -> MedsegError:
    """E_TRUNCATED of a file."""
    return MedsegError(
        Code.TRUNCATED, message, where=path.name, expected=expected, got=got, remedy="export the series again"
    )


def _nested(path: Path) -> MedsegError:
    return MedsegError(
        Code.MALFORMED,
        "sequences are nested without end",
        where=path.name,
        expected="at most a few sequences within each other",
        remedy="the file is damaged or forged: get it again from its source",
    )
