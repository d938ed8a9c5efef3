"""Steps down that have no weights: none at all, and pooling.

A factor is the stride S of the step, one number per axis; 1 leaves an axis as it is. An axis can only be divided
evenly, so that up-sampling meets the size that it left.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models.blocks.block import Block
from medseg.models.blocks.dimensions import layers


class DownBlock(Block):
    """A step down."""

    num_convolutions: int
    """How many convolutions it holds: they count towards those of the stage that it opens."""


class NoDown(DownBlock):
    """The start of a network: nothing is done.

    Args:
        channels: C = K.
    """

    num_convolutions = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    def output_length(self, length: int, axis: int) -> int:
        """Unchanged."""
        return length


class Pool(DownBlock):
    """The largest or the mean value of each window; filter size F = stride S, the channels stay.

    Args:
        kind: "max_pool" or "average_pool".
        channels: C = K.
        stride: S per axis.
    """

    num_convolutions = 0

    def __init__(self, kind: Literal["max_pool", "average_pool"], channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stride = stride
        table = layers(len(stride))
        self.pool = table.max_pool(stride) if kind == "max_pool" else table.average_pool(stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, C, *spatial / S)."""
        result: Tensor = self.pool(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return divided(length, self.stride[axis])


class IndexedPool(DownBlock):
    """Max-pooling that tells where each value stood, for `Unpool` to put it back there.

    Args:
        channels: C = K.
        stride: S per axis, also the size of the windows.

    Source:
        Badrinarayanan, Kendall, Cipolla: SegNet, TPAMI 2017, section 3 and figure 3.
    """

    num_convolutions = 0

    def __init__(self, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stride = stride
        self.pool = layers(len(stride)).max_pool(stride, return_indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, *spatial) → the largest values, (N, C, *spatial / S), and the places that they come from (int64)."""
        values, places = self.pool(x)
        return values, places

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return divided(length, self.stride[axis])


class Unpool(Block):
    """Puts values back where `IndexedPool` found them; all other voxels are 0.

    Args:
        channels: C = K, those of the pooling.
        stride: S per axis, that of the pooling.
    """

    def __init__(self, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stride = stride
        self.unpool = layers(len(stride)).max_unpool(stride)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """(N, C, *spatial) and their places → (N, C, *spatial · S)."""
        result: Tensor = self.unpool(x, places)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length · S."""
        return length * self.stride[axis]


def divided(length: int, stride: int) -> int:
    """length / S.

    Raises:
        MedsegError: E_MODEL where it cannot be divided evenly.
    """
    if length % stride:
        raise MedsegError(
            Code.MODEL, "a length cannot be divided evenly", expected=f"a multiple of {stride}", got=length
        )
    return length // stride
