"""Every image and label file in and out. What a file is is decided by its content, never by its name.

`open_volume` and `open_label` read NIfTI, DICOM series and pictures; `write_label` and `write_image` write NIfTI and
pictures. The readers (and nibabel, pydicom, Pillow with them) are imported when a file of their kind is met.
Messages and logs name files without their folders: paths may hold patient names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from medseg.errors import Code, MedsegError
from medseg.formats.content import REMEDY_OF_NAME, Kind, content_in_words, is_dicom, kind_of
from medseg.formats.reading import STRICT, Reading
from medseg.label_values import integer_values, smallest_integer_type
from medseg.volume import Grid, Volume

__all__ = [
    "IMAGE_SUFFIXES",
    "STRICT",
    "Reading",
    "Source",
    "find_series",
    "is_dicom",
    "is_image_file",
    "open_channels",
    "open_label",
    "open_volume",
    "read_grid",
    "strip_suffix",
    "write_image",
    "write_label",
]

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from medseg.formats.dicom.files import SeriesInfo

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr", ".dcm", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".gif")
"""Endings of the files that are looked at as images, lower case. The .img of a pair is left out so that a pair counts
once; `open_volume` reads it all the same."""
NIFTI_SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff")
"""Endings of pictures that are written: those without loss."""
PAIR_SUFFIXES = (".img.gz", ".img")


Source = Union[Path, "SeriesInfo"]
"""Where an image or label is: a file, a folder or zip of one DICOM series, or a series as a search found it."""


def open_volume(source: Source, reading: Reading = STRICT) -> Volume:
    """Read an image of any kind.

    Args:
        source: a file, a folder or zip that holds the files of a DICOM series at any depth, or such a series.
        reading: what is wanted beyond the strict defaults.
    Returns:
        float32 (C, *grid.shape), axes in the file's order (see `medseg.volume`). A DICOM image without a position (an
        X-ray) is a picture.
    Raises:
        MedsegError: E_MISSING, E_UNSUPPORTED, E_NOT_DICOM, and what the readers refuse.
    """
    if not isinstance(source, Path) or (kind := _kind(source, reading)) is Kind.DICOM:
        from medseg.formats.dicom import series

        return series.read_series(source, reading)
    if kind is Kind.NIFTI:
        from medseg.formats import nifti

        return nifti.read_image(source, reading)
    from medseg.formats import picture

    return picture.read_image(source)


def open_channels(path: Path, reading: Reading = STRICT) -> tuple[int, Iterator[Volume]]:
    """The channels of an image: how many there are, and one after the other, of NIfTI only one in memory at a time.

    Args:
        path: as `source` in `open_volume`.
        reading: as in `open_volume`; channels need not be declared.
    Returns:
        Number of channels, and each of them as float32 (*grid.shape).
    Raises:
        MedsegError: as `open_volume`; what only the voxels tell, when they are taken.
    """
    if not path.is_dir() and _kind(path, reading) is Kind.NIFTI:
        from medseg.formats import nifti

        return nifti.read_header(path, reading).num_channels, nifti.read_channels(path, reading)
    volume = open_volume(path, replace(reading, channels=True))
    return len(volume.array), (replace(volume, array=channel) for channel in volume.array)


def open_label(source: Source, reading: Reading = STRICT) -> Volume:
    """Read a label map of any kind: no channel axis, the file's own values and type.

    Whether the values are whole numbers is the business of `medseg.labels`.

    Args:
        source: as in `open_volume`.
        reading: as in `open_volume`.
    Raises:
        MedsegError: as `open_volume`; E_LABEL for coloured pictures; E_4D.
    """
    if not isinstance(source, Path) or (kind := _kind(source, reading)) is Kind.DICOM:
        from medseg.formats.dicom import series

        volume = series.read_series(source, reading)
        if len(volume.array) > 1:
            raise MedsegError(
                Code.LABEL,
                "a label map has one value per voxel",
                where=source.name,
                expected="one channel",
                got=f"{len(volume.array)} channels",
                remedy="draw the label as SEG or RTSTRUCT, or in a grey picture",
            )
        return replace(volume, array=volume.array[0])
    if kind is Kind.NIFTI:
        from medseg.formats import nifti

        return nifti.read_label(source, reading)
    from medseg.formats import picture

    return picture.read_label(source)


def read_grid(source: Source, reading: Reading = STRICT) -> Grid:
    """The grid of an image or a label from its headers; no voxels are read.

    Raises:
        MedsegError: as `open_volume`, for what the headers tell.
    """
    if not isinstance(source, Path) or (kind := _kind(source, reading)) is Kind.DICOM:
        from medseg.formats.dicom import series

        return series.read_grid(source, reading)
    if kind is Kind.NIFTI:
        from medseg.formats import nifti

        return nifti.read_grid(source, reading)
    from medseg.formats import picture

    return picture.read_grid(source)


def write_label(path: Path, label: Volume, names: Mapping[int, str] | None = None) -> None:
    """Write a label map in the smallest integer type, whole or not at all.

    Args:
        path: ends in .nii, .nii.gz, .png, .tif or .tiff.
        label: (i, j, k) for NIfTI, (row, column) for pictures; whole numbers.
        names: value → name of the class, for the header of NIfTI files.
    Raises:
        MedsegError: E_OUTPUT, E_LABEL if the values are not whole numbers, E_GRID if it has channels,
            E_NO_GEOMETRY for a picture that would be written as a volume.
    """
    path = Path(path)
    if not label.is_label:
        raise MedsegError(
            Code.GRID,
            "a label map has no channels",
            where=path.name,
            expected=label.grid.shape,
            got=label.array.shape,
            remedy="write one class index per voxel",
        )
    values = integer_values(label.array, where=path.name)
    dtype = smallest_integer_type(values)
    if _written_kind(path, label) is Kind.NIFTI:
        from medseg.formats import nifti

        nifti.write(path, values.astype(dtype), label.grid, names=names)
        return
    from medseg.formats import picture

    if dtype not in (np.uint8, np.uint16) and np.can_cast(dtype, np.int32):  # the only signed type of pictures
        dtype = np.dtype(np.int32)
    picture.write(path, values.astype(dtype))


def write_image(path: Path, volume: Volume) -> None:
    """Write an image without loss, whole or not at all: float32, but pictures of whole numbers in 8 or 16 bits.

    Args:
        path: ends in .nii, .nii.gz, .png, .tif or .tiff.
        volume: (C, i, j, k), channels become the 4th dimension of the NIfTI file; (1 or 3, row, column) for pictures.
    Raises:
        MedsegError: E_OUTPUT, E_NO_GEOMETRY.
    """
    path = Path(path)
    channels: NDArray[Any] = volume.array[None] if volume.is_label else volume.array
    array = channels[0] if len(channels) == 1 else np.moveaxis(channels, 0, -1)
    if _written_kind(path, volume) is Kind.NIFTI:
        from medseg.formats import nifti

        nifti.write(path, array.astype(np.float32), volume.grid)
        return
    from medseg.formats import picture

    picture.write(path, _as_picture(array))


def strip_suffix(name: str) -> str:
    """A file's name without the ending of an image ("a.nii.gz" → "a"); other names stay as they are."""
    for suffix in IMAGE_SUFFIXES + PAIR_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def is_image_file(path: Path) -> bool:
    """True for a file with one of `IMAGE_SUFFIXES`, or without any suffix and with the content of an image."""
    path = Path(path)
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    return not path.suffix and kind_of(path) is not None


def find_series(folder: Path) -> list[SeriesInfo]:
    """The image series of a folder with all that is below it, of a zip or a file, from headers alone.

    Returns:
        One entry per SeriesInstanceUID, sorted by it; empty if there is no DICOM image.
    """
    from medseg.formats.dicom import files as dicom_files

    return dicom_files.find_series(Path(folder))


def _kind(path: Path, reading: Reading) -> Kind:
    """What stands at a path.

    Raises:
        MedsegError: E_MISSING, E_NOT_DICOM, E_TRUNCATED, E_UNSUPPORTED.
    """
    if path.is_dir():
        return Kind.DICOM
    if not path.is_file():
        raise MedsegError(
            Code.MISSING,
            "there is no such file",
            where=path.name,
            expected="an image file, or a folder of DICOM slices",
            got="nothing",
            remedy="check the path",
        )
    kind = kind_of(path)
    if kind is not None:
        return kind
    from medseg.formats.dicom.archive import is_zip

    if reading.without_preamble or is_zip(path):
        return Kind.DICOM
    name = path.name.lower()
    if name.endswith(PAIR_SUFFIXES):  # the .img half has no magic of its own
        return Kind.NIFTI
    content = content_in_words(path)
    if name.endswith(".dcm"):
        from medseg.formats.dicom.parsing import not_dicom

        error = not_dicom(path)
        if content is not None:
            error = MedsegError(
                error.code,
                error.message,
                where=error.where,
                expected=error.expected,
                got=f"its content is {content}",
                remedy=REMEDY_OF_NAME,
            )
        raise error
    known = next((s for s in IMAGE_SUFFIXES if name.endswith(s)), None)
    if known is not None:
        raise MedsegError(
            Code.TRUNCATED,
            f"the file is cut or damaged: its content is not what its ending {known} promises",
            where=path.name,
            got=f"{path.stat().st_size} bytes" + (f", {content}" if content is not None else ""),
            remedy="copy or download the file again",
        )
    raise MedsegError(
        Code.UNSUPPORTED,
        "the file is of a kind that is not read",
        where=path.name,
        expected="NIfTI, DICOM, a zip of DICOM, PNG, TIFF, JPEG or GIF",
        remedy="convert it to NIfTI",
    )


def _written_kind(path: Path, volume: Volume) -> Kind:
    """The format that an ending asks for, if the volume fits it."""
    name = path.name.lower()
    is_picture = volume.grid.is_picture
    if name.endswith(NIFTI_SUFFIXES):
        if is_picture or volume.grid.ndim != 3:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "a picture has no position in a patient and cannot be written as NIfTI",
                where=path.name,
                expected="a volume in mm",
                got=f"a picture of shape {volume.grid.shape}",
                remedy="write .png or .tif",
            )
        return Kind.NIFTI
    if not name.endswith(PICTURE_SUFFIXES):
        raise MedsegError(
            Code.OUTPUT,
            "files with this ending are not written",
            where=path.name,
            expected=" | ".join(NIFTI_SUFFIXES + PICTURE_SUFFIXES),
            got=path.suffix or "no ending",
            remedy="name the file with one of these endings",
        )
    if not is_picture or volume.grid.ndim != 2:
        raise MedsegError(
            Code.OUTPUT,
            "a volume cannot be written as a picture",
            where=path.name,
            expected="an array of rows and columns",
            got=volume.grid.shape,
            remedy="write .nii.gz",
        )
    return Kind.PICTURE


def _as_picture(array: NDArray[Any]) -> NDArray[Any]:
    """The smallest type that holds the pixels without loss."""
    whole = np.isfinite(array).all() and (array == np.rint(array)).all() and array.size and array.min() >= 0
    if whole and array.max() <= np.iinfo(np.uint16).max:
        return array.astype(np.uint8 if array.max() <= np.iinfo(np.uint8).max else np.uint16)
    return array.astype(np.float32)
