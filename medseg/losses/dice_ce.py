"""Soft Dice and cross-entropy, the field's default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE_INDEX, Labels
from medseg.losses import LOSSES
from medseg.losses.processes import is_together, summed
from medseg.losses.soft_dice import soft_dice


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
    class_weights: tuple[float, ...] | Literal["auto"] | None = None
    """Weight of each class (background first) in the cross-entropy; auto: the rarer, the more, from the training cases;
    null weighs all the same."""
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

    Classes that do not occur are left out of the Dice mean (`soft_dice`); cross-entropy still sees their false
    positives. Voxels that `labels` ignore have no part in either, and no gradient.

    Args:
        config: the settings.
        labels: the classes; without them no voxel is ignored.

    Source:
        Milletari et al., V-Net, 3DV 2016 (soft Dice, without its squares); Isensee et al., nnU-Net, Nature Methods
        2021 (the sum). Absent classes differ from both.
    """

    def __init__(self, config: DiceCEConfig, *, labels: Labels | None = None) -> None:
        super().__init__()
        self.config = config
        self.ignores = labels is not None and bool(labels.ignore)
        self.class_weights: torch.Tensor | None
        if config.class_weights == "auto":
            raise MedsegError(Code.CONFIG, "the weights are known only where cases train", where="loss.class_weights")
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (N, C, *S) in any float type and class indices (N, *S) → scalar float32."""
        logits = logits.float()
        target = target.long()
        counted = None
        if self.ignores:
            counted = (target != IGNORE_INDEX).to(logits.dtype)
            target = target.masked_fill(target == IGNORE_INDEX, 0)
        loss = logits.new_zeros(())
        if self.config.ce_weight:
            loss = loss + self.config.ce_weight * self._cross_entropy(logits, target, counted)
        if self.config.dice_weight:
            loss = loss + self.config.dice_weight * (1 - self._dice(logits, target, counted))
        return loss

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        is_exact = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
        if counted is None and not is_exact and not is_together():
            return F.cross_entropy(logits, target, self.class_weights)
        if counted is None:  # CUDA's own mean is summed up in any order
            counted = torch.ones_like(target, dtype=logits.dtype)
        # The mean over the voxels that count, or their weights; 0 where none does
        weights = counted if self.class_weights is None else counted * self.class_weights[target]
        each = F.cross_entropy(logits, target, reduction="none")
        total, weight = summed((each * weights).sum(), weights.sum())
        return total / weight.clamp(min=torch.finfo(weights.dtype).tiny)

    def _dice(self, logits: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        probabilities = logits.softmax(1)
        one_hot = torch.zeros_like(probabilities).scatter_(1, target.unsqueeze(1), 1)
        if counted is not None:
            probabilities, one_hot = (array * counted.unsqueeze(1) for array in (probabilities, one_hot))
        if not self.config.include_background:
            probabilities, one_hot = probabilities[:, 1:], one_hot[:, 1:]
        return soft_dice(probabilities, one_hot, batch_dice=self.config.batch_dice, smooth=self.config.smooth)
