"""How much a header may ask for: checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.errors import Code, MedsegError

MAX_VOXELS = 2**32
"""Largest array that is read (16 GiB as float32). A whole-body CT of 512 × 512 × 2000 has an eighth of that."""
MAX_DEFLATE_RATIO = 1032
"""Deflate never expands a byte to more than this (zlib's technical notes), so a gzip file can hold no more; a header
that asks for a larger factor of its file's size is a lie, whatever the compression, and not merely a cut file."""
RATIO_SLACK_BYTES = 64 * 1024
"""Added to a file's size before the ratio is judged: a cut phantom of a few hundred bytes is cut, not absurd."""


def check_size(shape: Sequence[int], itemsize: int, file_bytes: int, *, where: object, compressed: bool) -> None:
    """Refuse a header that asks for more than its file can hold or than anyone should read.

    Args:
        shape: number of elements along each axis, channels included.
        itemsize: bytes of one element.
        file_bytes: size of the file on disk that holds the elements.
        where: the file, for the message.
        compressed: True if the elements are compressed in the file.
    Raises:
        MedsegError: E_LIMIT if the array is larger than `MAX_VOXELS` or than `MAX_DEFLATE_RATIO` times the file;
            E_TRUNCATED if an uncompressed file is merely shorter than its array.
    """
    if min(shape, default=0) < 1:
        raise MedsegError(
            Code.TRUNCATED,
            "the header declares an empty array",
            where=where,
            expected="at least one voxel along each axis",
            got=tuple(shape),
            remedy="export the file again",
        )
    voxels = math.prod(shape)
    needed = voxels * itemsize
    if voxels > MAX_VOXELS or needed > MAX_DEFLATE_RATIO * (file_bytes + RATIO_SLACK_BYTES):
        raise MedsegError(
            Code.LIMIT,
            "the header asks for an absurd amount of memory",
            where=where,
            expected=f"at most {MAX_VOXELS} voxels, and {MAX_DEFLATE_RATIO} times the file's {file_bytes} bytes",
            got=f"shape {tuple(shape)}: {needed} bytes",
            remedy="the header is damaged or forged: get the file again from its source",
        )
    if not compressed and needed > file_bytes:
        raise MedsegError(
            Code.TRUNCATED,
            "the file ends before its last voxel",
            where=where,
            expected=f"{needed} bytes of voxels for shape {tuple(shape)}",
            got=f"a file of {file_bytes} bytes",
            remedy="copy or download the file again",
        )
