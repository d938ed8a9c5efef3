"""Arrays on disk in compressed chunks, of which boxes are read (Blosc2, one .b2nd file for each array).

**Values.** An image is stored as whole multiples of a power of two that is at most 1/512 of its standard deviation, and
at most 1/512: `rounded` moves a value by at most 1/1024 of either (only where values reach beyond 2³⁰ such steps, by
2⁻³¹ of the largest). Half as many bits as float32 hold that, noise that nobody can tell apart is not stored, and unlike
float16's the error does not grow with the value. Rounding is part of preparing a case, whether it is stored or not, so
that a training sees the same values wherever they come from; storing itself loses nothing.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError

STEPS_PER_UNIT = 512
"""Steps of a rounded image in one standard deviation, at least; 2 to a power."""
BLOCK = {2: 128, 3: 32}
"""Edge of a block in voxels, by number of axes, about: what is decompressed at a time. Half a usual patch."""
CHUNK = {2: 4, 3: 2}
"""Blocks along an edge of a chunk, by number of axes: what is found in the file by one look."""
LEVEL = 1
"""Of Zstandard, the fastest."""
_WIDEST = 2**30
"""Most steps that a value may be from 0: the codes of wide images have 32 bits."""
MAX_OPEN = 128
"""Arrays that are kept open at a time: each holds a file of the few (often 1024) that a process may have."""


def rounded(image: NDArray[np.float32]) -> tuple[NDArray[np.integer[Any]], tuple[float, ...]]:
    """Round an image in place to what is stored.

    Args:
        image: shape (C, *S); rounded when this returns.
    Returns:
        Whole numbers (C, *S) in 16 or, where values reach further than 32 deviations, 32 bits; and for each channel the
        step, a power of two, that they are multiples of.
    """
    steps, codes = [], np.empty(image.shape, dtype=np.int16)
    wide: NDArray[np.int32] | None = None
    for channel, values in enumerate(image):
        low, high = float(values.min()), float(values.max())
        largest = max(-low, high)
        deviation = float(values.std(dtype=np.float64)) if values.size <= 1 << 22 else _deviation(values)
        scale = min(deviation, 1.0) or min(largest / 32, 1.0) or 1.0  # a constant image has no deviation
        step = 2.0 ** (math.floor(math.log2(scale))) / STEPS_PER_UNIT
        if largest / step > _WIDEST:  # quantities without a normalisation: 30 bits are more than float32 holds
            step = 2.0 ** math.ceil(math.log2(largest / _WIDEST))
        values *= np.float32(1 / step)
        np.rint(values, out=values)
        if wide is None and largest / step > np.iinfo(np.int16).max:
            wide = codes.astype(np.int32)
        target = codes if wide is None else wide
        target[channel] = values
        values *= np.float32(step)
        steps.append(step)
    return codes if wide is None else wide, tuple(steps)


def _deviation(values: NDArray[np.float32]) -> float:
    """The standard deviation, a few planes at a time: numpy's own makes a copy of all in float64."""
    mean = math.fsum(float(plane.sum(dtype=np.float64)) for plane in values) / values.size
    squares = math.fsum(float(np.square(plane - mean, dtype=np.float64).sum()) for plane in values)
    return math.sqrt(squares / values.size)


def block_edges(patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks for patches of this size: flat along the axes where these are."""
    return tuple(1 if n == 1 else BLOCK[len(patch_size)] for n in patch_size)


def compressed(array: NDArray[np.integer[Any]], blocks: tuple[int, ...]) -> bytes:
    """The content of a .b2nd file.

    Args:
        array: shape (..., *S); leading axes are chunked one by one.
        blocks: voxels of a block along the axes of S, about.
    """
    import blosc2

    lead = (1,) * (array.ndim - len(blocks))
    sizes = array.shape[len(lead) :]
    # Even parts, for Blosc2 fills the last block and chunk up: 35 voxels are one block and not two of 32
    edges = [-(-n // max(1, round(n / b))) if b > 1 else 1 for b, n in zip(blocks, sizes, strict=True)]
    chunks = [min(n, CHUNK[len(blocks)] * e) if e > 1 else 1 for e, n in zip(edges, sizes, strict=True)]
    stored = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(*lead, *chunks),
        blocks=(*lead, *edges),
        # One thread: Blosc2 would make its own beside ours, and cases go in parallel anyway
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": LEVEL, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
        dparams={"nthreads": 1},
    )
    content: bytes = stored.to_cframe()
    return content


class StoredArray:
    """An array in a .b2nd file; indexing it reads a box.

    Args:
        path: the file, checked already.
        shape: of the array.
        steps: for each index of the first axis what its whole numbers are multiples of: read as float32. None: read as
            they are.
        case_id: whose it is, for messages.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], steps: tuple[float, ...] | None, case_id: str) -> None:
        self.path = path
        self.shape = shape
        self.ndim = len(shape)
        self.case_id = case_id
        self._steps = None if steps is None else np.array(steps, np.float32).reshape(-1, *(1,) * (self.ndim - 1))

    def __getitem__(self, box: Any, /) -> torch.Tensor:
        """A box: `...`, or a tuple of slices of step 1 behind `...`."""
        slices = () if box is ... else tuple(s for s in box if s is not ...)
        whole = (slice(0, n) for n in self.shape[: self.ndim - len(slices)])
        values = _read(self.path, (*whole, *slices), self.case_id)
        return torch.from_numpy(values if self._steps is None else np.multiply(values, self._steps, dtype=np.float32))


_open: OrderedDict[Path, Any] = OrderedDict()
_lock = threading.Lock()


def _read(path: Path, box: tuple[slice, ...], case_id: str) -> NDArray[Any]:
    """Read a box. Files stay open, the latest `MAX_OPEN` of them, and one is read at a time: Blosc2's arrays are not
    made for several threads."""
    with _lock:
        array = _open.get(path)
        if array is None:
            array = _opened(path, case_id)
            _open[path] = array
            if len(_open) > MAX_OPEN:
                _open.popitem(last=False)
        _open.move_to_end(path)
        values: NDArray[Any] = array[box]
    return values


def _opened(path: Path, case_id: str) -> Any:
    import blosc2

    try:
        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
    except (OSError, RuntimeError, ValueError) as error:
        raise MedsegError(
            Code.MISSING,
            "a prepared case is not in the store any more",
            where=case_id,
            got=type(error).__name__,
            remedy="do not delete the folder data.store while a run uses it; resume the run: it prepares what is gone",
        ) from error


def forget(folder: Path) -> None:
    """Close what is open of a folder."""
    with _lock:
        for path in [p for p in _open if p.parent == folder]:
            del _open[path]


class StoredPositions:
    """Voxel positions of one class in a file of all classes; what is asked for is read, nothing stays open.

    Args:
        path: flat indices of voxels (`index_type`), without a header, which would have to be parsed for each patch.
        rows: the entries of this class.
        shape: of the case.
        case_id: whose it is, for messages.
    """

    def __init__(self, path: Path, rows: range, shape: tuple[int, ...], case_id: str) -> None:
        self._path = path
        self._rows = rows
        self._shape = shape
        self._case_id = case_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any, /) -> NDArray[np.int32]:
        if not self._rows:
            none: NDArray[np.int32] = np.empty((0, len(self._shape)), np.int32)[index]
            return none
        kind = np.dtype(index_type(self._shape))
        try:
            table = np.memmap(self._path, kind, "r", self._rows.start * kind.itemsize, (len(self._rows),))
        except (OSError, ValueError) as error:  # ValueError: shorter than it was
            raise MedsegError(
                Code.MISSING,
                "a prepared case is not in the store any more",
                where=self._case_id,
                remedy="resume the run: it prepares what is gone",
            ) from error
        return positions_of(table[index], self._shape)


def index_type(shape: tuple[int, ...]) -> type[np.integer[Any]]:
    """What flat indices of a case's voxels are stored in."""
    return np.uint32 if math.prod(shape) <= 1 << 32 else np.int64


def positions_of(flat: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Flat indices of voxels as positions along each axis: int32 (..., dims)."""
    return np.stack(np.unravel_index(flat, shape), axis=-1).astype(np.int32)
