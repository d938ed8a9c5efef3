"""What a file is, by its first bytes. Imports no reader."""

from __future__ import annotations

import gzip
import zlib
from enum import Enum
from pathlib import Path
from typing import IO, cast

from medseg.errors import Code, MedsegError

GZIP_MAGIC = b"\x1f\x8b"
PICTURE_MAGICS = (b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"GIF8")
"""First bytes of PNG, TIFF (either byte order), JPEG and GIF."""
NIFTI_HEADER_BYTES = (348, 540)
"""Size of the header of NIfTI-1 (and Analyze) and NIfTI-2, which is also its first field."""
DICOM_MAGIC = b"DICM"
DICOM_PREAMBLE_BYTES = 128


class Kind(Enum):
    """The families of readers."""

    NIFTI = "NIfTI"
    DICOM = "DICOM"
    PICTURE = "picture"


def kind_of(path: Path) -> Kind | None:
    """The kind of a regular file, None if it is none of them."""
    start = _start(path)
    if is_dicom_start(start):
        return Kind.DICOM
    if start.startswith(PICTURE_MAGICS):
        return Kind.PICTURE
    try:
        with open_stream(path) as stream:
            size = stream.read(4)
    except (OSError, EOFError, zlib.error):  # gzip that is damaged at its beginning
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


def is_gzip(path: Path) -> bool:
    """True if the content is gzip, whatever the name says."""
    return _start(path).startswith(GZIP_MAGIC)


def open_stream(path: Path) -> IO[bytes]:
    """The content, decompressed if it is gzip."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(DICOM_PREAMBLE_BYTES + len(DICOM_MAGIC))
    except OSError as error:
        raise MedsegError(
            Code.UNSUPPORTED,
            "the file cannot be opened",
            where=path.name,
            got=error.strerror or type(error).__name__,
            remedy="check its permissions",
        ) from error
