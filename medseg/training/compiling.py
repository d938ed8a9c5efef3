"""Which trainings are compiled."""

from __future__ import annotations

import torch

from medseg.models.compiling import Compile

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
