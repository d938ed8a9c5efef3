"""From what a survey found to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from medseg.data.facts import Survey
from medseg.data.nnunet_plan import LOWRES_SHARE, MIN_BATCH, FloatArray, NetworkPlan, lower_resolution
from medseg.data.plan.axes import Seen, see
from medseg.data.plan.intensity import plan_crop, plan_normalisation
from medseg.data.plan.memory import GIB, SPARE, device_bytes
from medseg.data.plan.network import BASE_WIDTH, IN_WORDS, Machine, Planner, times
from medseg.data.plan.schema import Configuration, Plan, PlanConfig
from medseg.errors import Code, MedsegError

DEFAULT_MODEL = {"name": "unet"}
TOO_MUCH = "MORE than"
"""In the reason of `memory_gb`, where a training step is estimated to take more than it should."""


def make_plan(survey: Survey, config: PlanConfig, machine: Machine) -> Plan:
    """Plan from what the survey found.

    Args:
        survey: facts about the training cases.
        config: the user's overrides.
        machine: what it will train on (`machine_for`).
    Raises:
        MedsegError: E_CONFIG if an override does not fit the data; E_LIMIT if the memory is too small for any patch.
    """
    reasons: dict[str, str] = {"preset": _why_preset(config)}
    schemes, intensity = plan_normalisation(survey, config, reasons)
    crop, masked = plan_crop(survey, config, schemes, reasons)
    kind = _kind(survey, config, reasons)
    _refuse_axes(config, survey.spatial_dims, kind)
    seen = see(survey, config, crop=crop, slices=kind == "2d", reasons=reasons)
    labels = survey.labels
    planner = Planner(config, machine, len(labels.declared) + bool(labels.ignore), slices=kind == "2d")
    net, why = planner.plan(seen.spacing_mm, seen.median, float(np.prod(seen.median)) * seen.num_cases)
    reasons |= why
    spacing = seen.spacing_mm
    if kind != "2d" and survey.spatial_dims == 3:
        share = math.prod(net.patch_size) / float(np.prod(seen.median))
        if kind == "lowres" and config.spacing_mm is None:
            net, why = _low(seen, net, planner)
            reasons |= why
            spacing = np.array(net.spacing_mm)
            reasons["spacing_mm"] = f"made coarser until the patch, which held {share:.0%} of the median volume at "
            reasons["spacing_mm"] += f"{_mm(seen.spacing_mm)}, holds {LOWRES_SHARE:.0%}"
        elif share < LOWRES_SHARE and config.configuration is None:
            reasons["configuration"] = f"full resolution; its patch holds {share:.1%} of the median volume: "
            reasons["configuration"] += "data.plan.configuration=lowres sees more at a time, and both can be averaged"
    reasons["spatial_dims"] = f"the cases have {survey.spatial_dims} axes"
    reasons["num_channels"] = f"the cases have: {', '.join(survey.channel_names)}"
    plan = Plan(
        preset=config.preset,
        configuration=kind,
        spatial_dims=survey.spatial_dims,
        num_channels=survey.num_channels,
        orientation=seen.orientation,
        spacing_mm=tuple(round(float(s), 6) for s in spacing),
        crop=crop,
        normalisation=schemes,
        mask_normalisation=masked,
        intensity=intensity,
        patch_size=net.patch_size,
        batch_size=net.batch_size,
        widths=net.widths,
        kernels=net.kernels,
        strides=net.strides,
        memory_gb=0.0,
        reasons=reasons,
    )
    return with_memory(plan, machine)


def with_memory(plan: Plan, machine: Machine) -> Plan:
    """The same plan with the memory that its training steps are estimated to take."""
    needed = machine.needs(plan.patch_size, plan.widths, plan.kernels, plan.strides, plan.batch_size)
    why = f"estimated for a training step of {machine.settings['name']} in {machine.precision}"
    why += f" on {IN_WORDS[machine.device]}"
    if needed > machine.budget:
        why += f": {TOO_MUCH} the {machine.budget / GIB:.1f} GiB that it should take at most"
    else:
        why += f", which may take {machine.budget / GIB:.1f} GiB"
    if machine.budget_is:
        why += f" ({machine.budget_is})"
    return replace(plan, memory_gb=round(needed / GIB, 2), reasons={**plan.reasons, "memory_gb": why})


def takes_too_much(plan: Plan) -> bool:
    """Whether a training step is estimated to take more memory than it should: values that were set are believed."""
    return TOO_MUCH in plan.reasons["memory_gb"]


def _low(seen: Seen, full: NetworkPlan, planner: Planner) -> tuple[NetworkPlan, dict[str, str]]:
    """The low-resolution configuration.

    Raises:
        MedsegError: E_CONFIG where full resolution sees enough.
    """
    found: list[dict[str, str]] = []

    def configure(spacing: FloatArray, median: ArrayLike, num_voxels: float) -> NetworkPlan:
        net, reasons = planner.plan(spacing, median, num_voxels)
        found.append(reasons)
        return net

    low = lower_resolution(seen.spacing_mm, seen.median, full.patch_size, seen.num_cases, configure)
    if low is None:
        raise MedsegError(
            Code.CONFIG,
            "a low resolution is of no use here: at full resolution a patch sees enough",
            where="data.plan.configuration",
            got=f"a patch of {times(full.patch_size)}, a median shape of {times(seen.median)}",
            remedy="data.plan.configuration=fullres",
        )
    return low, found[-1]


def machine_for(
    survey: Survey,
    config: PlanConfig,
    *,
    device: str,
    model: Mapping[str, Any] = DEFAULT_MODEL,
    precision: str = "bf16",
    processes: int = 1,
    accumulate: int = 1,
) -> Machine:
    """What a network is planned for.

    Args:
        survey: facts about the training cases.
        config: the user's overrides.
        device: "cuda", "cpu", …: what it will train on.
        model: name and settings of the network; stages that it leaves open are planned.
        precision: "bf16", "fp16" or "fp32": what it will compute in.
        processes: that make a batch together, on GPUs each with its own.
        accumulate: in how many parts each of them computes its samples.
    """
    device = device if device in BASE_WIDTH else "cpu"
    if config.memory_gb is not None and config.memory_gb <= 0:
        raise MedsegError(Code.CONFIG, "must be positive", where="data.plan.memory_gb", got=config.memory_gb)
    stated = config.memory_gb is not None
    memory = GIB * config.memory_gb if config.memory_gb is not None else device_bytes(device)
    budget = memory * (SPARE["cuda"] if stated else SPARE[device])
    owner = "data.plan.memory_gb" if stated else {"cuda": "the GPU's memory", "cpu": "the memory that is free"}[device]
    share = f"{budget / memory:.0%} of {owner}" if memory else ""
    return Machine(
        device,
        precision,
        budget,
        model,
        survey.num_channels,
        survey.labels.num_outputs,
        share,
        parts=accumulate * (processes if device == "cuda" else 1),
        least=max(MIN_BATCH, accumulate * processes),
    )


def _kind(survey: Survey, config: PlanConfig, reasons: dict[str, str]) -> Configuration:
    """Full resolution, low resolution or slices."""
    if survey.spatial_dims == 2:
        reasons["configuration"] = "pictures are taken at the resolution they have"
        if config.configuration == "lowres":
            raise MedsegError(
                Code.CONFIG,
                "pictures are not resampled",
                where="data.plan.configuration",
                expected="fullres",
                got="lowres",
            )
        return "fullres"
    if config.configuration is not None:
        reasons["configuration"] = "set by data.plan.configuration"
        return config.configuration
    if (np.median([case.shape for case in survey.cases], axis=0) == 1).any():
        reasons["configuration"] = "the volumes have one slice"
        return "2d"
    reasons["configuration"] = "full resolution: its patch sees enough"
    return "fullres"


def _refuse_axes(config: PlanConfig, dims: int, kind: Configuration) -> None:
    """Overrides must have as many axes as the data."""
    for key in ("spacing_mm", "patch_size"):
        value = getattr(config, key)
        if value is not None and len(value) != dims:
            raise MedsegError(
                Code.CONFIG,
                f"the data have {dims} axes",
                where=f"data.plan.{key}",
                expected=f"{dims} values",
                got=value,
            )
    if kind == "2d" and config.patch_size is not None and config.patch_size[0] != 1:
        raise MedsegError(
            Code.CONFIG,
            "a patch of slices is one voxel thick",
            where="data.plan.patch_size",
            expected="1 along the first axis",
            got=config.patch_size,
        )


def _why_preset(config: PlanConfig) -> str:
    if config.preset == "auto":
        return "medseg's rules, for the data and the device"
    return "set by data.plan.preset: exactly as nnU-Net plans"


def _mm(spacing: FloatArray) -> str:
    return "×".join(f"{s:.3g}" for s in spacing) + " mm"
