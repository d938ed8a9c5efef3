"""Numbers from 0 to 1 at each voxel (probabilities, uncertainty) as files of 16 bits.

NIfTI holds no float16, and float32 would take twice the room for digits that nobody trusts: the files hold
round(65535 · p) in uint16 with the slope 1/65535 in their header, which every reader applies. Channels are the fourth
dimension. Pictures have no slope: their PNG files hold the same whole numbers, one file for each channel.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.formats.atomic import whole_file
from medseg.volume import Grid, Volume

FULL = 65535
"""The whole number that stands for 1."""
COMPRESSION = 1
"""Of gzip: 6 takes 3 times as long and saves a tenth."""


def write_shares(path: Path, volume: Volume) -> None:
    """Write a volume of numbers from 0 to 1, whole or not at all, one channel in memory at a time.

    Args:
        path: ends in .nii.gz; for pictures, of one channel, in .png.
        volume: (C, *S) or (*S), any floating type.
    Raises:
        MedsegError: E_OUTPUT.
    """
    array: NDArray[Any] = volume.array[None] if volume.is_label else volume.array
    if volume.grid.is_picture:
        from medseg.formats import picture

        picture.write(path, _whole(array[0]))
        return
    with (
        whole_file(path, ".nii.gz") as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as stream,  # no name, no time: same numbers, same file
    ):
        stream.write(_header(array.shape[0], volume.grid))
        for channel in array:
            _write_channel(stream, channel)


def _header(num_channels: int, grid: Grid) -> bytes:
    from medseg.formats.nifti import placed

    shape = grid.shape if num_channels == 1 else (*grid.shape, num_channels)
    header = placed(np.broadcast_to(np.zeros((), np.uint16), shape), grid).header
    header["vox_offset"] = len(header.binaryblock) + 4
    header["scl_slope"], header["scl_inter"] = 1 / FULL, 0
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + bytes(4)  # no extensions


def _write_channel(stream: gzip.GzipFile, channel: NDArray[Any]) -> None:
    """The voxels in the order of the file, i fastest, some planes of k at a time."""
    planes = max(1, 2**22 // max(1, channel[..., 0].size))
    for first in range(0, channel.shape[-1], planes):
        part = _whole(channel[..., first : first + planes])
        stream.write(part.astype("<u2").tobytes(order="F"))


def _whole(values: NDArray[Any]) -> NDArray[np.uint16]:
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * FULL).astype(np.uint16)
