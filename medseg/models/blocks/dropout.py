"""Dropout."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.models.blocks.block import Block


class Dropout(Block):
    """Sets each number to zero with a probability while training, and scales the others up.

    Args:
        channels: K, unchanged.
        probability: of zero; 0 changes nothing.

    Source:
        Srivastava et al., JMLR 2014. Single numbers are dropped, not whole channels, as in the U-Net of 2015.
    """

    def __init__(self, channels: int, probability: float) -> None:
        super().__init__()
        self.out_channels = channels
        self.dropout = nn.Dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, *spatial), unchanged while predicting."""
        result: Tensor = self.dropout(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """Unchanged."""
        return length
