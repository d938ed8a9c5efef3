"""Soft Dice and binary cross-entropy, for regions: classes that overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE_INDEX, Labels
from medseg.losses import LOSSES
from medseg.losses.processes import is_together, summed
from medseg.losses.soft_dice import soft_dice


@dataclass(frozen=True)
class DiceBCEConfig:
    """Settings of `DiceBCELoss`."""

    dice_weight: float = 1.0
    """Weight of the soft Dice part."""
    bce_weight: float = 1.0
    """Weight of the binary cross-entropy part."""
    batch_dice: bool = True
    """Sum overlaps over the batch before the ratio: small structures that a patch misses then cost nothing there."""
    smooth: float = 1e-5
    """Added to numerator and denominator of Dice."""

    def __post_init__(self) -> None:
        if self.dice_weight < 0 or self.bce_weight < 0 or self.dice_weight + self.bce_weight == 0:
            raise MedsegError(
                Code.CONFIG,
                "the weights of the loss must be at least 0 and not both 0",
                where="loss",
                got=f"dice_weight={self.dice_weight}, bce_weight={self.bce_weight}",
            )


@LOSSES.register("dice_bce", DiceBCEConfig)
class DiceBCELoss(nn.Module):
    """dice_weight · (1 − soft Dice) + bce_weight · binary cross-entropy of each region, computed in float32.

    The cross-entropy is the mean over regions and the voxels that count. Absent regions are treated as `soft_dice`
    treats classes.

    Args:
        config: the settings.
        labels: which classes make up a region.
    Raises:
        MedsegError: E_CONFIG if the labels have no regions.
    Source:
        Isensee et al., nnU-Net for brain tumor segmentation, BrainLes 2020. In nnU-Net's own code the cross-entropy
        is summed over the regions, not averaged, where a data set ignores voxels; here it always is the mean.
    """

    takes_regions = True
    membership: torch.Tensor

    def __init__(self, config: DiceBCEConfig, *, labels: Labels) -> None:
        super().__init__()
        if not labels.regions:
            raise MedsegError(
                Code.CONFIG,
                "dice_bce is for regions, and here every voxel has one class",
                where="loss=dice_bce",
                got=labels.to_json(),
                remedy="use loss=dice_ce; or make the classes regions by naming them in data.regions_order",
            )
        self.config = config
        self.ignores = bool(labels.ignore)
        table = torch.from_numpy(labels.membership()).float()
        self.register_buffer("membership", table, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (N, R, *S) in any float type and class indices (N, *S) → scalar float32."""
        logits = logits.float()
        inside = self.membership[target.long()].movedim(-1, 1)
        counted = (target != IGNORE_INDEX).unsqueeze(1).to(logits.dtype) if self.ignores else None
        loss = logits.new_zeros(())
        if self.config.bce_weight:
            loss = loss + self.config.bce_weight * _cross_entropy(logits, inside, counted)
        if self.config.dice_weight:
            probabilities = logits.sigmoid() if counted is None else logits.sigmoid() * counted
            dice = soft_dice(probabilities, inside, batch_dice=self.config.batch_dice, smooth=self.config.smooth)
            loss = loss + self.config.dice_weight * (1 - dice)
        return loss


def _cross_entropy(logits: torch.Tensor, inside: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    if counted is None and not is_together():
        return F.binary_cross_entropy_with_logits(logits, inside)
    total = F.binary_cross_entropy_with_logits(logits, inside, counted, reduction="sum")
    number = logits.new_tensor(float(logits.numel())) if counted is None else counted.sum() * logits.shape[1]
    total, number = summed(total, number)
    return total / number.clamp(min=1)
