"""What a plan holds, the keys that override it, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.registry import make_config

Axes = tuple[int, ...]
Normalisation = Literal["z-score", "ct", "rescale", "none"]
Configuration = Literal["fullres", "lowres", "2d"]
Preset = Literal["auto", "nnunet", "resenc_m", "resenc_l", "resenc_xl"]


@dataclass(frozen=True)
class PlanConfig:
    """Overrides of the plan; null takes the planned value."""

    preset: Preset = "auto"
    """Whose rules: "auto" (ours, for the device), or exactly nnU-Net's: "nnunet" and its residual-encoder presets for
    8, 24 and 40 GB ("resenc_m", "resenc_l", "resenc_xl"). `preset=` sets this together with the network."""
    configuration: Configuration | None = None
    """"fullres", "lowres" (the same network at a coarser spacing, where its patch sees more: worth a second run where
    the plan says that a patch holds less than a quarter of the median volume), or "2d" (slice by slice); null: fullres,
    or 2d where the volumes have one slice."""
    memory_gb: float | None = None
    """Memory that a training step may take, in GiB; null: what the device has."""
    orientation: str | None = None
    """Where the axes run to that the network sees, such as SPL (superior, posterior, left)."""
    spacing_mm: tuple[float, ...] | None = None
    """Voxel size that the network sees, along the axes of `orientation`, in mm."""
    crop: bool | None = None
    """Whether borders of zeros are cut off before anything else."""
    normalisation: Normalisation | tuple[Normalisation, ...] | None = None
    """Intensities, one for all channels or one for each: "z-score" of each image, "ct" (clip to the training set's
    percentiles, then its z-score), "rescale" (each image to 0..1), "none"."""
    mask_normalisation: bool | None = None
    """Whether a z-score is that of the nonzero voxels only; all others then stay 0."""
    patch_size: tuple[int, ...] | None = None
    """Size of training patches and prediction tiles in voxels, along the axes of `orientation`."""
    batch_size: int | None = None
    """Patches in a batch."""
    base_width: int | None = None
    """Filters of the first stage; each further stage doubles them."""
    num_stages: int | None = None
    """Resolution stages, the bottleneck included."""


@dataclass(frozen=True)
class Plan:
    """What the network sees and how it is shaped. Axes are those of `orientation`, or (row, column)."""

    preset: Preset
    """Whose rules made it."""
    configuration: Configuration
    """"2d": slice by slice; of volumes this is a network in 3D whose patches and filters are one voxel thick along the
    first axis, and slices are not resampled along it. Pictures are always "fullres"."""
    spatial_dims: int
    """2 or 3."""
    num_channels: int
    """Channels of an image."""
    orientation: str
    """Orientation of the array axes that the network sees; "" for pictures."""
    spacing_mm: tuple[float, ...]
    """Voxel size that the network sees, in mm (1 pixel for pictures)."""
    crop: bool
    """Whether images are cut to the box of voxels that are not 0 in any channel, before anything else."""
    normalisation: tuple[Normalisation, ...]
    """For each channel: "z-score" of the image, "ct" (`intensity`), "rescale" (minimum and maximum of the image to 0
    and 1) or "none"."""
    mask_normalisation: bool
    """Whether a z-score is taken inside the nonzero voxels only (of any channel, holes filled); outside becomes 0."""
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
    memory_gb: float
    """Memory that a training step is estimated to take, in GiB."""
    reasons: Mapping[str, str]
    """Why each value is what it is."""

    def __post_init__(self) -> None:
        self._refuse(self.spatial_dims in (2, 3), "spatial_dims", "2 or 3")
        dims, stages = self.spatial_dims, len(self.widths)
        for key in ("normalisation", "intensity"):
            count = len(getattr(self, key))
            self._refuse(count == self.num_channels, key, f"one for each of {self.num_channels} channel(s)")
        for key in ("spacing_mm", "patch_size"):
            value = getattr(self, key)
            self._refuse(len(value) == dims and all(0 < v < math.inf for v in value), key, f"{dims} positive numbers")
        for key in ("kernels", "strides"):
            value = getattr(self, key)
            self._refuse(len(value) == stages, key, f"one for each of {stages} stages (widths)")
            fits = all(len(of_stage) == dims and min(of_stage) > 0 for of_stage in value)
            self._refuse(fits, key, f"{dims} positive numbers for each stage")
        whole = all(math.isfinite(number) for numbers in self.intensity for number in numbers)
        self._refuse(whole, "intensity", "numbers")  # NaN would make every voxel NaN, and labels of chance
        self._refuse(stages > 0 and min(self.widths) > 0, "widths", "positive numbers")
        self._refuse(self.batch_size > 0, "batch_size", "a positive number")
        self._refuse(len(self.orientation) == (3 if dims == 3 and self.orientation else 0), "orientation", "3 letters")
        whole = self.configuration != "2d" or (dims == 3 and self.patch_size[0] == 1)
        self._refuse(whole, "patch_size", "1 along the first axis: slice by slice (configuration 2d)")

    def _refuse(self, fits: bool, key: str, expected: str) -> None:
        """Raise E_CONFIG where a value does not fit the others."""
        if not fits:
            raise MedsegError(
                Code.CONFIG,
                f"the plan's {key} does not fit the rest of it",
                where=f"plan.{key}",
                expected=expected,
                got=getattr(self, key),
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the form of `from_json`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Read back what `to_json` gave.

        Raises:
            MedsegError: E_CONFIG if a field is missing or unknown, or does not fit the others.
        """
        try:
            return make_config(cls, values, where="plan")
        except TypeError as error:
            raise MedsegError(Code.CONFIG, f"the plan is incomplete: {error}", where="plan") from error

    def write(self, path: Path) -> None:
        """Write `plan.yaml`: each value with its reason as a comment above it."""
        lines = ["# How the network sees the data. Override a value with data.plan.KEY=VALUE."]
        values = self.to_json()
        for field in fields(self):
            if field.name == "reasons":
                continue
            lines += [f"# {self.reasons[field.name]}"] if field.name in self.reasons else []
            lines.append(f"{field.name}: {_in_yaml(values[field.name])}")
        with whole_file(path, ".yaml") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _in_yaml(value: Any) -> str:
    """A value on one line, as JSON writes it but for numbers such as 1e-08, which PyYAML would take for text."""
    if isinstance(value, list):
        return f"[{', '.join(map(_in_yaml, value))}]"
    if isinstance(value, float):
        text: str = yaml.representer.SafeRepresenter().represent_float(value).value
        return text
    return json.dumps(value)


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
