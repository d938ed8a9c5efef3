"""Losses and weights that are not finite end a run before they are saved."""

from __future__ import annotations

import math

from torch import nn

from medseg.errors import Code, MedsegError
from medseg.training.averaging import WeightAverage


def not_finite(message: str, got: float, step: int) -> MedsegError:
    """The refusal to go on after a step."""
    return MedsegError(
        Code.NAN_LOSS,
        message,
        where=f"step {step}",
        got=got,
        remedy="lower optimizer.lr, or set trainer.precision=fp32; the best checkpoint is kept",
    )


def check_weights(model: nn.Module, average: WeightAverage | None, step: int) -> None:
    """End the run where an update has made weights that are not finite: the loss tells it one step later.

    Running statistics and the average of the weights are saved too, and looked at as well.

    Raises:
        MedsegError: E_NAN_LOSS.
    """
    averaged = {} if average is None else average.weights()
    saved = (tensor.detach() for tensor in (*model.state_dict().values(), *averaged.values()))
    floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel()]
    largest = float(nn.utils.get_total_norm(floats, norm_type=math.inf))  # of squares the sum may overflow
    if not math.isfinite(largest):
        raise not_finite("the weights are not finite any more", largest, step)
