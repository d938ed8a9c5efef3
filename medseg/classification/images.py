"""An image that is classified: where it lies, and how it is read."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats import Reading, Source, open_volume
from medseg.formats.limits import check_size
from medseg.volume import Grid, Volume


@dataclass(frozen=True)
class NpzImage:
    """An image within an npz.

    Args:
        path: the file.
        key: of the array of images.
        index: of the image.
    """

    path: Path
    key: str
    index: int


@dataclass(frozen=True)
class ImageCase:
    """An image and what is known of it.

    Args:
        case_id: its name in splits, tables and messages.
        source: where it lies: a file, a folder of one DICOM series, such a series among others, or a place in an npz.
        class_name: None where it is not known, as in prediction.
        patient: who it is of, where something says so.
        split: "train", "val" or "test", where something says so.
    """

    case_id: str
    source: Source | NpzImage
    class_name: str | None = None
    patient: str | None = None
    split: str | None = None


def open_image(case: ImageCase, reading: Reading) -> Volume:
    """An image with its channels, float32 (C, *spatial).

    Raises:
        MedsegError: what the readers refuse.
    """
    if not isinstance(case.source, NpzImage):
        return open_volume(case.source, replace(reading, channels=True))
    array = npz_arrays(case.source.path)[case.source.key][case.source.index]
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 0)
    else:
        array = array[None]
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise MedsegError(Code.NONFINITE, "the image holds NaN or infinite values", where=case.case_id)
    return Volume(values, Grid.of_picture(values.shape[1:]))


@lru_cache(maxsize=2)
def npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz; no pickles.

    Raises:
        MedsegError: E_TRUNCATED; E_LIMIT for sizes that no file of its size can hold.
    """
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except MedsegError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError) as error:
        raise MedsegError(
            Code.TRUNCATED,
            "the npz cannot be read",
            where=path.name,
            expected="arrays of numbers, without pickled objects",
            got=f"{type(error).__name__}: {error}",
            remedy="copy or download the file again",
        ) from error
    except Exception as error:  # zipfile's own errors, which share no base but this
        raise MedsegError(Code.TRUNCATED, "the npz is damaged", where=path.name, got=type(error).__name__) from error


def _check_sizes(path: Path) -> None:
    """Read the headers of the arrays alone: numpy would allocate whatever they ask for, and read other members whole.

    Raises:
        MedsegError: E_LIMIT.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            if 0 not in shape:
                check_size(shape or (1,), dtype.itemsize, info.compress_size, where=path.name, compressed=True)
