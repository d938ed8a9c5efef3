"""From the last feature map to class scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError


class ClassificationHead(nn.Module):
    """The mean of each map, or all places of all maps, then fully connected layers with ReLU and dropout between them.

    Args:
        in_channels: C of the last map.
        num_classes: scores.
        window: size of the last map, whose places each have weights of their own; None takes the mean of each map.
        hidden: K of the fully connected layers in front of the scores.
        dropout: probability, before the scores and between the layers.

    Source:
        Lin et al., Network in Network, ICLR 2014, section 3.2, for the mean of each map (global average pooling).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        window: tuple[int, ...] | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.window = window
        inputs = [in_channels * math.prod(window or (1,)), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(c, k) for c, k in zip(inputs, hidden, strict=False))
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(inputs[-1], num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, num_classes).

        Raises:
            MedsegError: E_MODEL for a map of another size than `window`.
        """
        if self.window is None:
            x = maps.mean(dim=tuple(range(2, maps.dim())))
        else:
            if not torch.compiler.is_compiling() and tuple(maps.shape[2:]) != self.window:
                raise MedsegError(
                    Code.MODEL,
                    "fully connected layers over places take images of one size",
                    where="model.image_size",
                    expected=f"images that leave maps of {self.window}",
                    got=f"maps of {tuple(maps.shape[2:])}",
                    remedy="resample the images to the size that the network was made for, or take model.head=average",
                )
            x = maps.flatten(1)
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        if not self.hidden:
            x = self.dropout(x)
        scores: Tensor = self.scores(x)
        return scores
