"""Everything that states a training run, as plain dataclasses: what `configs/train.yaml` composes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from medseg.data.augment import AugmentConfig
from medseg.data.plan import PlanConfig
from medseg.data.splits import SplitConfig
from medseg.errors import Code, MedsegError
from medseg.formats import Reading

DEFAULT_MAX_STEPS = 20_000
"""Steps of a training that states no budget at all."""


@dataclass(frozen=True)
class DataConfig:
    """Where the cases are and how they are seen."""

    root: str | None = None
    """Folder of cases (dataset.json, images/ + labels/, one folder per case), a tree of DICOM series with SEG or
    RTSTRUCT files, a zip of these, or a CSV/JSON manifest. Of what a run writes only config.yaml and .hydra hold this
    path: resume needs it."""
    manifest: str | None = None
    """A manifest (case, image, label, patient, split) whose paths are relative to `root`."""
    labels: Mapping[str, Any] | None = None
    """Classes as {name: value}, {name: [values]} or {name: rest}; null takes them from dataset.json or the files. Of a
    tree of DICOM files as {name: structure} or {name: [structures]}, such as {tumour: [GTV-1, gtv]}: structures are
    compared without case, later classes win where they overlap, and null takes the structures that all cases have."""
    modality: str | None = None
    """Of a tree of DICOM files: take the series of this modality only (CT, MR, PT, …)."""
    resample_irregular: bool = False
    """Resample DICOM series with gantry tilt, missing slices or uneven spacing to a regular grid instead of refusing
    them."""
    without_preamble: bool = False
    """Try DICOM on files without "DICM" at byte 128 (old archives)."""
    on_bad_case: Literal["error", "skip"] = "error"
    """What a case that cannot be used does: end the run before its first step, or stay out and be listed."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which cases train and which validate."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Overrides of the plan."""
    num_threads: int = 2
    """Cases read at a time."""

    @property
    def reading(self) -> Reading:
        """What is asked of the readers."""
        return Reading(resample_irregular=self.resample_irregular, without_preamble=self.without_preamble)


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    max_steps: int | None = None
    """Optimizer steps; null with no time budget means 20000."""
    max_minutes: float | None = None
    """Time budget of the loop with its validations, in minutes; the schedule then runs over time. Whichever of both
    ends first counts."""
    num_validations: int = 10
    """Validations on whole volumes, evenly spread over the training; the last one is at its end. Under a time budget
    there are fewer where they would take more than a fifth of it."""
    patience: int | None = None
    """Stop early after this many validations without a better Dice; null never stops early."""
    foreground_share: float = 0.33
    """Share of a batch that is centred on foreground."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    precision: str = "auto"
    """auto (bf16 where the processor has it), bf16, fp16 or fp32."""
    save_minutes: float = 5.0
    """The latest checkpoint is written at least this often, and at each validation."""
    log_steps: int = 10
    """Steps between entries of the training loss."""
    overlay_cases: int = 3
    """Validation cases whose overlays are drawn for TensorBoard at each validation."""
    overfit_cases: int | None = None
    """Debugging: train on this many cases and validate on the same ones."""
    final_predictions: bool = True
    """At the end predict and score the validation cases with the best checkpoint on the scans' own grids."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_minutes", "num_validations", "patience", "log_steps", "overfit_cases"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise MedsegError(Code.CONFIG, "must be positive", where=f"trainer.{name}", got=value)
        if not 0 <= self.foreground_share <= 1:
            raise MedsegError(
                Code.CONFIG, "a share lies between 0 and 1", where="trainer.foreground_share", got=self.foreground_share
            )

    @property
    def steps(self) -> float:
        """Budget in steps; infinite where only time bounds it."""
        if self.max_steps is not None:
            return self.max_steps
        return DEFAULT_MAX_STEPS if self.max_minutes is None else float("inf")

    @property
    def minutes(self) -> float:
        """Budget in minutes; infinite where only steps bound it."""
        return float("inf") if self.max_minutes is None else self.max_minutes


@dataclass(frozen=True)
class Experiment:
    """A training run. `model`, `loss`, `optimizer` and `schedule` are built by name from their registries."""

    data: DataConfig
    """Where the cases are and how they are seen."""
    model: Mapping[str, Any]
    """name and settings of the network."""
    loss: Mapping[str, Any]
    """name and settings of the loss."""
    optimizer: Mapping[str, Any]
    """name and settings of the optimizer."""
    schedule: Mapping[str, Any]
    """name and settings of the learning-rate schedule."""
    augment: AugmentConfig
    """What is varied in training patches."""
    trainer: TrainerConfig
    """The loop."""
    seed: int = 0
    """Seed of everything random."""
    resume: str | None = None
    """Folder of a run to go on with (`medseg train resume=RUN`)."""
