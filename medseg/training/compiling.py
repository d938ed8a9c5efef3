"""The network's forward pass in training, compiled where that pays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from medseg.errors import Code, MedsegError

log = logging.getLogger(__name__)

Compile = Literal["auto", "on", "off"]
LONG_STEPS, LONG_MINUTES = 2_000, 20.0
"""Compiling takes a minute or two: "auto" compiles for trainings of at least this length."""


def wants_compiling(choice: Compile, device: torch.device, *, steps: float, minutes: float) -> bool:
    """Whether a training is compiled.

    "auto" compiles long trainings on CUDA, and none on CPUs: there nearly all of a step is convolutions, which stay
    those of oneDNN, and a compiled normalisation took three times as long as torch's own in its backward pass
    (scripts/bench_training_step.py; its --compile times the whole step).

    Args:
        choice: `trainer.compile`.
        device: of the training.
        steps: its budget; infinite where only time bounds it.
        minutes: the same in minutes.
    """
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and steps >= LONG_STEPS and minutes >= LONG_MINUTES


class Forward:
    """Calls a network, through its compiled form if wanted; where that cannot be made, plainly and with a note.

    The network itself stays as it is: its weights keep their names, and validation uses it uncompiled, because its
    tiles have other sizes.

    Args:
        model: the network.
        compiled: whether to compile it.
        must: a network that cannot be compiled is refused instead.
    """

    def __init__(self, model: nn.Module, *, compiled: bool, must: bool) -> None:
        self.model, self.must = model, must
        self._call: Callable[[torch.Tensor], Any] = torch.compile(model) if compiled else model

    def __call__(self, image: torch.Tensor) -> Any:
        """What the network gives for (N, C, *P).

        Raises:
            MedsegError: E_CONFIG if the network cannot be compiled but must be.
        """
        if self._call is self.model:
            return self.model(image)
        try:
            return self._call(image)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            if self.must:
                raise MedsegError(
                    Code.CONFIG,
                    "the network cannot be compiled on this machine",
                    where="trainer.compile=on",
                    got=reason,
                    remedy="trainer.compile=auto goes on without; on a CPU a C++ compiler is needed",
                ) from error
            log.warning("the network cannot be compiled here and runs as it is: %s", reason)
            self._call = self.model
            return self.model(image)
