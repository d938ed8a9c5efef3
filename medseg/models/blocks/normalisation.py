"""Normalisations by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.models.blocks.dimensions import layers

Normalisation = Literal["batch", "instance", "group", "none"]

EPSILON = 1e-5
"""Added to the variance, as in nnU-Net (and torch's default)."""


class InstanceNorm(nn.Module):
    """Each channel of each image to mean 0 and variance 1, then a learnt scale and shift. Any number of axes.

    On a CPU each image goes through torch's batch normalisation alone: the same sum, in channels-last throughout, and
    faster than torch's own instance normalisation (scripts/bench_instance_norm.py).

    Source:
        Ulyanov et al., Instance Normalization, 2016, arXiv:1607.08022.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial)."""
        if x.is_cpu:
            images = [
                F.batch_norm(image, None, None, self.weight, self.bias, training=True, eps=EPSILON)
                for image in torch.split(x, 1)
            ]
            return images[0] if len(images) == 1 else torch.cat(images)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPSILON)

    def extra_repr(self) -> str:
        """Channels, for printing."""
        return f"{len(self.weight)}, eps={EPSILON}"


def make_normalisation(name: Normalisation, channels: int, spatial_dims: int, *, num_groups: int = 8) -> nn.Module:
    """A normalisation with learnt scale and shift.

    Args:
        name: which one; "none" changes nothing.
        channels: K.
        spatial_dims: 2 or 3.
        num_groups: groups of the group normalisation.
    Raises:
        MedsegError: E_MODEL if the channels cannot be divided into the groups.
    """
    match name:
        case "batch":
            return layers(spatial_dims).batch_norm(channels, eps=EPSILON)
        case "instance":
            return InstanceNorm(channels)
        case "group":
            if channels % num_groups:
                raise MedsegError(
                    Code.MODEL,
                    "the channels cannot be divided into the groups of the normalisation",
                    where="model.num_groups",
                    expected=f"a divisor of {channels}",
                    got=num_groups,
                )
            return nn.GroupNorm(num_groups, channels, eps=EPSILON)
        case "none":
            return nn.Identity()
