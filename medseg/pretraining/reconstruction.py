"""How far a reconstruction is from the image: the loss of pretraining, and what its validations report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from medseg.losses.deep_supervision import centre_crop
from medseg.losses.processes import summed

Error = Literal["l1", "l2"]


class ReconstructionLoss(nn.Module):
    """The mean error of the voxels that count, over all of a batch; 0 where none does.

    Args:
        error: of a voxel: "l1", its size, or "l2", its square.
    """

    def __init__(self, error: Error) -> None:
        super().__init__()
        self.error = error

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Reconstruction (N, C, *Q) and `target_of` an image (N, C + 1, *P), of which the middle Q counts → scalar
        float32."""
        target = centre_crop(target, output.shape[2:])
        image, asked = target[:, :-1], target[:, -1:]
        difference = (output.float() - image) * asked  # what is not asked for has no gradient
        total = difference.abs().sum() if self.error == "l1" else difference.square().sum()
        total, count = summed(total, asked.sum() * image.shape[1])
        return total / count.clamp(min=1)


def target_of(image: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """What `ReconstructionLoss` compares with, as one tensor.

    Args:
        image: shape (N, C, *P).
        asked: 1 where the reconstruction counts, else 0; shape (N, 1, *P).
    """
    return torch.cat((image.float(), asked.float()), dim=1)


@dataclass
class Fit:
    """Sums over the voxels that counted: of parts of a data set they add up, whoever took them.

    Args:
        count: voxels, times channels.
        absolute: of the size of their errors.
        squared: of its squares.
        first: of their intensities.
        second: of the squares of these.
    """

    count: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def of(cls, output: torch.Tensor, target: torch.Tensor) -> Fit:
        """Of a reconstruction and its target, as `ReconstructionLoss` takes them."""
        target = centre_crop(target, output.shape[2:]).double()
        image, counts = target[:, :-1], target[:, -1:].bool().expand_as(target[:, :-1])
        values, error = image[counts], (output.double() - image)[counts]
        sums = (error.abs().sum(), error.square().sum(), values.sum(), values.square().sum())
        return cls(float(values.numel()), *(float(value) for value in sums))

    def __add__(self, other: Fit) -> Fit:
        return Fit(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def mean(self, error: Error) -> float:
        """The mean error of a voxel; NaN of none."""
        total = self.absolute if error == "l1" else self.squared
        return total / self.count if self.count else float("nan")

    @property
    def explained(self) -> float:
        """The share of the intensities' variance that the reconstruction explains: 1 for a perfect one, 0 for their
        mean, below it for worse; 0 for a constant image."""
        if not self.count:
            return 0.0
        variance = self.second - self.first**2 / self.count
        return 1 - self.squared / variance if variance > 1e-12 * max(self.second, 1e-12) else 0.0
