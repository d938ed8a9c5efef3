"""How far a network keeps to what convolutions promise: the image moves by some voxels, and the result moves with it.

Pooling and strides break the promise for all shifts but their multiples, padding near the borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medseg.data.prepared import cut
from medseg.errors import Code, MedsegError
from medseg.explain.tracing import evaluating
from medseg.models import SegmentationModel

MIDDLE = 0.5
"""Share of each axis that counts as far from the borders."""


@dataclass(frozen=True)
class Shift:
    """What changes in the result when the image moves.

    Args:
        voxels: by how much along each axis.
        agreement: share of the voxels with the same class, where both results lie.
        difference: mean size of the difference of the scores, over their standard deviation.
        agreement_middle: the same in the middle of the axes, far from the borders.
        difference_middle: the same.
    """

    voxels: tuple[int, ...]
    agreement: float
    difference: float
    agreement_middle: float
    difference_middle: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "voxels": list(self.voxels)}


@torch.no_grad()
def shift_table(
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    shifts: Sequence[Sequence[int]],
    *,
    start: Sequence[int] | None = None,
    overlapping: bool = False,
) -> list[Shift]:
    """Compare the result of a tile with those of tiles that lie some voxels further in the same image.

    Nothing is rolled around or made up: the tiles are cut from the image (zeros beyond its border).

    Args:
        model: on the device of the image; its mode stays what it was.
        image: shape (C, *spatial), larger than the tile by the shifts at best.
        size: of the tile; must fit the model.
        shifts: voxels along each axis, not negative.
        start: first voxel of the tile; None puts it and the shifted ones in the middle.
        overlapping: the outputs are regions, each with a probability of its own.
    Raises:
        MedsegError: E_CONFIG for a shift that leaves nothing to compare; E_MODEL.
    """
    output = model.output_size(tuple(size))
    largest = [max((shift[axis] for shift in shifts), default=0) for axis in range(len(size))]
    if start is None:
        start = [(n - s - m) // 2 for n, s, m in zip(image.shape[1:], size, largest, strict=True)]
    if any(n <= 0 for shift in shifts for n in (*(o - v for o, v in zip(output, shift, strict=True)),)):
        raise MedsegError(
            Code.CONFIG, "shifted so far, nothing is left to compare", where="shift", expected=f"below {output}",
            got=[tuple(shift) for shift in shifts],
        )  # fmt: skip
    with evaluating(model):
        still = _scores(model, cut(image, start, size))
        return [
            _compare(
                still,
                _scores(model, cut(image, [a + v for a, v in zip(start, shift, strict=True)], size)),
                tuple(shift),
                overlapping,
            )
            for shift in shifts
        ]


def _scores(model: SegmentationModel, tile: Tensor) -> Tensor:
    logits = model(tile[None])
    return (logits if isinstance(logits, Tensor) else logits[0])[0].float()


def _compare(still: Tensor, moved: Tensor, voxels: tuple[int, ...], overlapping: bool) -> Shift:
    lengths = [n - v for n, v in zip(still.shape[1:], voxels, strict=True)]
    both = cut(still, voxels, lengths), cut(moved, (0,) * len(voxels), lengths)
    inner = [max(1, round(n * MIDDLE)) for n in lengths]
    middle = [(n - i) // 2 for n, i in zip(lengths, inner, strict=True)]
    parts = both, (cut(both[0], middle, inner), cut(both[1], middle, inner))
    (whole, difference), (inside, difference_inside) = (_agreement(a, b, overlapping) for a, b in parts)
    return Shift(voxels, whole, difference, inside, difference_inside)


def _agreement(a: Tensor, b: Tensor, overlapping: bool) -> tuple[float, float]:
    same = ((a > 0) == (b > 0)) if overlapping else (a.argmax(dim=0) == b.argmax(dim=0))
    spread = float(a.std(correction=0))
    difference = float((a - b).abs().mean())
    return float(same.float().mean()), difference / spread if spread > 0 else difference
