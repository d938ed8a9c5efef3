"""A labelled case as the network sees it, wherever its arrays lie, and boxes cut out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.volume import Grid


class Boxes(Protocol):
    """An array that boxes are read from: a tensor in memory, or a stored one (`medseg.data.stored_array`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each axis."""
        ...

    @property
    def ndim(self) -> int:
        """Number of axes."""
        ...

    def __getitem__(self, box: Any, /) -> torch.Tensor: ...


class Positions(Protocol):
    """Voxels of one class: their number, and one after the other its position along each axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> NDArray[np.int32]: ...


class PreparedCase:
    """A labelled case as the network sees it.

    Args:
        case_id: the case.
        image: float32, shape (C, *S), normalised, on `grid`.
        label: uint8 class indices, shape (*S).
        grid: the grid that the network sees.
        locations: for each class index voxel positions of it, int32 (n, dims); empty for absent classes.
    """

    def __init__(self, case_id: str, image: Boxes, label: Boxes, grid: Grid, locations: Sequence[Positions]) -> None:
        self.case_id = case_id
        self.grid = grid
        self.locations = locations
        self._image = image
        self._label = label

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis of `grid`."""
        return self.grid.shape

    @property
    def num_channels(self) -> int:
        """Channels of the image."""
        return self._image.shape[0]

    @property
    def in_memory(self) -> bool:
        """Whether its arrays are tensors in memory, not read from the store."""
        return isinstance(self._image, torch.Tensor)

    @property
    def image(self) -> torch.Tensor:
        """All of the image: float32 (C, *S)."""
        return self._image[...]

    @property
    def label(self) -> torch.Tensor:
        """All of the label: uint8 (*S)."""
        return self._label[...]

    def cut(
        self, start: Sequence[int], size: Sequence[int], *, mirror: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A box of image and label, (C, *size) and (*size), filled up as by `cut`. Of a stored case only what the box
        holds is read."""
        return cut(self._image, start, size, mirror=mirror), cut(self._label, start, size, mirror=mirror)


def cut(array: Boxes, start: Sequence[int], size: Sequence[int], *, mirror: bool = False) -> torch.Tensor:
    """A box of an array, filled up where it reaches over the border.

    Args:
        array: shape (..., *S).
        start: first voxel along each spatial axis, may be negative.
        size: voxels of the box along each spatial axis.
        mirror: fill by reflection; otherwise with zeros.
    Returns:
        shape (..., *size); of a tensor a view where nothing had to be filled.
    """
    lead = array.ndim - len(size)
    shape = array.shape[lead:]
    if all(s >= 0 and s + n <= m for s, n, m in zip(start, size, shape, strict=True)):
        return array[(..., *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]
    if mirror:
        indices = [_reflected(s, n, m) for s, n, m in zip(start, size, shape, strict=True)]
        lows = [int(index.min()) for index in indices]
        part = array[(..., *(slice(low, int(i.max()) + 1) for low, i in zip(lows, indices, strict=True)))]
        for axis, (index, low) in enumerate(zip(indices, lows, strict=True), start=lead):
            part = part.index_select(axis, torch.from_numpy(index - low).to(part.device))
        return part
    source: list[slice] = []
    target: list[slice] = []
    for s, n, m in zip(start, size, shape, strict=True):
        low, high = max(s, 0), max(min(s + n, m), max(s, 0))
        source.append(slice(low, high))
        target.append(slice(low - s, high - s))
    part = array[(..., *source)]
    box = part.new_zeros((*part.shape[:lead], *size))
    inside: tuple[Any, ...] = (..., *target)
    box[inside] = part
    return box


def _reflected(start: int, size: int, length: int) -> NDArray[np.intp]:
    """Indices start … start+size-1 folded into 0 … length-1 without repeating the border voxel."""
    period = max(2 * (length - 1), 1)
    index = np.abs(np.arange(start, start + size)) % period
    return np.where(index >= length, period - index, index)
