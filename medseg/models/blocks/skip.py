"""Skips: what comes up from below merged with what comes across from the encoder.

A skip knows the channels that result, so that no other block has to know how it merges.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from medseg.errors import Code, MedsegError

Skip = Literal["concat", "add", "none"]


class SkipBlock(nn.Module):
    """Merges (N, up_channels, *spatial) with (N, across_channels, *spatial'), cut to the same size at its centre.

    Args:
        up_channels: channels of what comes up.
        across_channels: channels of what comes across.
        stage: number of the decoder's stage, 0 is the highest resolution; for messages.
    """

    def __init__(self, up_channels: int, across_channels: int, *, stage: int) -> None:
        super().__init__()
        self.out_channels = self._merged_channels(up_channels, across_channels, stage)

    def forward(self, up: Tensor, across: Tensor) -> Tensor:
        """The merged maps, (N, out_channels, *spatial) with the size of `up`."""
        return self._merge(up, centre_crop(across, up.shape[2:]))

    def _merged_channels(self, up_channels: int, across_channels: int, stage: int) -> int:
        raise NotImplementedError

    def _merge(self, up: Tensor, across: Tensor) -> Tensor:
        raise NotImplementedError


class Concatenation(SkipBlock):
    """Stacks the channels: first those from across, then those from below."""

    def _merged_channels(self, up_channels: int, across_channels: int, stage: int) -> int:
        return up_channels + across_channels

    def _merge(self, up: Tensor, across: Tensor) -> Tensor:
        return torch.cat((across, up), dim=1)


class Addition(SkipBlock):
    """Adds the maps; both must have the same number of channels."""

    def _merged_channels(self, up_channels: int, across_channels: int, stage: int) -> int:
        if up_channels != across_channels:
            raise MedsegError(
                Code.MODEL,
                f"the skip of stage {stage} cannot add maps with different numbers of channels",
                where="model.skip",
                expected=f"{across_channels} channels from below, as many as come across",
                got=f"{up_channels} channels from below",
                remedy="choose skip: concat, or an up-sampling that changes the channels (transposed, "
                "interpolation_convolution)",
            )
        return up_channels

    def _merge(self, up: Tensor, across: Tensor) -> Tensor:
        return up + across


class NoSkip(SkipBlock):
    """Nothing comes across: the decoder has what the bottleneck holds, as that of an autoencoder."""

    def forward(self, up: Tensor, across: Tensor) -> Tensor:
        """What comes up."""
        return up

    def _merged_channels(self, up_channels: int, across_channels: int, stage: int) -> int:
        return up_channels


_SKIPS: dict[Skip, type[SkipBlock]] = {"concat": Concatenation, "add": Addition, "none": NoSkip}


def make_skip(name: Skip, up_channels: int, across_channels: int, *, stage: int) -> SkipBlock:
    """A skip by name.

    Raises:
        MedsegError: E_MODEL if "add" would meet different numbers of channels; names the stage and both numbers.
    """
    return _SKIPS[name](up_channels, across_channels, stage=stage)


def centre_crop(x: Tensor, size: torch.Size) -> Tensor:
    """The middle of (N, C, *spatial) with the given spatial size; a view."""
    for dim, length in enumerate(size, start=2):
        # The gradient of a cut is a map of zeros with a copy in it, and not in channels-last: not where nothing is cut.
        if x.shape[dim] != length:
            x = x.narrow(dim, (x.shape[dim] - length) // 2, length)
    return x
