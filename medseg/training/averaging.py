"""A running average of the weights: smoother than the weights of any one step, and mostly better at predicting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The exponential moving average of a network's weights, in their own precision and layout.

    Early on the average is short, so that it leaves the initial weights behind within few steps: after t updates the
    decay is the smaller of `decay` and (1 + t) / (10 + t). Running statistics of a batch normalisation are averaged
    too; what is not a float is taken as it is.

    Args:
        model: its weights now are the first average.
        decay: share of the old average that remains at each update, in the long run.

    Source:
        Polyak and Juditsky, SIAM J. Control Optim. 30, 1992. The start as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = model.state_dict()  # shares the model's memory
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model's weights.

        Args:
            step: updates before this one.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        floats = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._average[n] for n in floats], [self._live[n] for n in floats], 1 - decay)
        for name in self._live.keys() - set(floats):
            self._average[name].copy_(self._live[name])

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take an average that was saved; its names are those of the model's `state_dict`."""
        for name, tensor in self._average.items():
            tensor.copy_(weights[name])

    def weights(self) -> dict[str, torch.Tensor]:
        """The average, under the names of the model's `state_dict`."""
        return dict(self._average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights."""
        # By value, not by pointer: the optimizer and a compiled network keep hold of the model's own memory.
        kept = {name: tensor.clone() for name, tensor in self._live.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(weights[name])
