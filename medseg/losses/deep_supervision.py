"""One loss over the outputs of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class DeepSupervision(nn.Module):
    """Applies a loss to every output of a network, weighted 1, ½, ¼, … (normalised) from the finest on.

    The target is cropped to the middle where the finest output is smaller (padding "valid") and taken down to coarser
    outputs by nearest neighbour.

    Source:
        Isensee et al., nnU-Net, Nature Methods 2021. There the coarsest output has weight 0; here every head learns.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, *S) or a list of them, finest first; class indices (N, *P) → scalar."""
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        weights = [0.5**level for level in range(len(outputs))]
        target = centre_crop(target, outputs[0].shape[2:])
        total = outputs[0].new_zeros((), dtype=torch.float32)
        for weight, logits in zip(weights, outputs, strict=True):
            size = logits.shape[2:]
            level_target = target
            if size != target.shape[1:]:
                level_target = F.interpolate(target.unsqueeze(1).float(), size=size, mode="nearest").squeeze(1)
            total = total + weight / sum(weights) * self.loss(logits, level_target)
        return total


def centre_crop(array: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle `size` voxels of the last axes of an array."""
    box = [slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(array.shape[-len(size) :], size, strict=True)]
    cropped: torch.Tensor = array[(..., *box)]  # type: ignore[index]
    return cropped
