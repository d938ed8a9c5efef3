"""Learning-rate schedules by name: functions of how much of the training is done, in steps or in minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from medseg.errors import Code, MedsegError
from medseg.registry import Registry


class Schedule(Protocol):
    """Factor of the learning rate."""

    def __call__(self, progress: float) -> float:
        """From progress 0 … 1 (the share of the budget that is used) to a factor 0 … 1."""


SCHEDULES: Registry[Schedule] = Registry("schedule", "medseg.training.schedules")


@dataclass(frozen=True)
class PolyConfig:
    """Settings of `Poly`."""

    warmup: float = 0.02
    """Share of the training over which the learning rate rises linearly from 0."""
    power: float = 0.9
    """Exponent of the decay (nnU-Net's)."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)


@SCHEDULES.register("poly", PolyConfig)
class Poly:
    """Warm-up, then (1 − progress)^power."""

    def __init__(self, config: PolyConfig) -> None:
        self.config = config

    def __call__(self, progress: float) -> float:
        """Factor at `progress` in 0 … 1."""
        done = _after_warmup(progress, self.config.warmup)
        return _warmup(progress, self.config.warmup) * float((1 - done) ** self.config.power)


@dataclass(frozen=True)
class CosineConfig:
    """Settings of `Cosine`."""

    warmup: float = 0.02
    """Share of the training over which the learning rate rises linearly from 0."""
    final: float = 0.0
    """Factor at the end."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)


@SCHEDULES.register("cosine", CosineConfig)
class Cosine:
    """Warm-up, then half a cosine down to `final`."""

    def __init__(self, config: CosineConfig) -> None:
        self.config = config

    def __call__(self, progress: float) -> float:
        """Factor at `progress` in 0 … 1."""
        done = _after_warmup(progress, self.config.warmup)
        decay = self.config.final + (1 - self.config.final) * (1 + math.cos(math.pi * done)) / 2
        return _warmup(progress, self.config.warmup) * decay


def _warmup(progress: float, warmup: float) -> float:
    # Never exactly 0: the first step of a time budget is taken at progress 0 and should move.
    return 1.0 if warmup == 0 else min(1.0, max(progress / warmup, 1e-3))


def _after_warmup(progress: float, warmup: float) -> float:
    return min(1.0, max(0.0, progress - warmup) / (1 - warmup))


def _check_warmup(warmup: float) -> None:
    if not 0 <= warmup < 1:
        raise MedsegError(
            Code.CONFIG,
            "the warm-up is a share of the training",
            where="schedule.warmup",
            expected="0 to 1",
            got=warmup,
        )
