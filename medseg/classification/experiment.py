"""Everything that states the training of a classifier, as plain dataclasses: what `configs/classification.yaml`
composes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from medseg.classification.sight import Normalisation
from medseg.data.augment import AugmentConfig
from medseg.data.splits import SplitConfig, refuse_fold
from medseg.environment import usable_cores
from medseg.errors import Code, MedsegError
from medseg.formats import Reading
from medseg.metrics.classification import OperatingPoint
from medseg.training.experiment import MAX_THREADS, Stated
from medseg.training.trainer import TrainerConfig


@dataclass(frozen=True)
class ClassificationDataConfig:
    """Where the images are, which classes they have, and how they are seen."""

    root: str | None = None
    """Folder of class folders (or of train, val and test with class folders inside), a CSV (image, class, perhaps case,
    patient and split; paths relative to it), or an npz as MedMNIST's. Images are what medseg reads: PNG, TIFF, JPEG,
    NIfTI, DICOM files, folders of a DICOM series. Of what a run writes only places.yaml holds this path."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the outputs: of folders and tables those to take, of an npz what its numbers
    mean; null takes all, sorted. Of two classes the second is the positive one."""
    positive: str | None = None
    """Of two classes the positive one, such as the disease: it is put last. null leaves the order."""
    size: tuple[int, ...] | None = None
    """Voxels along each axis of what the network sees; null: the median of the training images, at most 224 (pictures)
    or 96 (volumes). Pictures are scaled to fit with their aspect kept, and padded."""
    spacing_mm: tuple[float, ...] | None = None
    """Voxels of volumes in mm, slices first; null: the median, coarser where the volumes would be larger than the
    size. Volumes are cut or padded about their middle."""
    channels: Literal["auto", "grey", "colour"] = "auto"
    """Of pictures; auto: colour if any of them has some."""
    normalisation: Literal["auto"] | Normalisation = "auto"
    """z-score: each image by its own mean and deviation; rescale: each to 0–1; dataset: by the training images'
    percentiles, mean and deviation; imagenet: to 0–1, then as torchvision's weights were trained. auto: imagenet where
    the network begins with such weights, dataset for CT, else z-score."""
    on_bad_case: Literal["error", "skip"] = "error"
    """What an image that cannot be read does: end the run before its first step, or stay out and be listed."""
    resample_irregular: bool = False
    """Resample DICOM series with gantry tilt, missing slices or uneven spacing to a regular grid instead of refusing
    them."""
    without_preamble: bool = False
    """Try DICOM on files without "DICM" at byte 128 (old archives)."""
    form: Literal["sform", "qform"] | None = None
    """What places NIfTI files that set both; null refuses those in which they disagree."""
    without_form: bool = False
    """Read NIfTI files that set neither sform nor qform: their axes are then taken for right, anterior and superior."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which images train and which validate. Given splits are kept; test images are only scored, at the end."""
    num_threads: int | None = None
    """Images read at a time; null: as many as there are cores, at most 8."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads <= 0:
            raise MedsegError(Code.CONFIG, "must be positive", where="data.num_threads", got=self.num_threads)

    @property
    def threads(self) -> int:
        """`num_threads`, or what this machine makes of it."""
        return self.num_threads or max(1, min(usable_cores(), MAX_THREADS))

    @property
    def reading(self) -> Reading:
        """What is asked of the readers."""
        return Reading(
            channels=True,
            resample_irregular=self.resample_irregular,
            without_preamble=self.without_preamble,
            form=self.form,
            without_form=self.without_form,
        )


@dataclass(frozen=True)
class ClassificationTrainerConfig(TrainerConfig):
    """The loop of a classifier."""

    positive: ClassVar[tuple[str, ...]] = (*TrainerConfig.positive, "batch_size", "overfit_cases")

    batch_size: int = 32
    """Images of a batch."""
    class_weights: Literal["auto", "off"] = "auto"
    """auto: classes with few images count more in the loss, by the inverse of their share."""
    label_smoothing: float = 0.0
    """Share of a target that is spread over all classes."""
    backbone_lr_factor: float = 1.0
    """Learning rate of all that lies before the head, as a multiple of the head's: such as 0.1 where it begins with
    trained weights. See model.frozen_stages for 0."""
    score: Literal["auc", "balanced_accuracy", "loss"] = "auc"
    """What decides which weights are the best: the mean area under the ROC curves, the mean recall, or the loss; of
    equal ones those with the lowest loss."""
    operating_points: tuple[str, ...] = ("youden", "sensitivity>=0.95", "specificity>=0.95")
    """How thresholds are chosen, on the validation images: youden, sensitivity>=X, specificity>=X, threshold=X."""
    overfit_cases: int | None = None
    """Debugging: train on this many images of each class and validate on the same ones."""
    worst_cases: int = 6
    """Cases that the report shows with a map of what spoke for the predicted class (Grad-CAM)."""
    report: bool = True
    """At the end write report.html: ROC curves, confusion matrix, calibration, worst cases, the model card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.operating_points:
            OperatingPoint.parse(text, where="trainer.operating_points")
        if not 0 <= self.label_smoothing < 1:
            raise MedsegError(
                Code.CONFIG,
                "a share of the target lies between 0 and 1",
                where="trainer.label_smoothing",
                got=self.label_smoothing,
            )
        if not 0 < self.backbone_lr_factor < math.inf or self.worst_cases < 0:
            where = "trainer.worst_cases" if self.worst_cases < 0 else "trainer.backbone_lr_factor"
            raise MedsegError(
                Code.CONFIG,
                "must be above 0" if self.worst_cases >= 0 else "must be at least 0",
                where=where,
                got=self.worst_cases if self.worst_cases < 0 else self.backbone_lr_factor,
                remedy="freeze stages with model.frozen_stages" if self.worst_cases >= 0 else None,
            )
        if self.devices > 1:
            raise MedsegError(
                Code.CONFIG,
                "a classifier trains in one process",
                where="trainer.devices",
                expected="1",
                got=self.devices,
                remedy="leave trainer.devices out; trainer.device chooses the GPU",
            )


@dataclass(frozen=True)
class ClassificationExperiment(Stated):
    """The training of a classifier. `model`, `optimizer` and `schedule` are built by name from their registries."""

    places: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("data", "root"),
        ("data", "split", "file"),
        ("model", "weights"),
        ("resume",),
    )
    data: ClassificationDataConfig
    """Where the images are and how they are seen."""
    model: Mapping[str, Any]
    """name and settings of the network."""
    optimizer: Mapping[str, Any]
    """name and settings of the optimizer."""
    schedule: Mapping[str, Any]
    """name and settings of the learning-rate schedule."""
    augment: AugmentConfig
    """What is varied in training images."""
    trainer: ClassificationTrainerConfig
    """The loop."""
    task: Literal["classification"] = "classification"
    """What is learnt: segmentation (the default), classification or pretraining."""
    fold: int = 0
    """Which fold validates, where no split is given; the others train."""
    seed: int = 0
    """Seed of everything random."""
    resume: str | None = None
    """Folder of a run to go on with (`medseg train resume=RUN`)."""

    def __post_init__(self) -> None:
        if self.data.split.file is None:
            refuse_fold(self.fold, self.data.split)
