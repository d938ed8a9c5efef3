"""Patch, batch and depth: our rules for the device (preset "auto"), and nnU-Net's with the user's overrides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from medseg.data.nnunet_plan import (
    BASE_WIDTH as NNUNET_WIDTH,
)
from medseg.data.nnunet_plan import (
    MAX_WIDTH,
    MIN_BATCH,
    MIN_EDGE,
    PRESETS,
    FloatArray,
    NetworkPlan,
    configuration,
    topology,
)
from medseg.data.plan.memory import GIB, StepCost, complete_settings, step_cost
from medseg.data.plan.schema import Axes, PlanConfig
from medseg.errors import Code, MedsegError

PATCH_VOXELS = {"cuda": {2: 768**2, 3: 160**3}, "cpu": {2: 192**2, 3: 45**3}}
"""Most voxels of a patch by device and dimensions: what trains in reasonable time there."""
BATCH_VOXELS = {"cuda": {2: 12 * 512**2, 3: 2 * 128**3}, "cpu": {2: 4 * 192**2, 3: 2 * 56**3}}
"""Most voxels of a batch by device and dimensions, where two patches are fewer."""
BASE_WIDTH = {"cuda": 32, "cpu": 16}
"""Filters of the first stage: on a CPU, more steps with fewer filters reach a given Dice sooner."""
IN_WORDS = {"cuda": "a GPU", "cpu": "a CPU"}
"""Devices, for people."""
SMALLEST_PATCH = 16
"""Voxels along an edge below which no patch is shrunk to fit the memory."""


@dataclass(frozen=True)
class Machine:
    """What a network is planned for."""

    device: str
    """"cuda" or "cpu"."""
    precision: str
    budget: float
    """Bytes that a training step may take."""
    settings: Mapping[str, Any]
    """Name and settings of the model."""
    in_channels: int
    num_outputs: int
    budget_is: str = ""
    """What the budget was taken from, in words."""
    parts: int = 1
    """In how many parts a batch is computed: one after the other, or by as many GPUs."""
    least: int = MIN_BATCH
    """Samples of a batch, so that each part and process has one."""

    def cost(self, patch: Axes, widths: Axes, kernels: tuple[Axes, ...], strides: tuple[Axes, ...]) -> StepCost:
        """What a training step of a network with these stages holds."""
        return step_cost(
            complete_settings(self.settings, widths, kernels, strides),
            in_channels=self.in_channels,
            num_outputs=self.num_outputs,
            patch_size=patch,
        )

    def bytes_of(self, cost: StepCost, batch_size: int) -> float:
        """Of a training step."""
        return cost.bytes_of(-(-batch_size // self.parts), device=self.device, precision=self.precision)

    def needs(
        self, patch: Axes, widths: Axes, kernels: tuple[Axes, ...], strides: tuple[Axes, ...], batch_size: int
    ) -> float:
        """Bytes of a training step."""
        return self.bytes_of(self.cost(patch, widths, kernels, strides), batch_size)


@dataclass(frozen=True)
class Planner:
    """Plans networks for a grid.

    Args:
        config: the user's overrides.
        machine: what it will train on.
        num_classes: with the background, as nnU-Net counts them.
        slices: networks of single slices of volumes.
    """

    config: PlanConfig
    machine: Machine
    num_classes: int
    slices: bool

    def plan(self, spacing_mm: FloatArray, median: ArrayLike, num_voxels: float) -> tuple[NetworkPlan, dict[str, str]]:
        """The network for a spacing and a median shape, with the reasons.

        Args:
            spacing_mm: that the network sees.
            median: shape of the cases at this spacing.
            num_voxels: of the whole data set.
        """
        shape = np.asarray(median, dtype=np.float64)
        if self.slices:
            spacing_mm, shape = spacing_mm[1:], shape[1:]
        if self.config.preset == "auto":
            net, reasons = self._ours(spacing_mm, shape)
        else:
            net, reasons = self._nnunets(spacing_mm, shape, num_voxels)
        if self.config.batch_size is not None:
            net = replace(net, batch_size=self.config.batch_size)
            reasons["batch_size"] = "set by data.plan.batch_size"
        if self.slices:
            for name in ("kernels", "strides"):
                reasons[name] += "; slice by slice: 1 along the first axis"
        return net, reasons

    def _nnunets(
        self, spacing_mm: FloatArray, median: FloatArray, num_voxels: float
    ) -> tuple[NetworkPlan, dict[str, str]]:
        config, name = self.config, self.config.preset
        net = configuration(
            spacing_mm,
            median,
            num_voxels,
            num_channels=self.machine.in_channels,
            num_classes=self.num_classes,
            preset=PRESETS[name],
        )
        rule = f"nnU-Net's rules (preset {name})"
        reasons = {
            "patch_size": f"{rule}: the largest within its cost; {_why_median(median)}",
            "batch_size": f"{rule}: what fits beside it, at most {PRESETS[name].dataset_share:.0%} of all voxels",
            **dict.fromkeys(("strides", "kernels"), rule),
            "widths": f"{rule}: {NNUNET_WIDTH} filters doubled at each stage, at most {MAX_WIDTH[len(median)]}",
        }
        net = self._lifted(net) if self.slices else net
        if (config.patch_size, config.num_stages, config.base_width) == (None, None, None):
            return net, reasons
        patch = config.patch_size or net.patch_size
        changed, more = self._with_depth(spacing_mm, patch, config.base_width or NNUNET_WIDTH)
        return replace(changed, batch_size=net.batch_size, median_shape=net.median_shape), {**reasons, **more}

    def _ours(self, spacing_mm: FloatArray, median: FloatArray) -> tuple[NetworkPlan, dict[str, str]]:
        config, machine = self.config, self.machine
        dims, device = len(median), machine.device
        width = config.base_width or BASE_WIDTH[device]
        voxels: float = PATCH_VOXELS[device][dims]
        batch_size = config.batch_size or machine.least
        limit = f"a patch on {IN_WORDS[device]} holds about {voxels} voxels at most"
        while True:
            patch = config.patch_size or self._patch(spacing_mm, median, voxels)
            net, reasons = self._with_depth(spacing_mm, patch, width)
            cost = machine.cost(net.patch_size, net.widths, net.kernels, net.strides)
            needed = machine.bytes_of(cost, batch_size)
            if needed <= machine.budget or config.patch_size is not None:
                break
            smaller = min(voxels, math.prod(patch))
            if smaller <= SMALLEST_PATCH**dims:
                raise MedsegError(
                    Code.LIMIT,
                    "there is too little memory for a training step",
                    where="data.plan.memory_gb",
                    expected=f"{needed / GIB:.1f} GiB for a batch of {batch_size} patches of {times(net.patch_size)}",
                    got=f"{machine.budget / GIB:.1f} GiB",
                    remedy="choose a narrower network: data.plan.base_width=8, or data.plan.batch_size=1",
                )
            voxels = max(SMALLEST_PATCH**dims, smaller * min(0.9, max(0.5, machine.budget / needed)))
            limit = f"more would not fit into {machine.budget / GIB:.1f} GiB with a batch of {batch_size}"
        if config.patch_size is None:
            divisor = np.prod(np.array(net.strides), axis=0)
            whole = bool((np.array(patch[-dims:]) >= np.floor(median)).all())
            reasons["patch_size"] = f"{_why_median(median)}{', which a patch holds whole' if whole else f'; {limit}'}"
            if net.patch_size != patch:
                reasons["patch_size"] += f", padded to a multiple of {times(divisor)} (the poolings)"
        room = (machine.budget - machine.bytes_of(cost, 0)) / max(1.0, needed - machine.bytes_of(cost, 0)) * batch_size
        wanted = round(BATCH_VOXELS[device][dims] / math.prod(net.patch_size))
        reasons["batch_size"] = (
            f"about {BATCH_VOXELS[device][dims]} voxels a step on {IN_WORDS[device]}, at least {machine.least} patches"
        )
        if wanted > room > machine.least:
            reasons["batch_size"] = f"more would not fit into {machine.budget / GIB:.1f} GiB"
        reasons["widths"] += "" if config.base_width else f"; {width} because this is {IN_WORDS[device]}"
        batch_size = max(machine.least, min(wanted, int(room)))
        return replace(net, batch_size=batch_size, median_shape=tuple(map(float, median))), reasons

    def _patch(self, spacing_mm: FloatArray, median: FloatArray, voxels: float) -> Axes:
        """A patch of about `voxels`, cubic in mm, not larger than the median; freed room goes to other axes."""
        median = np.maximum(np.ceil(median), 1)
        patch = (voxels / np.prod(1 / spacing_mm)) ** (1 / len(spacing_mm)) / spacing_mm
        for _ in spacing_mm:
            clipped = np.minimum(patch, median)
            free = patch < median
            if not free.any() or np.prod(clipped) >= voxels * 0.99:
                break
            patch = np.where(free, patch * (voxels / np.prod(clipped)) ** (1 / free.sum()), clipped)
        whole = tuple(int(p) for p in np.maximum(np.minimum(patch, median), 1).round())
        return (1, *whole) if self.slices else whole

    def _with_depth(self, spacing_mm: FloatArray, patch: Axes, width: int) -> tuple[NetworkPlan, dict[str, str]]:
        """The network for a patch; a patch that is not set is padded to what it halves."""
        config, dims = self.config, len(spacing_mm)
        inner = patch[1:] if self.slices else patch
        net = topology(spacing_mm, inner, config.num_stages)
        strides, kernels = net.strides, net.kernels
        if len(strides) == 1:  # smaller than any pooling: the patch is padded, a network needs two stages
            strides, kernels = ((1,) * dims, (2,) * dims), ((3,) * dims,) * 2
        divisor = np.prod(np.array(strides), axis=0)
        padded = tuple(int(math.ceil(p / d) * d) for p, d in zip(inner, divisor, strict=True))
        found = NetworkPlan(
            spacing_mm=tuple(float(s) for s in spacing_mm),
            median_shape=(),
            patch_size=tuple(config.patch_size[-dims:]) if config.patch_size is not None else padded,
            batch_size=MIN_BATCH,
            strides=strides,
            kernels=kernels,
            widths=tuple(min(width * 2**stage, MAX_WIDTH[dims]) for stage in range(len(strides))),
            blocks=(),
            decoder_blocks=(),
            residual=False,
        )
        halved = f"an axis is halved while {MIN_EDGE} voxels remain and its spacing is under twice the finest"
        reasons = {
            "strides": halved if config.num_stages is None else "as many stages as data.plan.num_stages sets",
            "kernels": "an axis gets 3 once its spacing is under twice the finest",
            "widths": f"{width} filters{' (data.plan.base_width)' if config.base_width else ''} doubled at each stage, "
            f"at most {MAX_WIDTH[dims]}",
        }
        if config.patch_size is not None:
            reasons["patch_size"] = "set by data.plan.patch_size"
        return self._lifted(found) if self.slices else found, reasons

    def _lifted(self, net: NetworkPlan) -> NetworkPlan:
        """A network in 2D as one in 3D that is one voxel thick along the first axis."""
        return replace(
            net,
            patch_size=(1, *net.patch_size),
            strides=tuple((1, *stride) for stride in net.strides),
            kernels=tuple((1, *kernel) for kernel in net.kernels),
        )


def times(values: ArrayLike) -> str:
    """Sizes along axes, for people."""
    return "×".join(str(round(float(v))) for v in np.asarray(values, dtype=np.float64).ravel())


def _why_median(median: FloatArray) -> str:
    return f"the median shape at this spacing is {times(median)}"
