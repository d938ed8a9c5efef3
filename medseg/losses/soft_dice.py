"""Soft Dice, the part that several losses share."""

from __future__ import annotations

import torch

from medseg.losses.processes import summed


def soft_dice(probabilities: torch.Tensor, target: torch.Tensor, *, batch_dice: bool, smooth: float) -> torch.Tensor:
    """Mean soft Dice of the classes that occur; 1 where none does.

    A class that no voxel of the batch (of the sample, without `batch_dice`) carries is left out of the mean: its Dice
    is undefined, and counting it would punish a perfect prediction.

    Where several processes share the batch, it is the Dice of all of it.

    Args:
        probabilities: float32, shape (N, C, *S); 0 where a voxel does not count.
        target: 1 where a voxel is of the class, else 0, and 0 where it does not count; the same shape.
        batch_dice: sum over the batch before the ratio.
        smooth: added to numerator and denominator.
    Returns:
        Scalar float32.
    Source:
        Milletari et al., V-Net, 3DV 2016, without its squares.
    """
    axes = tuple(range(2, probabilities.ndim))
    if batch_dice:
        axes = (0, *axes)
    overlap = (probabilities * target).sum(axes)
    size = target.sum(axes)
    predicted = probabilities.sum(axes)
    if batch_dice:
        overlap, size, predicted = summed(overlap, size, predicted)
    total = predicted + size
    dice = (2 * overlap + smooth) / (total + smooth)
    present = (size > 0).to(dice.dtype)
    # With no class present at all there is nothing to overlap with: the Dice part is 0 loss, not NaN.
    dices, count = (dice * present).sum(), present.sum()
    if not batch_dice:
        dices, count = summed(dices, count)
    return dices / count.clamp(min=1) + (count == 0).to(dice.dtype)
