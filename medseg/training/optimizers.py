"""Optimizers by name. Constructor: `Optimizer(config, parameters=...)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.registry import Registry

CPU_LR, OTHER_LR = 2e-3, 1e-3
"""Learning rates of AdamW where nobody sets one. docs/benchmarks/README.md has the trial of that
on CPUs; the other is a usual one."""
OPTIMIZERS: Registry[torch.optim.Optimizer] = Registry("optimizer", "medseg.training.optimizers")


def learning_rate(settings: Mapping[str, Any], device: torch.device) -> float:
    """The learning rate that an optimizer takes on a device, before the schedule.

    Args:
        settings: its name and fields.
        device: of the weights.
    """
    optimizer = OPTIMIZERS.build(settings, parameters=[nn.Parameter(torch.zeros(1, device=device))])
    return float(optimizer.param_groups[0]["lr"])


def _check(lr: float | None, weight_decay: float) -> None:
    if (lr is not None and lr <= 0) or weight_decay < 0:
        raise MedsegError(
            Code.CONFIG,
            "the learning rate must be positive and the weight decay at least 0",
            where="optimizer",
            got=f"lr={lr}, weight_decay={weight_decay}",
        )


@dataclass(frozen=True)
class AdamWConfig:
    """Settings of AdamW."""

    lr: float | None = None
    """Learning rate after warm-up, before the schedule; null: 2e-3 on CPUs, where networks are narrow and steps few,
    1e-3 elsewhere."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moments. A shorter second moment than usual: short budgets have few steps."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)


@OPTIMIZERS.register("adamw", AdamWConfig)
class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, ICLR 2019), fused."""

    def __init__(self, config: AdamWConfig, *, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        lr = config.lr
        if lr is None:
            lr = CPU_LR if all(parameter.device.type == "cpu" for parameter in parameters) else OTHER_LR
        super().__init__(parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


@dataclass(frozen=True)
class SGDConfig:
    """Settings of SGD; the defaults are nnU-Net's."""

    lr: float = 1e-2
    """Learning rate after warm-up, before the schedule."""
    momentum: float = 0.99
    """Nesterov momentum."""
    weight_decay: float = 3e-5
    """L2 penalty."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)


@OPTIMIZERS.register("sgd", SGDConfig)
class SGD(torch.optim.SGD):
    """Stochastic gradient descent with Nesterov momentum, fused."""

    def __init__(self, config: SGDConfig, *, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=True,
        )
