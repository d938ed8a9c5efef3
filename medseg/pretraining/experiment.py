"""Everything that states a pretraining, as plain dataclasses: what `configs/pretraining.yaml` composes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from medseg.data.augment import AugmentConfig
from medseg.data.splits import refuse_fold
from medseg.errors import Code, MedsegError
from medseg.training.experiment import DataConfig, Experiment, SegmentationTrainerConfig, Stated
from medseg.training.trainer import TrainerConfig


@dataclass(frozen=True)
class PretrainingTrainerConfig(TrainerConfig):
    """The loop of a pretraining."""

    picture_cases: int = 3
    """Validation cases that are drawn at each validation, for TensorBoard and into the run's pictures/: a plane of the
    image, of what the network gets to see of it, and of its reconstruction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.picture_cases < 0:
            raise MedsegError(Code.CONFIG, "must be at least 0", where="trainer.picture_cases", got=self.picture_cases)
        if self.devices > 1:
            raise MedsegError(
                Code.CONFIG,
                "a pretraining runs in one process",
                where="trainer.devices",
                expected="1",
                got=self.devices,
                remedy="leave trainer.devices out; trainer.device chooses the GPU",
            )


@dataclass(frozen=True)
class PretrainingExperiment(Stated):
    """A pretraining. `model`, `method`, `optimizer` and `schedule` are built by name from their registries."""

    places: ClassVar[tuple[tuple[str, ...], ...]] = tuple(p for p in Experiment.places if p != ("trainer", "initial"))
    data: DataConfig
    """Where the images are and how they are seen; labels beside them are not looked at."""
    model: Mapping[str, Any]
    """name and settings of the segmenter that this begins; the network that reconstructs follows from it."""
    method: Mapping[str, Any]
    """name and settings of what is hidden and reconstructed."""
    optimizer: Mapping[str, Any]
    """name and settings of the optimizer."""
    schedule: Mapping[str, Any]
    """name and settings of the learning-rate schedule."""
    augment: AugmentConfig
    """What is varied in training patches, before anything is hidden."""
    trainer: PretrainingTrainerConfig
    """The loop."""
    task: Literal["pretraining"] = "pretraining"
    """What is learnt: segmentation (the default), classification or pretraining."""
    plan: str | None = None
    """A plan.yaml that medseg plan or a training wrote, or its folder: that of the labelled data makes a segmenter to
    come see its images as this network did; null plans from the images. Keys of data.plan win over it."""
    fold: int = 0
    """Which fold validates; the others train."""
    seed: int = 0
    """Seed of everything random."""
    resume: str | None = None
    """Folder of a run to go on with (`medseg train resume=RUN`)."""

    def __post_init__(self) -> None:
        unused = {"data.labels": self.data.labels, "data.regions_order": self.data.regions_order}
        for key in (key for key, value in unused.items() if value is not None):
            raise MedsegError(
                Code.CONFIG,
                "a pretraining looks at no labels",
                where=key,
                got=unused[key],
                remedy=f"leave {key} out",
            )
        if self.data.split.file is None:
            refuse_fold(self.fold, self.data.split)

    def segmenter(self) -> Experiment:
        """The training of a segmenter with the same network, images and machine: what is planned is its plan."""
        shared = {field.name: getattr(self.trainer, field.name) for field in dataclasses.fields(TrainerConfig)}
        return Experiment(
            data=self.data,
            model=self.model,
            loss={"name": "dice_ce"},
            optimizer=self.optimizer,
            schedule=self.schedule,
            augment=self.augment,
            trainer=SegmentationTrainerConfig(**shared),
            plan=self.plan,
            fold=self.fold,
            seed=self.seed,
        )
