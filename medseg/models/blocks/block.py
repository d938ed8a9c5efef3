"""What every block knows of itself, and blocks in a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from medseg.errors import Code, MedsegError


class Block(nn.Module):
    """A part of a network: (N, C, *spatial) → (N, out_channels, *spatial')."""

    out_channels: int
    """K: the channels that it returns."""

    def output_length(self, length: int, axis: int) -> int:
        """Length of the output along a spatial axis, given that of the input. Axes do not depend on each other.

        Args:
            length: voxels of the input along the axis.
            axis: spatial axis, 0 is the first after the channels.
        Raises:
            MedsegError: E_MODEL if the length does not fit.
        """
        raise NotImplementedError


class Stack(Block, nn.Sequential):
    """Blocks, one after the other; none at all is the identity.

    Args:
        blocks: in the order in which they run.
        in_channels: channels of the input, which are those of the output if there is no block.
    """

    def __init__(self, blocks: Iterable[Block], in_channels: int) -> None:
        blocks = list(blocks)
        super().__init__(*blocks)
        self.out_channels = blocks[-1].out_channels if blocks else in_channels

    def output_length(self, length: int, axis: int) -> int:
        """Length after the last block."""
        for block in self:
            length = cast(Block, block).output_length(length, axis)
        return length


def convolved_length(length: int, kernel: int, stride: int, padding: int) -> int:
    """Length after a convolution or pooling: floor((length + 2P − F) / S) + 1.

    Raises:
        MedsegError: E_MODEL if nothing is left.
    """
    result = (length + 2 * padding - kernel) // stride + 1
    if result < 1:
        raise MedsegError(
            Code.MODEL, "the image is smaller than a filter", expected=f"at least {kernel - 2 * padding}", got=length
        )
    return result
