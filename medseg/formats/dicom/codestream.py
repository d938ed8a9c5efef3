"""What a compressed image says of its own size: known before anything is decoded."""

from __future__ import annotations

JPEG_START = b"\xff\xd8"
JPEG_SCAN = 0xDA
JPEG_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Markers of a frame header: JPEG (ITU-T T.81, table B.1) and JPEG-LS (T.87)."""
JPEG_2000_START = b"\xff\x4f\xff\x51"
"""Start of codestream and its size (ITU-T T.800, A.4.1 and A.5.1)."""
JP2_START = b"\0\0\0\x0cjP  "
"""A JPEG 2000 codestream in a file of its own; not allowed in DICOM, but met."""


def coded_size(code: bytes) -> tuple[int, int] | None:
    """(columns, rows) that the headers of a JPEG, JPEG-LS or JPEG 2000 image declare.

    Args:
        code: one compressed frame.
    Returns:
        None where the compression has no size of its own (RLE), or the headers are damaged.
    """
    if code.startswith(JPEG_START):
        return _jpeg_size(code)
    place = code.find(JPEG_2000_START) if code.startswith(JP2_START) else 0
    if place < 0 or not code.startswith(JPEG_2000_START, place) or len(code) < place + 24:
        return None
    right, bottom, left, top = (int.from_bytes(code[place + at :][:4], "big") for at in (8, 12, 16, 20))
    return right - left, bottom - top


def _jpeg_size(code: bytes) -> tuple[int, int] | None:
    place = len(JPEG_START)
    while place + 9 <= len(code) and code[place] == 0xFF:
        marker = code[place + 1]
        if marker in JPEG_FRAMES:
            rows, columns = (int.from_bytes(code[place + at :][:2], "big") for at in (5, 7))
            return columns, rows
        if marker == JPEG_SCAN:
            return None
        place += 1 if marker == 0xFF else 2 + int.from_bytes(code[place + 2 :][:2], "big")
    return None
