"""Losses: values by hand, MONAI as the second opinion, and absent classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medseg.errors import MedsegError
from medseg.losses import LOSSES
from medseg.losses.deep_supervision import DeepSupervision


def confident(target: torch.Tensor, num_classes: int) -> torch.Tensor:
    return F.one_hot(target, num_classes).movedim(-1, 1).float() * 40 - 20


@pytest.mark.parametrize("name", ["dice_ce"])
@pytest.mark.parametrize("shape", [(9, 7), (5, 6, 7)])
def test_perfect_prediction_costs_nothing_even_with_absent_classes(name: str, shape: tuple[int, ...]) -> None:
    target = torch.zeros((2, *shape), dtype=torch.long)
    target[:, 1:3, 1:3] = 1  # classes 2 and 3 do not occur
    assert LOSSES.build({"name": name})(confident(target, 4), target) < 1e-4
    assert LOSSES.build({"name": name})(confident(torch.zeros_like(target), 4), torch.zeros_like(target)) < 1e-4


def test_finite_loss_and_gradient_on_empty_masks() -> None:
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = LOSSES.build({"name": "dice_ce"})(logits, torch.zeros(2, 8, 8, dtype=torch.uint8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_dice_by_hand() -> None:
    # One class in a row of 4 voxels: p = .5 everywhere, 2 voxels true: Dice = 2 * (.5 + .5) / (2 + 2) = .5
    target = torch.tensor([[[1, 1, 0, 0]]])
    loss = LOSSES.build({"name": "dice_ce", "ce_weight": 0.0})(torch.zeros(1, 2, 1, 4), target)
    assert loss.item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_equals_monai_where_all_classes_are_present(batch_dice: bool) -> None:
    from medseg.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from monai.losses import DiceCELoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, 7, 8, generator=generator)
    target = torch.randint(0, 4, (3, 6, 7, 8), generator=generator)
    theirs = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice, smooth_nr=1e-5, smooth_dr=1e-5
    )(logits, target[:, None])
    ours = LOSSES.build({"name": "dice_ce", "batch_dice": batch_dice})(logits, target)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_computed_in_float32() -> None:
    logits = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    target = (logits[:, 1] > 0).long()
    loss = LOSSES.build({"name": "dice_ce"})
    assert loss(logits.bfloat16(), target).dtype == torch.float32
    assert loss(logits.bfloat16(), target).item() == pytest.approx(loss(logits, target).item(), rel=1e-2)


def test_deep_supervision_weights_and_cropping() -> None:
    class Recorder(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert logits.shape[2:] == target.shape[1:]
            return logits.mean()

    loss = DeepSupervision(Recorder())
    target = torch.zeros(1, 10, 10)
    fine, coarse = torch.full((1, 2, 8, 8), 1.0), torch.full((1, 2, 4, 4), 4.0)
    # weights 2/3 and 1/3; the target is 2 larger than the finest output and is cropped
    assert loss([fine, coarse], target).item() == pytest.approx(2.0)
    assert loss(fine, target).item() == pytest.approx(1.0)


def test_bad_settings() -> None:
    with pytest.raises(MedsegError, match="E_CONFIG.*not both 0"):
        LOSSES.build({"name": "dice_ce", "dice_weight": 0, "ce_weight": 0})
    with pytest.raises(MedsegError, match="did you mean 'dice_weight'"):
        LOSSES.build({"name": "dice_ce", "dice_wieght": 1})
    with pytest.raises(MedsegError, match="E_NAME.*\n.*\n.*did you mean 'dice_ce'"):
        LOSSES.build({"name": "dicece"})
