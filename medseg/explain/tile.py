"""A piece of a user's scan as the network sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medseg.bundle import BundleInfo
from medseg.data.cases import load_image
from medseg.data.inputs import find_inputs
from medseg.data.prepared import cut
from medseg.data.preprocess import prepare_image
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading


@dataclass(frozen=True, eq=False)
class Scene:
    """A prepared scan and the place in it that is looked at.

    Args:
        image: the whole scan as the network sees it, float32, shape (C, *S).
        place: voxel of it that lies in the middle.
    """

    image: Tensor
    place: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, info: BundleInfo, at: Sequence[float] | None = None, reading: Reading = STRICT) -> Scene:
        """Read and prepare a scan.

        Args:
            path: one scan: a file, a DICOM series or a zip of one.
            info: the model.
            at: voxel of the scan, in the order in which its file stores it; None is the middle.
            reading: what is asked of the readers.
        Raises:
            MedsegError: E_NO_CASES if it is not one scan; E_CONFIG for a place outside of it; what readers refuse.
        """
        cases = find_inputs([path], channels=info.channels, modality=info.modality, reading=reading)
        if len(cases) != 1:
            raise MedsegError(
                Code.NO_CASES, "this is not one scan", where=path, expected="one case",
                got=", ".join(case.case_id for case in cases[:5]), remedy="name the file of one of them",
            )  # fmt: skip
        volume = load_image(cases[0], channels=info.channels, reading=reading)
        image, grid = prepare_image(volume, info.plan)
        if at is None:
            return cls(image, tuple(n // 2 for n in image.shape[1:]))
        shape = volume.grid.shape
        if len(at) != len(shape) or not all(0 <= i < n for i, n in zip(at, shape, strict=True)):
            raise MedsegError(
                Code.CONFIG, "this place lies outside of the scan", where="--at",
                expected=f"{len(shape)} numbers, from 0 on and below {shape}", got=tuple(at),
            )  # fmt: skip
        index = np.rint(grid.to_index(volume.grid.to_world(np.asarray(at, dtype=np.float64))))
        place = tuple(int(min(max(i, 0), n - 1)) for i, n in zip(index, image.shape[1:], strict=True))
        return cls(image, place)

    def start(self, size: Sequence[int]) -> tuple[int, ...]:
        """First voxel of a tile around the place, inside the scan as far as it is large enough."""
        return start_around(self.place, size, self.image.shape[1:])

    def tile(self, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The tile around the place, (C, *size); zeros beyond the scan."""
        return cut(self.image, self.start(size), size).to(device)

    def depth(self, size: Sequence[int]) -> float | None:
        """Where the place lies along the first axis of its tile, as a share; None in 2D."""
        return (self.place[0] - self.start(size)[0] + 0.5) / size[0] if len(size) == 3 else None


def start_around(place: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """First voxel of a tile.

    Args:
        place: voxel that is to lie in its middle.
        size: of the tile.
        shape: of the scan; the tile lies inside of it as far as it is large enough.
    """
    starts = []
    for at, length, n in zip(place, size, shape, strict=True):
        starts.append(min(max(at - length // 2, 0), n - length) if n >= length else (n - length) // 2)
    return tuple(starts)
