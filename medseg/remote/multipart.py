"""The parts of a multipart answer, written to files as they come: no part is ever held in memory.

Source:
    RFC 2046, 5.1 (multipart), RFC 2387 (multipart/related), as DICOM PS3.18, 8.6.1.2 uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 2**20
"""Read at once."""
MAX_HEADER_BYTES = 2**14
"""What stands before the content of a part."""
LINE_END = b"\r\n"


def save_parts(content_type: str, chunks: Iterable[bytes], folder: Path) -> Iterator[Path]:
    """Write each part of an answer to a file of its own.

    Args:
        content_type: of the answer: multipart, or application/dicom, as some servers send an image that is alone.
        chunks: its bytes, in pieces of any size.
        folder: where 000000.dcm, 000001.dcm, … are written.
    Yields:
        the path of each file, as soon as it is whole.
    Raises:
        ValueError: the answer is neither, names no boundary, or a part's header does not end.
    """
    header = Message()
    header["Content-Type"] = content_type
    if header.get_content_maintype() == "multipart":
        pieces = _pieces(chunks, (header.get_boundary() or "").encode("latin-1"))
    elif header.get_content_type() == "application/dicom":
        pieces = _alone(chunks)
    else:
        raise ValueError("neither multipart nor DICOM")
    stream: BinaryIO | None = None
    path, number = folder, 0
    try:
        for piece in pieces:
            if piece is not None and stream is not None:
                stream.write(piece)
                continue
            if stream is not None:
                stream.close()
                yield path
            path = folder / f"{number:06d}.dcm"
            stream, number = path.open("wb"), number + 1
        if stream is not None:
            stream.close()
            yield path
    finally:
        if stream is not None:
            stream.close()


def _alone(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    yield None
    yield from chunks


def _pieces(chunks: Iterable[bytes], boundary: bytes) -> Iterator[bytes | None]:
    """None where a part begins, then its content in pieces. Where the last boundary never comes, the last part ends
    with the message: that something is missing is found by who reads it."""
    if not boundary:
        raise ValueError("multipart without a boundary")
    delimiter = LINE_END + b"--" + boundary
    held = bytearray(LINE_END)  # the first boundary may stand at the very beginning
    in_header = in_content = False
    for chunk in chunks:
        held += chunk
        while True:
            if in_header:
                if held.startswith(b"--"):
                    return
                end = held.find(2 * LINE_END)
                if end < 0:
                    if len(held) > MAX_HEADER_BYTES:
                        raise ValueError("the header of a part does not end")
                    break
                del held[: end + 2 * len(LINE_END)]
                in_header, in_content = False, True
                yield None
            end = held.find(delimiter)
            ready = end if end >= 0 else max(0, len(held) - len(delimiter) + 1)  # the rest may begin a boundary
            if in_content and ready:
                yield bytes(held[:ready])
            if end < 0:
                del held[:ready]
                break
            del held[: end + len(delimiter)]
            in_header, in_content = True, False
    if in_content and held:
        yield bytes(held)
