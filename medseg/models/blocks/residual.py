"""Residual block."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import make_activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dimensions import PerAxis


class ResidualBlock(Block):
    """activation(x + F(x)), where F is a row of convolutions.

    Each convolution has its normalisation and activation; the last one's activation comes after the sum.

    Args:
        channels: C = K, so that the sum needs no projection.
        style: padding (must be "same"), normalisation and activation.
        num_convolutions: how many stand in the row.
        kernel: F, the filter size.
    Raises:
        MedsegError: E_MODEL with other padding than "same": the sum would have nothing to match.

    Source:
        He et al., Deep Residual Learning, CVPR 2016, equation 1 with identity shortcut.
    """

    def __init__(
        self, channels: int, style: ConvolutionStyle, *, num_convolutions: int = 2, kernel: PerAxis = 3
    ) -> None:
        super().__init__()
        if style.padding != "same":
            raise MedsegError(
                Code.MODEL, "a residual block adds its input to its output", expected="padding same", got=style.padding
            )
        self.out_channels = channels
        styles = [style] * (num_convolutions - 1) + [replace(style, activation="linear")]
        self.convolutions = Stack((ConvolutionBlock(channels, channels, s, kernel=kernel) for s in styles), channels)
        self.activation = make_activation(style.activation, channels, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, *spatial) → the same shape."""
        result: Tensor = self.activation(x + self.convolutions(x))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """Unchanged."""
        return length
