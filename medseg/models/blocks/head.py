"""From feature maps to class scores."""

from __future__ import annotations

from torch import Tensor

from medseg.models.blocks.block import Block
from medseg.models.blocks.dimensions import layers


class SegmentationHead(Block):
    """A convolution with filters of size 1: one score (logit) per class and voxel.

    The same head serves the result and, on coarser maps, deep supervision.

    Args:
        in_channels: C.
        num_classes: K, with the background.
        spatial_dims: 2 or 3.
    """

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.out_channels = num_classes
        self.convolution = layers(spatial_dims).convolution(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, num_classes, *spatial)."""
        logits: Tensor = self.convolution(x)
        return logits

    def output_length(self, length: int, axis: int) -> int:
        """Unchanged."""
        return length
