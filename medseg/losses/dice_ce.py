"""Soft Dice and cross-entropy, the field's default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.losses import LOSSES


@dataclass(frozen=True)
class DiceCEConfig:
    """Settings of `DiceCELoss`."""

    dice_weight: float = 1.0
    """Weight of the soft Dice part."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy part."""
    include_background: bool = False
    """Whether the background counts as a class in the Dice part."""
    batch_dice: bool = True
    """Sum overlaps over the batch before the ratio: small structures that a patch misses then cost nothing there."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class (background first) in the cross-entropy; null weighs all the same."""
    smooth: float = 1e-5
    """Added to numerator and denominator of Dice."""

    def __post_init__(self) -> None:
        if self.dice_weight < 0 or self.ce_weight < 0 or self.dice_weight + self.ce_weight == 0:
            raise MedsegError(
                Code.CONFIG,
                "the weights of the loss must be at least 0 and not both 0",
                where="loss",
                got=f"dice_weight={self.dice_weight}, ce_weight={self.ce_weight}",
            )


@LOSSES.register("dice_ce", DiceCEConfig)
class DiceCELoss(nn.Module):
    """dice_weight · (1 − soft Dice) + ce_weight · cross-entropy, computed in float32.

    A class that no voxel of the batch (of the sample, without `batch_dice`) carries is left out of the Dice mean: its
    Dice is undefined, and counting it would punish a perfect prediction. Cross-entropy still sees its false positives.

    Source:
        Milletari et al., V-Net, 3DV 2016 (soft Dice, without its squares); Isensee et al., nnU-Net, Nature Methods
        2021 (the sum). Absent classes differ from both.
    """

    def __init__(self, config: DiceCEConfig) -> None:
        super().__init__()
        self.config = config
        self.class_weights: torch.Tensor | None
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (N, C, *S) in any float type and class indices (N, *S) → scalar float32."""
        logits = logits.float()
        target = target.long()
        loss = logits.new_zeros(())
        if self.config.ce_weight:
            loss = loss + self.config.ce_weight * F.cross_entropy(logits, target, self.class_weights)
        if self.config.dice_weight:
            loss = loss + self.config.dice_weight * (1 - self._dice(logits, target))
        return loss

    def _dice(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(1)
        one_hot = torch.zeros_like(probabilities).scatter_(1, target.unsqueeze(1), 1)
        if not self.config.include_background:
            probabilities, one_hot = probabilities[:, 1:], one_hot[:, 1:]
        axes = tuple(range(2, logits.ndim))
        if self.config.batch_dice:
            axes = (0, *axes)
        overlap = (probabilities * one_hot).sum(axes)
        size = one_hot.sum(axes)
        total = probabilities.sum(axes) + size
        dice = (2 * overlap + self.config.smooth) / (total + self.config.smooth)
        present = (size > 0).to(dice.dtype)
        # With no class present at all there is nothing to overlap with: the Dice part is 0 loss, not NaN.
        return (dice * present).sum() / present.sum().clamp(min=1) + (present.sum() == 0).to(dice.dtype)
