"""Learning-rate schedules by name: functions of how much of the training is done, in steps or in minutes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.registry import Registry


class Schedule(ABC):
    """Factor of the learning rate, and the momentum where it changes too."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """From progress 0 … 1 (the share of the budget that is used) to a factor 0 … 1."""

    def momentum(self, progress: float) -> float | None:
        """Momentum (of Adam the decay of the first moment) at `progress`; None leaves the optimizer's."""
        return None


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
class Poly(Schedule):
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
class Cosine(Schedule):
    """Warm-up, then half a cosine down to `final`."""

    def __init__(self, config: CosineConfig) -> None:
        self.config = config

    def __call__(self, progress: float) -> float:
        """Factor at `progress` in 0 … 1."""
        done = _after_warmup(progress, self.config.warmup)
        decay = self.config.final + (1 - self.config.final) * (1 + math.cos(math.pi * done)) / 2
        return _warmup(progress, self.config.warmup) * decay


@dataclass(frozen=True)
class OneCycleConfig:
    """Settings of `OneCycle`."""

    peak: float = 0.3
    """Share of the training at which the learning rate is highest (the optimizer's lr)."""
    start: float = 0.04
    """Factor at the start."""
    final: float = 1e-4
    """Factor at the end."""
    momentum: tuple[float, float] | None = (0.85, 0.95)
    """Lowest momentum (at the peak) and highest (at both ends), of Adam the decay of the first moment; null leaves the
    optimizer's own."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise MedsegError(
                Code.CONFIG,
                "the peak is a share of the training",
                where="schedule.peak",
                expected="between 0 and 1",
                got=self.peak,
            )
        if not (0 < self.start <= 1 and 0 <= self.final <= 1):
            raise MedsegError(
                Code.CONFIG,
                "the factors of the learning rate lie between 0 and 1",
                where="schedule.start, schedule.final",
                got=f"{self.start}, {self.final}",
            )
        if self.momentum is not None and not 0 <= self.momentum[0] <= self.momentum[1] < 1:
            raise MedsegError(
                Code.CONFIG, "momentum is (lowest, highest), below 1", where="schedule.momentum", got=self.momentum
            )


@SCHEDULES.register("one_cycle", OneCycleConfig)
class OneCycle(Schedule):
    """Up to the learning rate and down to almost nothing, along half cosines; the momentum goes the other way.

    Source:
        Smith and Topin, Super-Convergence, 2018, arXiv:1708.07120; Smith, arXiv:1803.09820, section 4.2 (momentum).
        Half cosines instead of straight lines, as in fastai and torch's OneCycleLR.
    """

    def __init__(self, config: OneCycleConfig) -> None:
        self.config = config

    def __call__(self, progress: float) -> float:
        """Factor at `progress` in 0 … 1."""
        return self._between(progress, self.config.start, 1.0, self.config.final)

    def momentum(self, progress: float) -> float | None:
        """Momentum at `progress` in 0 … 1."""
        if self.config.momentum is None:
            return None
        low, high = self.config.momentum
        return self._between(progress, high, low, high)

    def _between(self, progress: float, first: float, peak: float, last: float) -> float:
        progress, at = min(1.0, max(0.0, progress)), self.config.peak
        start, end, done = (first, peak, progress / at) if progress < at else (peak, last, (progress - at) / (1 - at))
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


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
