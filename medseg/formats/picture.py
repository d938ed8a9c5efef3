"""Pictures by Pillow: PNG, TIFF, JPEG, GIF; grey of 1 to 32 bits and 8-bit colour.

- Arrays are (C, row, column), or (row, column) for labels, on `Grid.of_picture`.
- An alpha channel that is opaque everywhere says nothing and is dropped; any other is refused, because what lies under
  it is not defined.
- 16-bit colour is refused: Pillow would drop the lower byte of it without a word.
- EXIF orientation is not applied: a label drawn on the stored pixels must keep fitting them. It is logged.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.volume import Grid, Volume

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "TIFF", "JPEG", "GIF")
"""What Pillow may try; its other decoders are never reached by a file that only pretends."""
MAX_PIXELS = 2**27
"""Largest picture that is read (11585 × 11585). Whole slides need tiles, not one array."""
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
COLOUR_MODES = ("RGB", "RGBA", "LA")
EXIF_ORIENTATION = 0x0112
OPAQUE = 255


def read_grid(path: Path) -> Grid:
    """The grid of a picture from its header. Raises as `read_image`, except for what only the pixels tell."""
    with _opened(path) as picture:
        return Grid.of_picture((picture.height, picture.width))


def read_image(path: Path) -> Volume:
    """Read a picture as float32 (1 or 3, row, column), values as stored (no scaling to 0–1).

    A palette is looked up: 3 channels, or 1 if all its colours are grey.

    Raises:
        MedsegError: E_LIMIT, E_TRUNCATED, E_4D (several pages or frames), E_UNSUPPORTED (16-bit colour, CMYK, …),
            E_CHANNELS (an alpha channel that is not opaque), E_NONFINITE.
    """
    with _opened(path) as picture:
        channels = _without_alpha(_looked_up(picture, path), path)
        if picture.mode == "P" and _all_equal(channels):
            channels = channels[:1]
    values = channels.astype(np.float32)
    not_finite = values.size - int(np.isfinite(values).sum())
    if not_finite:
        raise MedsegError(
            Code.NONFINITE,
            "the picture holds NaN or infinite pixels",
            where=path.name,
            got=f"{not_finite} of {values.size} pixels",
            remedy="replace them by the value of the background",
        )
    return Volume(values, Grid.of_picture(values.shape[1:]))


def read_label(path: Path) -> Volume:
    """Read a label picture as (row, column), in the type of the file (bilevel as uint8 0 and 1).

    A palette picture gives its palette's indices: that is how label colours are stored. Where the palette is a plain
    grey ramp, index and grey value are the same. A GIF is looked up instead: the format knows nothing but palettes,
    and an encoder numbers their entries as it likes.

    Raises:
        MedsegError: as `read_image`; E_LABEL for colours, which are not class ids.
    """
    with _opened(path) as picture:
        by_index = picture.mode == "P" and picture.format != "GIF"
        array = np.asarray(picture) if by_index else _looked_up(picture, path)
    channels = _without_alpha(array, path)
    if not _all_equal(channels):
        raise MedsegError(
            Code.LABEL,
            "the label picture is coloured",
            where=path.name,
            expected="one class id per pixel: a grey or a palette picture",
            got=f"{len(channels)} channels that differ",
            remedy="replace each colour by a class id",
        )
    return Volume(channels[0], Grid.of_picture(channels.shape[1:]))


def write(path: Path, array: NDArray[Any]) -> None:
    """Write (row, column) or (row, column, 3) without loss, under `path` or not at all.

    Args:
        path: ends in .png, .tif or .tiff.
        array: uint8 or uint16 grey, uint8 colour; TIFF takes int32 and float32 grey too.
    Raises:
        MedsegError: E_OUTPUT if the format cannot hold the values, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    fits = array.dtype == np.uint8 or (
        array.ndim == 2 and (array.dtype == np.uint16 or (suffix != ".png" and array.dtype in (np.int32, np.float32)))
    )
    if not fits:
        raise MedsegError(
            Code.OUTPUT,
            f"a {suffix} file cannot hold these values without loss",
            where=path.name,
            expected="whole numbers from 0 to 65535 (colour: 255)"
            if suffix == ".png"
            else "8-bit colour or 32-bit grey",
            got=f"{array.dtype}, shape {array.shape}",
            remedy="write .tif" if suffix == ".png" else "write fewer channels or smaller ids",
        )
    with whole_file(path, suffix) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An opened and checked picture; Pillow's failures become refusals."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check(picture, path)
            yield picture
    except (Image.DecompressionBombError, MemoryError) as error:
        raise _too_large(path, str(error)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise MedsegError(
            Code.TRUNCATED,
            "the picture ends too early or is damaged",
            where=path.name,
            got=type(error).__name__,
            remedy="copy or download the file again",
        ) from error


def _check(picture: Image.Image, path: Path) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(path, f"{picture.width} × {picture.height} pixels")
    pages = getattr(picture, "n_frames", 1)
    if pages > 1:
        raise MedsegError(
            Code.FOUR_D,
            "the file holds several pages or frames",
            where=path.name,
            expected="one picture",
            got=f"{pages} pages",
            remedy="write each page into its own file; a volume belongs into NIfTI, which knows the size of its voxels",
        )
    raw_mode = _raw_mode(picture)
    wide_colour = picture.mode in COLOUR_MODES and ";16" in raw_mode
    if picture.mode not in (*GREY_MODES, *COLOUR_MODES, "P") or wide_colour:
        raise MedsegError(
            Code.UNSUPPORTED,
            "pixels of this kind are not read",
            where=path.name,
            expected="grey of up to 32 bits, 8-bit RGB, or a palette",
            got=f"Pillow mode {picture.mode} stored as {raw_mode or picture.mode}",
            remedy="convert the picture to 8-bit RGB, or write one grey file per channel",
        )
    if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
        logger.warning("%s: the EXIF orientation is not applied; pixels are read as stored", path.name)


def _raw_mode(picture: Image.Image) -> str:
    """How the pixels are stored ("RGB;16B"), which Pillow's mode hides."""
    tiles = getattr(picture, "tile", ())  # set by every file plug-in
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _looked_up(picture: Image.Image, path: Path) -> NDArray[Any]:
    """Grey values or colours (row, column[, channel]); bilevel as uint8, palettes as RGBA."""
    array = np.asarray(picture.convert("RGBA") if picture.mode == "P" else picture)
    if array.ndim not in (2, 3):
        raise MedsegError(
            Code.UNSUPPORTED,
            "the picture has no pixels",
            where=path.name,
            expected="rows and columns",
            got=array.shape,
            remedy="get the file again from its source",
        )
    array = array.astype(np.uint8) if array.dtype == np.bool_ else array
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _without_alpha(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """(row, column[, channel]) → (1 or 3, row, column)."""
    if array.ndim == 2:
        return array[None]
    if array.shape[2] in (2, 4):
        if (array[..., -1] != OPAQUE).any():
            raise MedsegError(
                Code.CHANNELS,
                "the picture is transparent in places",
                where=path.name,
                expected="no alpha channel, or one that is opaque everywhere",
                got=f"{int((array[..., -1] != OPAQUE).sum())} pixels that are not opaque",
                remedy="flatten the picture on a background",
            )
        array = array[..., :-1]
    return np.moveaxis(array, -1, 0)


def _all_equal(channels: NDArray[Any]) -> bool:
    return bool((channels == channels[:1]).all())


def _too_large(path: Path, got: str) -> MedsegError:
    return MedsegError(
        Code.LIMIT,
        "the picture is too large",
        where=path.name,
        expected=f"at most {MAX_PIXELS} pixels",
        got=got,
        remedy="cut it into tiles",
    )
