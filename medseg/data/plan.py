"""The plan: every value that follows from the data and the machine, each with its reason.

A deliberately small planner: spacing, patch, batch, depth, kernels, widths and normalisation. Each value can be
overridden by the key of the same name in `PlanConfig` (`data.plan.patch_size=[64,64,64]`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg.data.survey import Survey
from medseg.errors import Code, MedsegError
from medseg.registry import make_config
from medseg.volume import MODEL_ORIENTATION

Axes = tuple[int, ...]
Normalisation = Literal["z-score", "ct"]

ANISOTROPY = 3.0
"""An axis counts as coarse when its spacing is more than this times the next one's (nnU-Net's rule)."""
MIN_EDGE = 4
"""No axis of the deepest stage gets smaller than this many voxels (nnU-Net's rule)."""
MAX_WIDTH = {2: 512, 3: 320}
"""Most filters in a stage, by number of spatial dimensions (nnU-Net's rule)."""
PATCH_VOXELS = {"cuda": {2: 512**2, 3: 128**3}, "cpu": {2: 192**2, 3: 45**3}}
"""Voxels of a patch by device and dimensions: what trains in reasonable time there."""
BATCH_VOXELS = {"cuda": {2: 12 * 512**2, 3: 2 * 128**3}, "cpu": {2: 4 * 192**2, 3: 2 * 56**3}}
"""Voxels of a batch by device and dimensions."""
BASE_WIDTH = {"cuda": 32, "cpu": 16}
"""Filters of the first stage: on a CPU, more steps with fewer filters reach a given Dice sooner."""


@dataclass(frozen=True)
class PlanConfig:
    """Overrides of the plan; null takes the planned value."""

    spacing_mm: tuple[float, ...] | None = None
    """Voxel size that the network sees, along the model's axes (superior, posterior, left), in mm."""
    patch_size: tuple[int, ...] | None = None
    """Size of training patches and prediction tiles in voxels, along the model's axes."""
    batch_size: int | None = None
    """Patches in a batch."""
    base_width: int | None = None
    """Filters of the first stage; each further stage doubles them."""
    num_stages: int | None = None
    """Resolution stages, the bottleneck included."""
    normalisation: Normalisation | None = None
    """Intensities: "z-score" of each image, or "ct" (clip to the training set's percentiles, then its z-score)."""


@dataclass(frozen=True)
class Plan:
    """What the network sees and how it is shaped. Axes are the model's: `MODEL_ORIENTATION`, or (row, column)."""

    spatial_dims: int
    """2 or 3."""
    num_channels: int
    """Channels of an image."""
    orientation: str
    """Orientation of the array axes that the network sees; "" for pictures."""
    spacing_mm: tuple[float, ...]
    """Voxel size that the network sees, in mm (1 pixel for pictures)."""
    normalisation: Normalisation
    """"z-score" or "ct"."""
    intensity: tuple[tuple[float, float, float, float], ...]
    """For each channel: low and high clip, mean and standard deviation over the training set's foreground ("ct")."""
    patch_size: Axes
    """Voxels of a patch."""
    batch_size: int
    """Patches in a batch."""
    widths: Axes
    """Filters of each stage."""
    kernels: tuple[Axes, ...]
    """Filter size of each stage, per axis."""
    strides: tuple[Axes, ...]
    """Down-sampling into each stage, per axis; the first is all ones."""
    reasons: Mapping[str, str]
    """Why each value is what it is."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, the form of `from_json`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Read back what `to_json` gave.

        Raises:
            MedsegError: E_CONFIG if a field is missing or unknown.
        """
        try:
            return make_config(cls, values, where="plan")
        except TypeError as error:
            raise MedsegError(Code.CONFIG, f"the plan is incomplete: {error}", where="plan") from error

    def write(self, path: Path) -> None:
        """Write `plan.yaml`: each value with its reason as a comment above it."""
        lines = ["# How the network sees the data. Override a value with data.plan.KEY=VALUE."]
        for key, value in self.to_json().items():
            if key == "reasons":
                continue
            if key in self.reasons:
                lines.append(f"# {self.reasons[key]}")
            lines.append(f"{key}: {json.dumps(value)}")  # JSON is YAML, on one line
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_plan(survey: Survey, config: PlanConfig, *, device: str) -> Plan:
    """Plan from what the survey found.

    Args:
        survey: facts about the training cases.
        config: the user's overrides.
        device: "cuda" or "cpu": what it will train on.
    Raises:
        MedsegError: E_CONFIG if an override has the wrong number of axes.
    """
    dims = survey.spatial_dims
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
    device = device if device in BASE_WIDTH else "cpu"
    reasons: dict[str, str] = {}
    spacings, shapes = _in_model_order(survey)
    spacing = _target_spacing(spacings, shapes, reasons)
    if config.spacing_mm is not None:
        spacing = config.spacing_mm
        reasons["spacing_mm"] = "set by data.plan.spacing_mm"
    median = np.median(shapes * spacings / np.array(spacing), axis=0)
    patch = _patch(median, spacing, PATCH_VOXELS[device][dims])
    why_patch = (
        f"the median shape at this spacing is {_times(median)},"
        f" a patch on {device} holds about {PATCH_VOXELS[device][dims]} voxels"
    )
    if config.patch_size is not None:
        patch, why_patch = config.patch_size, "set by data.plan.patch_size"
    strides, kernels, exact = _pooling(patch, spacing, config.num_stages)
    if config.patch_size is None:
        patch = exact
        why_patch += f", padded to a multiple of {_times(np.prod(np.array(strides), axis=0))} (the poolings)"
    reasons["patch_size"] = why_patch
    reasons["strides"] = f"an axis is halved while {MIN_EDGE} voxels remain and its spacing is under twice the finest"
    reasons["kernels"] = "an axis gets 3 once its spacing is under twice the finest"
    batch = config.batch_size or max(2, round(BATCH_VOXELS[device][dims] / math.prod(patch)))
    reasons["batch_size"] = (
        "set by data.plan.batch_size"
        if config.batch_size
        else f"~{BATCH_VOXELS[device][dims]} voxels a step on {device}"
    )
    base = config.base_width or BASE_WIDTH[device]
    widths = tuple(min(base * 2**stage, MAX_WIDTH[dims]) for stage in range(len(strides)))
    reasons["widths"] = (
        f"{base} filters doubled at each stage, at most {MAX_WIDTH[dims]}"
        + ("" if config.base_width else f"; {base} because this is a {device}")
    )  # fmt: skip
    normalisation, intensity = _normalisation(survey, config, reasons)
    reasons["orientation"] = (
        "axes run to the superior, posterior and left" if dims == 3 else "pictures have no orientation in a patient"
    )
    return Plan(
        spatial_dims=dims,
        num_channels=survey.num_channels,
        orientation=MODEL_ORIENTATION if dims == 3 else "",
        spacing_mm=tuple(round(float(s), 6) for s in spacing),
        normalisation=normalisation,
        intensity=intensity,
        patch_size=tuple(int(p) for p in patch),
        batch_size=batch,
        widths=widths,
        kernels=kernels,
        strides=strides,
        reasons=reasons,
    )


def with_patch(plan: Plan, patch_size: Axes, reason: str) -> Plan:
    """The same plan with another patch size, and why."""
    return replace(plan, patch_size=patch_size, reasons={**plan.reasons, "patch_size": reason})


def with_model(plan: Plan, given: Mapping[str, Any]) -> Plan:
    """The same plan with the widths, kernels and strides that the model's own settings state."""
    dims = plan.spatial_dims
    values: dict[str, Any] = {}
    for name, of_stages in given.items():
        if name == "widths":
            values[name] = tuple(of_stages)
        else:
            values[name] = tuple((s,) * dims if isinstance(s, int) else tuple(s) for s in of_stages)
    return replace(plan, **values, reasons={**plan.reasons, **{name: f"set by model.{name}" for name in given}})


def _in_model_order(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Spacings and shapes of all cases along the model's axes, each (N, dims)."""
    spacings, shapes = [], []
    for case in survey.cases:
        order = _model_axes(case.orientation)
        spacings.append([case.spacing_mm[a] for a in order] if order else case.spacing_mm)
        shapes.append([case.shape[a] for a in order] if order else case.shape)
    return np.array(spacings, dtype=float), np.array(shapes, dtype=float)


def _model_axes(orientation: str) -> list[int]:
    """For each model axis the array axis that runs along it; [] for pictures."""
    pairs = {"R": "LR", "L": "LR", "A": "PA", "P": "PA", "S": "IS", "I": "IS"}
    along = [pairs[letter] for letter in orientation]
    return [along.index(pairs[letter]) for letter in MODEL_ORIENTATION] if orientation else []


def _target_spacing(spacings: np.ndarray, shapes: np.ndarray, reasons: dict[str, str]) -> tuple[float, ...]:
    """Median spacing; a coarse axis takes its 10th percentile (nnU-Net's rule)."""
    median = np.median(spacings, axis=0)
    reasons["spacing_mm"] = "the median spacing of the training cases"
    coarse = int(np.argmax(median))
    others = [a for a in range(len(median)) if a != coarse]
    sizes = np.median(shapes, axis=0)
    if median[coarse] > ANISOTROPY * max(median[others]) and sizes[coarse] * ANISOTROPY < min(sizes[others]):
        fine = max(float(np.percentile(spacings[:, coarse], 10)), float(max(median[others])))
        median[coarse] = fine
        reasons["spacing_mm"] += f"; axis {coarse} is coarse and takes its 10th percentile"
    return tuple(float(s) for s in median)


def _patch(median: np.ndarray, spacing: tuple[float, ...], voxels: int) -> Axes:
    """A patch of about `voxels`, cubic in mm, not larger than the median shape; freed room goes to other axes."""
    median = np.maximum(np.ceil(median), 1)
    patch = (voxels / np.prod(1 / np.array(spacing))) ** (1 / len(spacing)) / np.array(spacing)
    for _ in spacing:
        clipped = np.minimum(patch, median)
        free = patch < median
        if not free.any() or np.prod(clipped) >= voxels * 0.99:
            break
        patch = np.where(free, patch * (voxels / np.prod(clipped)) ** (1 / free.sum()), clipped)
    return tuple(int(p) for p in np.maximum(np.minimum(patch, median), 1).round())


def _pooling(
    patch: Axes, spacing: tuple[float, ...], num_stages: int | None
) -> tuple[tuple[Axes, ...], tuple[Axes, ...], Axes]:
    """Strides and kernels of each stage, and the patch padded to what they divide (nnU-Net's rule)."""
    size, current = np.array(patch, dtype=float), np.array(spacing, dtype=float)
    strides: list[Axes] = [(1,) * len(patch)]
    kernel = np.where(current < 2 * current.min(), 3, 1)
    kernels: list[Axes] = [tuple(int(k) for k in kernel)]
    while num_stages is None or len(strides) < num_stages:
        # A depth that was asked for is reached with smaller edges than the planner would choose itself.
        poolable = size >= (2 * MIN_EDGE if num_stages is None else 2)
        if not poolable.any():
            break
        poolable &= current < 2 * current[poolable].min()
        if num_stages is None and poolable.sum() == 1 and size[poolable].item() < 3 * MIN_EDGE:
            break
        size, current = np.where(poolable, np.ceil(size / 2), size), np.where(poolable, current * 2, current)
        strides.append(tuple(2 if p else 1 for p in poolable))
        kernel = np.where(current < 2 * current.min(), 3, kernel)
        kernels.append(tuple(int(k) for k in kernel))
    if len(strides) == 1:  # smaller than any pooling: the patch is padded, a network needs two stages
        strides.append((2,) * len(patch))
        kernels.append((3,) * len(patch))
    divisor = np.prod(np.array(strides), axis=0)
    exact = tuple(int(math.ceil(p / d) * d) for p, d in zip(patch, divisor, strict=True))
    return tuple(strides), tuple(kernels), exact


def _normalisation(
    survey: Survey, config: PlanConfig, reasons: dict[str, str]
) -> tuple[Normalisation, tuple[tuple[float, float, float, float], ...]]:
    modalities = {case.modality for case in survey.cases}
    scheme: Normalisation = "ct" if modalities == {"CT"} else "z-score"
    reasons["normalisation"] = (
        "CT values mean the same in every scan: clip to the 0.5-99.5 percentiles of the foreground, one z-score for all"
        if scheme == "ct"
        else "intensities have no unit: each image gets its own z-score"
    )
    if config.normalisation is not None:
        scheme = config.normalisation
        reasons["normalisation"] = "set by data.plan.normalisation"
    intensity = tuple((c.p00_5, c.p99_5, c.mean, max(c.std, 1e-8)) for c in survey.intensity)
    return scheme, intensity


def _times(values: np.ndarray) -> str:
    return "×".join(str(round(float(v))) for v in values)
