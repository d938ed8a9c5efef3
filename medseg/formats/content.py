"""What a file is, by its first bytes. Imports no reader."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, cast

from medseg.errors import Code, MedsegError

GzipFile: type[gzip.GzipFile] = gzip.GzipFile
_DEFLATE_ERROR: type[Exception] = zlib.error
try:  # decompresses in less than half of the time
    from isal import igzip, isal_zlib

    GzipFile, _DEFLATE_ERROR = igzip.IGzipFile, cast("type[Exception]", isal_zlib.error)
except ImportError:  # no wheel for this kind of machine
    pass

DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, _DEFLATE_ERROR)
"""What reading a damaged gzip stream raises (gzip.BadGzipFile is an OSError)."""
GZIP_MAGIC = b"\x1f\x8b"
PICTURE_MAGICS = (b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"GIF8")
"""First bytes of PNG, TIFF (either byte order), JPEG and GIF."""
NIFTI_HEADER_BYTES = (348, 540)
"""Size of the header of NIfTI-1 (and Analyze) and NIfTI-2, which is also its first field."""
_WORDS = {
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"BM": "a BMP picture",
    b"PK\x03\x04": "a zip",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    GZIP_MAGIC: "gzip",
    b"%PDF": "a PDF",
    b"NRRD": "an NRRD file",
    b"\x89HDF": "an HDF5 file",
    b"<?xml": "XML",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
"""First bytes of what gets the name of a scan by mistake."""
REMEDY_OF_NAME = "give the file the ending of its content, or take it away"
_TEXT_BYTES = bytes([9, 10, 13, *range(32, 127)])
DICOM_MAGIC = b"DICM"
DICOM_PREAMBLE_BYTES = 128
_KIND_BYTES = 1024
"""What is read of a file to tell its kind: enough of a gzip stream for its first bytes."""


class Kind(Enum):
    """The families of readers."""

    NIFTI = "NIfTI"
    DICOM = "DICOM"
    PICTURE = "picture"


def kind_of(path: Path) -> Kind | None:
    """The kind of a regular file, None if it is none of them."""
    start = _start(path, _KIND_BYTES)
    if is_dicom_start(start):
        return Kind.DICOM
    if start.startswith(PICTURE_MAGICS):
        return Kind.PICTURE
    size = start[:4]
    if start.startswith(GZIP_MAGIC):
        try:
            size = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, 4)
            if len(size) < 4:  # a name of this length before the first byte
                with open_stream(path) as stream:
                    size = stream.read(4)
        except DAMAGED:  # at its beginning
            return None
    if int.from_bytes(size, "little") in NIFTI_HEADER_BYTES or int.from_bytes(size, "big") in NIFTI_HEADER_BYTES:
        return Kind.NIFTI
    return None


def is_dicom(path: Path) -> bool:
    """True for a regular file with DICOM's preamble: "DICM" at byte 128."""
    return path.is_file() and is_dicom_start(_start(path))


def is_dicom_start(start: bytes) -> bool:
    """True for the first bytes of a DICOM file."""
    return start[DICOM_PREAMBLE_BYTES : DICOM_PREAMBLE_BYTES + len(DICOM_MAGIC)] == DICOM_MAGIC


def content_in_words(path: Path) -> str | None:
    """What a file is whose name promised something else ("a JPEG picture"); None where its first bytes do not tell."""
    try:
        start = _start(path)
        kind = kind_of(path) if start else None
    except MedsegError:
        return None
    if not start:
        return "empty"
    if kind is Kind.NIFTI:
        return "a NIfTI file"
    if kind is not Kind.DICOM:
        for magic, words in _WORDS.items():
            if start.startswith(magic):
                return words
    return "text" if not start.strip(_TEXT_BYTES) else None


def damage_with_content(path: Path, reason: str) -> tuple[str, str | None]:
    """Why a file is damaged, with what it is instead of DICOM, and what to do.

    Args:
        path: the file.
        reason: as `Catalog.damaged` has it.
    """
    if not reason.startswith(Code.NOT_DICOM):
        return reason, None
    content = content_in_words(path)
    if content is None:
        return reason, "old files without a preamble are read with --without-preamble"
    return f"{reason}; its content is {content}", REMEDY_OF_NAME


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """The content, decompressed if it is gzip; damage raises one of `DAMAGED` where it is met."""
    with path.open("rb") as raw:
        if raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
            with GzipFile(fileobj=raw) as stream:
                yield cast("IO[bytes]", stream)
        else:
            yield raw


def is_inflating(stream: IO[bytes]) -> bool:
    """True for a stream of `open_stream` that decompresses, whatever the name of its file says."""
    return isinstance(stream, GzipFile)


def _start(path: Path, count: int = DICOM_PREAMBLE_BYTES + len(DICOM_MAGIC)) -> bytes:
    try:
        with path.open("rb", buffering=0) as stream:
            return stream.read(count)
    except OSError as error:
        raise MedsegError(
            Code.UNSUPPORTED,
            "the file cannot be opened",
            where=path.name,
            got=error.strerror or type(error).__name__,
            remedy="check its permissions",
        ) from error
