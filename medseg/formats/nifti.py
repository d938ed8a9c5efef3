"""NIfTI-1 and -2, single files and .hdr/.img pairs, gzipped or not, by content.

The header is parsed by nibabel; the voxels are streamed here, so that a file's name does not decide how it is read,
memory stays bounded (one result plus one chunk), and the gzip checksum is always verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.formats.content import DAMAGED, is_inflating, open_stream
from medseg.formats.limits import check_size
from medseg.formats.nifti_form import FORM_TOLERANCE_VOXELS, disagreement_mm, placed_by
from medseg.formats.nifti_names import CODES, names_extension
from medseg.formats.reading import STRICT, Reading
from medseg.volume import Grid, Volume

HEADER_BYTES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
"""Size of the header, which is also its first field, → the class that parses it."""
SINGLE_MAGIC = (b"n+1", b"n+2")
PAIR_MAGIC = (b"ni1", b"ni2")

MAX_EXTENSION_BYTES = 2**26
"""Largest distance from the header to the voxels (header extensions stand between)."""
MAX_TRAILING_BYTES = 2**20
"""What a gzip stream may hold after the last voxel; more is a bomb or another kind of file."""
CHUNK_VOXELS = 2**22
"""Voxels converted at a time."""


@dataclass(frozen=True)
class Header:
    """What is known before a voxel is read."""

    path: Path
    """The file that was asked for, for messages."""
    grid: Grid
    file_shape: tuple[int, ...]
    """Shape as stored, channels last."""
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first voxel."""
    scale: tuple[float, float] | None
    """(slope, intercept), or None where the header sets none."""
    notes: tuple[str, ...] = ()
    """How its place came to be, where that is worth knowing (`Volume.notes`)."""

    @property
    def num_channels(self) -> int:
        """Number of values at each voxel."""
        return math.prod(self.file_shape[3:])


def read_header(path: Path, reading: Reading = STRICT) -> Header:
    """Parse and check a header; no voxel is read.

    Args:
        path: the file, or half of a pair.
        reading: `form` and `without_form` say what places it.
    Raises:
        MedsegError: E_TRUNCATED, E_UNSUPPORTED (colour, complex, more than 4 dimensions), E_MISSING (half of a
            pair), E_NO_GEOMETRY, E_FORM, E_AFFINE, E_SHEAR, E_LIMIT.
    """
    with _opened(path, reading) as (header, _, _):
        return header


def read_grid(path: Path, reading: Reading = STRICT) -> Grid:
    """The grid of a file from its header alone. Raises as `read_header`."""
    return read_header(path, reading).grid


def read_image(path: Path, reading: Reading = STRICT) -> Volume:
    """Read an image.

    Args:
        path: the file; (x, y), (x, y, z, 1) and (x, y, z) are read as one channel of (x, y, z).
        reading: `channels` if a 4th (or 5th, after an empty 4th) dimension holds channels; as `read_header`.
    Returns:
        float32 (C, i, j, k) in the file's own index order, scaled by scl_slope and scl_inter.
    Raises:
        MedsegError: as `read_header`; E_4D for undeclared channels; E_NONFINITE; E_TRUNCATED (also wrong CRC).
    """
    with _opened(path, reading) as (header, stream, position):
        if header.num_channels > 1 and not reading.channels:
            raise _four_d(header, "declare the fourth dimension as channels, or split it into one file per channel")
        flat = np.empty(math.prod(header.file_shape), dtype=np.float32)
        not_finite = 0
        for start, values in _chunks(header, stream, position):
            flat[start : start + values.size] = values
            if values.dtype.kind == "f":
                not_finite += values.size - int(np.isfinite(flat[start : start + values.size]).sum())
    _refuse_nonfinite(header, not_finite)
    array = flat.reshape((*header.grid.shape, header.num_channels), order="F")
    return Volume(np.moveaxis(array, -1, 0), header.grid, notes=header.notes)


def read_channels(path: Path, reading: Reading = STRICT) -> Iterator[Volume]:
    """As `read_image`, but one channel (i, j, k) after the other: only that one is held."""
    with _opened(path, reading) as (header, stream, position):
        flat, filled = np.empty(math.prod(header.grid.shape), dtype=np.float32), 0
        for _, values in _chunks(header, stream, position):
            while values.size:
                part, values = np.split(values, [flat.size - filled])
                flat[filled : filled + part.size] = part
                filled += part.size
                if filled == flat.size:
                    _refuse_nonfinite(header, flat.size - int(np.isfinite(flat).sum()))
                    yield Volume(flat.reshape(header.grid.shape, order="F"), header.grid, notes=header.notes)
                    flat, filled = np.empty_like(flat), 0


def read_label(path: Path, reading: Reading = STRICT) -> Volume:
    """Read a label map: (i, j, k), the values and the type of the file (float64 where the header scales them).

    Raises:
        MedsegError: as `read_header`; E_4D; E_TRUNCATED.
    """
    with _opened(path, reading) as (header, stream, position):
        if header.num_channels > 1:
            raise _four_d(header, "write one label map with one id per class")
        native = header.dtype.newbyteorder("=")
        flat = np.empty(math.prod(header.file_shape), dtype=np.float64 if header.scale else native)
        for start, values in _chunks(header, stream, position):
            flat[start : start + values.size] = values
    return Volume(flat.reshape(header.grid.shape, order="F"), header.grid, notes=header.notes)


def write(path: Path, array: NDArray[Any], grid: Grid, *, names: Mapping[int, str] | None = None) -> None:
    """Write (i, j, k) or (i, j, k, C), whole or not at all.

    Args:
        path: ends in .nii or .nii.gz.
        array: the voxels, in the type of the file.
        grid: where they lie.
        names: of a label map, value → name of the class, without the background; they go into extensions of the header.
    Raises:
        MedsegError: E_OUTPUT.
    """
    image = placed(array, grid)
    if names:
        image.header.extensions.extend(nib.nifti1.Nifti1Extension(code, names_extension(names)) for code in CODES)
    with whole_file(path, ".nii.gz" if path.name.lower().endswith(".gz") else ".nii") as temporary:
        nib.save(image, temporary)


def placed(array: NDArray[Any], grid: Grid) -> Any:
    """nibabel's image of an array; the grid in mm in sform and qform (code 1: scanner).

    The qform stays uncoded where a float32 quaternion cannot hold the affine (see `FORM_TOLERANCE_VOXELS`).
    """
    image = nib.Nifti1Image(array, grid.affine, dtype=array.dtype)
    header = image.header
    header.set_xyzt_units("mm")
    header["descrip"] = b"medseg"
    image.set_sform(grid.affine, code=1)
    image.set_qform(grid.affine, code=1)
    if disagreement_mm(header, grid.shape) > FORM_TOLERANCE_VOXELS * min(grid.spacing_mm):
        image.set_qform(None)
    return image


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[tuple[Header, IO[bytes], int]]:
    """A file's header as `read_header` gives it, its stream, and how much of that has been read."""
    is_pair = path.name.lower().endswith((".hdr", ".hdr.gz", ".img", ".img.gz"))
    head_path, data_path = _pair(path) if is_pair else (path, path)
    with ExitStack() as files:
        try:
            stream = files.enter_context(open_stream(head_path))
            raw, position = _parse(stream, head_path)
            magic = bytes(raw["magic"].tobytes())[:3]
            _check_magic(magic, path, is_alone=head_path == data_path)
            if magic in SINGLE_MAGIC:
                data_path = head_path
            elif data_path != head_path:
                stream, position = files.enter_context(open_stream(data_path)), 0
            file_bytes = data_path.stat().st_size
        except DAMAGED as error:
            raise _truncated(path, error) from error
        at_least = int(raw["sizeof_hdr"]) if data_path == head_path else 0
        dtype, shape, offset = _dtype(raw, path), _shape(raw, path), _offset(raw, path, at_least)
        compressed = is_inflating(stream)
        room = file_bytes if compressed else max(file_bytes - offset, 0)
        check_size(shape, dtype.itemsize, room, where=path.name, compressed=compressed)
        grid, notes = placed_by(raw, shape[:3], path, reading)
        yield Header(path, grid, shape, dtype, offset, _scale(raw), notes), stream, position


def _check_magic(magic: bytes, path: Path, *, is_alone: bool) -> None:
    """Refuse what is not NIfTI, and the header of a pair without a name that tells of the other half."""
    if magic in PAIR_MAGIC and is_alone:
        raise MedsegError(
            Code.MISSING,
            "the file is the header half of a pair, under a name that does not tell where the other half is",
            where=path.name,
            expected="a name that ends in .hdr",
            got=f"a pair's magic {magic.decode('ascii', 'replace')!r} under the ending {path.suffix or 'none'}",
            remedy="name the two halves <name>.hdr and <name>.img",
        )
    if magic not in PAIR_MAGIC + SINGLE_MAGIC:
        raise MedsegError(
            Code.NO_GEOMETRY,
            "Analyze 7.5 files do not say where the patient's left is",
            where=path.name,
            expected=f"a NIfTI magic, one of {[m.decode() for m in SINGLE_MAGIC + PAIR_MAGIC]}",
            got=magic,
            remedy="convert the original DICOM files to NIfTI",
        )


def _pair(path: Path) -> tuple[Path, Path]:
    """The .hdr and the .img that belong to either of them."""
    name = path.name
    ending = ".gz" if name.lower().endswith(".gz") else ""
    stem = name[: len(name) - len(ending) - len(".hdr")]
    halves = [
        path if name.lower().endswith(h + ending) else path.with_name(stem + h + ending) for h in (".hdr", ".img")
    ]
    for half in halves:
        if not half.is_file():
            raise MedsegError(
                Code.MISSING,
                "half of a NIfTI pair is missing",
                where=path.name,
                expected=half.name,
                got=f"{path.name} alone",
                remedy="copy both files, the .hdr and the .img, into the folder",
            )
    return halves[0], halves[1]


def _parse(stream: IO[bytes], path: Path) -> tuple[Any, int]:
    """nibabel's header object, and its size."""
    start = stream.read(min(HEADER_BYTES))
    order: Literal["little", "big"] = "little" if int.from_bytes(start[:4], "little") in HEADER_BYTES else "big"
    size = int.from_bytes(start[:4], order)
    if size in HEADER_BYTES:
        start += stream.read(size - len(start))
    if size not in HEADER_BYTES or len(start) < size:
        raise MedsegError(
            Code.TRUNCATED,
            "the file has no whole NIfTI header",
            where=path.name,
            expected=f"at least {min(HEADER_BYTES)} bytes that begin with the size of the header",
            got=f"{len(start)} bytes",
            remedy="copy or download the file again",
        )
    return HEADER_BYTES[size](start, "<" if order == "little" else ">", check=False), size


def _dtype(header: Any, path: Path) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
        known = dtype.kind in "iuf" and dtype.itemsize > 0
    except (HeaderDataError, KeyError):
        known = False
    if not known:
        raise MedsegError(
            Code.UNSUPPORTED,
            "voxels of this type are not read",
            where=path.name,
            expected="integers or floats",
            got=f"NIfTI datatype {int(header['datatype'])}",
            remedy="convert colour or complex voxels to one number per voxel and channel",
        )
    return dtype


def _shape(header: Any, path: Path) -> tuple[int, ...]:
    """At least three dimensions; an empty 4th before a 5th is left out."""
    rank = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : 1 + rank]) if 2 <= rank <= 7 else ()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4):
        raise MedsegError(
            Code.FOUR_D if len(shape) > 4 else Code.UNSUPPORTED,
            "the number of dimensions is not read",
            where=path.name,
            expected="2 or 3, and one more for channels",
            got=[int(n) for n in header["dim"]],
            remedy="split the file into volumes",
        )
    return shape


def _offset(header: Any, path: Path, at_least: int) -> int:
    offset = float(header["vox_offset"])
    if not at_least <= offset <= MAX_EXTENSION_BYTES:
        if offset == 0:  # single files of careless writers: the voxels follow the header and its extension flag
            return at_least + 4
        raise MedsegError(
            Code.LIMIT,
            "the header places the voxels outside the file",
            where=path.name,
            expected=f"vox_offset from {at_least} to {MAX_EXTENSION_BYTES}",
            got=offset,
            remedy="get the file again from its source",
        )
    return int(offset)


def _scale(header: Any) -> tuple[float, float] | None:
    """(slope, intercept); a slope of 0 or NaN means "not set" (NIfTI-1 standard, "data scaling")."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return None
    intercept = intercept if math.isfinite(intercept) else 0.0
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _chunks(header: Header, stream: IO[bytes], position: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first flat index, scaled values) until the end of the array; then the stream is checked to its end.

    Args:
        header: of the file.
        stream: with the voxels.
        position: how much of it has been read.
    """
    total = math.prod(header.file_shape)
    try:
        _read_exactly(stream, header.offset - position, header.path)
        for start in range(0, total, CHUNK_VOXELS):
            count = min(CHUNK_VOXELS, total - start)
            values = np.frombuffer(
                _read_exactly(stream, count * header.dtype.itemsize, header.path), dtype=header.dtype
            )
            if header.scale is not None:
                values = values.astype(np.float64) * header.scale[0] + header.scale[1]
            yield start, values
        # only the end of the stream verifies the checksum
        if is_inflating(stream) and len(stream.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
            raise MedsegError(
                Code.LIMIT,
                "the compressed file holds far more than its header declares",
                where=header.path.name,
                expected=f"the end of the stream after shape {header.file_shape}",
                got=f"more than {MAX_TRAILING_BYTES} further bytes",
                remedy="get the file again from its source",
            )
    except DAMAGED as error:
        raise _truncated(header.path, error) from error


def _read_exactly(stream: IO[bytes], count: int, path: Path) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise _truncated(path, f"{count - len(data)} bytes are missing")
    return data


def _refuse_nonfinite(header: Header, count: int) -> None:
    if count:
        raise MedsegError(
            Code.NONFINITE,
            "the image holds NaN or infinite voxels",
            where=header.path.name,
            expected="finite values",
            got=f"{count} of {math.prod(header.file_shape)} voxels",
            remedy="replace them, for example by the value of air or the background",
        )


def _truncated(path: Path, reason: object) -> MedsegError:
    return MedsegError(
        Code.TRUNCATED,
        "the file ends too early or fails its checksum",
        where=path.name,
        expected="all voxels that the header declares, and a checksum that holds",
        got=reason,
        remedy="copy or download the file again",
    )


def _four_d(header: Header, remedy: str) -> MedsegError:
    return MedsegError(
        Code.FOUR_D,
        "the file holds several volumes",
        where=header.path.name,
        expected="one volume",
        got=f"shape {header.file_shape}",
        remedy=remedy,
    )
