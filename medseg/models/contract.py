"""What every model promises, and the registry of models."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.errors import MedsegError
from medseg.registry import Registry

SIZES_TRIED = 8
"""Sizes that `next_size` looks at."""


class SegmentationModel(nn.Module):
    """A network from images to class scores. Built as `Model(config, *, in_channels, num_classes, spatial_dims)`."""

    in_channels: int
    """Channels of the images."""
    num_classes: int
    """Classes, with the background."""
    spatial_dims: int
    """2 or 3."""

    @property
    def divisor(self) -> tuple[int, ...]:
        """Per axis, what the input size must be a multiple of; without padding, the step between sizes that fit."""
        raise NotImplementedError

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result along each axis: that of the input, or smaller where convolutions are not padded.

        The result lies in the middle of the input.

        Args:
            input_size: voxels along each spatial axis.
        Raises:
            MedsegError: E_MODEL if the size does not fit; names the nearest that do.
        """
        raise NotImplementedError

    def next_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A size that fits: the next multiples of `divisor` from `size` on, enlarged until they do.

        Raises:
            MedsegError: E_MODEL if none of the next `SIZES_TRIED` does.
        """
        multiples = [-(-length // d) for length, d in zip(size, self.divisor, strict=True)]
        for more in range(SIZES_TRIED):
            size = tuple((m + more) * d for m, d in zip(multiples, self.divisor, strict=True))
            try:
                self.output_size(size)
            except MedsegError:
                if more == SIZES_TRIED - 1:
                    raise
            else:
                break
        return size

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores (logits).

        Args:
            x: shape (N, in_channels, *spatial).
        Returns:
            (N, num_classes, *output_size). While training with deep supervision a list, the highest resolution
            first.
        """
        raise NotImplementedError


MODELS: Registry[SegmentationModel] = Registry("model", "medseg.models")
"""All models by name."""
