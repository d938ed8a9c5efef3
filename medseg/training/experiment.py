"""Everything that states a training run, as plain dataclasses: what `configs/train.yaml` composes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from medseg.data.augment import AugmentConfig
from medseg.data.memory import available_bytes
from medseg.data.plan import PlanConfig
from medseg.data.splits import SplitConfig, num_folds, refuse_fold
from medseg.environment import usable_cores
from medseg.errors import Code, MedsegError
from medseg.formats import Reading
from medseg.formats.atomic import whole_file
from medseg.training.trainer import TrainerConfig

CONFIG_FILE = "config.yaml"
"""The configuration of a run, in its folder, without places on this machine."""
PLACES_FILE = "places.yaml"
"""Beside it, for its owner's eyes only: the places, whose names may tell who a patient is. Resuming needs them; a model
that is handed on does not."""
WORDS = ("auto", "imagenet")
"""What keys that hold paths may say instead."""
MAX_THREADS = 8
"""Most cases that are prepared at a time unless told: beyond, they wait for memory and for the disk."""
BYTES_OF_A_CASE = 2 * 2**30
"""What a case is taken to hold while it is prepared: a CT of 512×512×500 voxels with its label, before and after."""


@dataclass(frozen=True)
class DataConfig:
    """Where the cases are and how they are seen."""

    root: str | None = None
    """Folder of cases (dataset.json, images/ + labels/, one folder per case), a tree of DICOM series with SEG or
    RTSTRUCT files, a zip of these, or a CSV/JSON manifest. Of what a run writes only places.yaml holds this path:
    resume needs it."""
    manifest: str | None = None
    """A manifest (case, image, label, patient, split, stratum) whose paths are relative to `root`."""
    labels: Mapping[str, Any] | None = None
    """Classes as {name: value}, {name: [values]} or {name: rest}; null takes them from dataset.json or the files. A
    value under several names makes regions of them, which overlap: {tumour: [1, 2], core: 2}. Voxels with the values of
    "ignore" count neither in training nor in scores. Of a tree of DICOM files as {name: structure} or
    {name: [structures]}, such as {tumour: [GTV-1, gtv]}: structures are compared without case, later classes win where
    they overlap, and null takes the structures that all cases have."""
    regions_order: tuple[str, ...] | None = None
    """Names of the regions in the order in which predictions paint them, one over the other; null: the one of
    dataset.json (regions_class_order), else the larger ones first. Stating it makes regions of any classes."""
    modality: str | None = None
    """Of a tree of DICOM files: take the series of this modality only (CT, MR, PT, …)."""
    resample_irregular: bool = False
    """Resample DICOM series with gantry tilt, missing slices or uneven spacing to a regular grid instead of refusing
    them."""
    without_preamble: bool = False
    """Try DICOM on files without "DICM" at byte 128 (old archives)."""
    form: Literal["sform", "qform"] | None = None
    """What places NIfTI files that set both; null refuses those in which they disagree. A file that sets one of them is
    placed by that one."""
    without_form: bool = False
    """Read NIfTI files that set neither sform nor qform: their axes are then taken for right, anterior and superior."""
    on_bad_case: Literal["error", "skip"] = "error"
    """What a case that cannot be used does: end the run before its first step, or stay out and be listed."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which cases train and which validate."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Overrides of the plan."""
    store: str | None = "auto"
    """Folder that keeps what was read and prepared of each case, so that the next run need not do it again: entries are
    found by the content of the files and the settings. "auto": `prepared` beside the run's folder; null: keep nothing.
    It holds voxels of the cases, and can be deleted whenever no run is using it."""
    in_memory: bool | Literal["auto"] = "auto"
    """Whether prepared cases lie in memory (true), or their patches are read from the store (false); auto: in memory as
    many as fit into half of what is free."""
    num_threads: int | None = None
    """Cases read and prepared at a time, each held in memory meanwhile; null: as many as there are cores for this
    process, at most 8, and no more than fit into the free memory if they are as large as a CT usually is."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads <= 0:
            raise MedsegError(Code.CONFIG, "must be positive", where="data.num_threads", got=self.num_threads)

    @property
    def threads(self) -> int:
        """`num_threads`, or what this machine makes of it."""
        if self.num_threads is not None:
            return self.num_threads
        from medseg.diagnosis.hardware import cpu_quota  # half of what looks at machines: not for a mere configuration

        cores = min(usable_cores(), cpu_quota() or math.inf)
        return max(1, min(int(cores), MAX_THREADS, available_bytes() // BYTES_OF_A_CASE))

    @property
    def reading(self) -> Reading:
        """What is asked of the readers."""
        return Reading(
            resample_irregular=self.resample_irregular,
            without_preamble=self.without_preamble,
            form=self.form,
            without_form=self.without_form,
        )


@dataclass(frozen=True)
class SegmentationTrainerConfig(TrainerConfig):
    """The loop."""

    positive: ClassVar[tuple[str, ...]] = (*TrainerConfig.positive, "overfit_cases")

    foreground_share: float = 0.33
    """Share of a batch that is centred on foreground."""
    even_classes: bool = False
    """Centre patches on each class equally often, also on one that few cases have: the class is drawn before the case.
    false draws the case first, and then one of its classes (as nnU-Net)."""
    initial: str | None = None
    """Begin with the weights of this run (trained, pretrained without labels, or converted from nnU-Net): fine-tuning.
    Its network is taken over, and its plan where no key of data.plan says otherwise; heads for other classes, and all
    heads after a pretraining, begin anew."""
    overlay_cases: int = 3
    """Validation cases whose overlays are drawn for TensorBoard at each validation."""
    map_cases: int = 1
    """Validation cases whose feature maps TensorBoard gets at each validation, with the network's first filters: of a
    patch around a structure, the maps of the first stage, the coarsest ones, and the last before the scores. 0 draws
    neither."""
    histograms: bool = False
    """Whether TensorBoard gets a histogram of each layer's weights at each validation."""
    embedding_cases: int = 100
    """At the end, most cases that TensorBoard's projector shows: the mean of their coarsest feature maps, half a minute
    at most. 0 makes no projector."""
    overfit_cases: int | None = None
    """Debugging: train on this many cases and validate on the same ones."""
    final_predictions: bool = True
    """At the end predict and score the validation cases with the best checkpoint on the scans' own grids."""
    report: bool = True
    """At the end write report.html: scores, pictures, curves, failures and the model card as one page."""
    postprocess: Literal["auto", "off"] = "auto"
    """auto: where the final predictions are better so, `medseg predict` keeps only the largest component of all
    foreground or of a class (the run's postprocessing.md says why)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("overlay_cases", "map_cases", "embedding_cases"):
            if getattr(self, name) < 0:
                raise MedsegError(Code.CONFIG, "must be at least 0", where=f"trainer.{name}", got=getattr(self, name))
        if not 0 <= self.foreground_share <= 1:
            raise MedsegError(
                Code.CONFIG, "a share lies between 0 and 1", where="trainer.foreground_share", got=self.foreground_share
            )


class Stated:
    """The dataclass of everything that states a run of a task."""

    places: ClassVar[tuple[tuple[str, ...], ...]]
    """The keys that hold paths."""
    resume: str | None
    """Folder of a run to go on with."""


@dataclass(frozen=True)
class Experiment(Stated):
    """A training run. `model`, `loss`, `optimizer` and `schedule` are built by name from their registries."""

    places: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("data", "root"),
        ("data", "manifest"),
        ("data", "store"),
        ("data", "split", "file"),
        ("trainer", "initial"),
        ("model", "weights"),
        ("model", "classifier"),
        ("plan",),
        ("resume",),
    )
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
    trainer: SegmentationTrainerConfig
    """The loop."""
    task: Literal["segmentation"] = "segmentation"
    """What is learnt: segmentation (the default), classification or pretraining."""
    plan: str | None = None
    """A plan.yaml that medseg plan or an earlier run wrote, perhaps edited, or its folder; null plans from the data.
    Keys of data.plan win over it."""
    fold: int = 0
    """Which fold validates; the others train."""
    folds: Literal["all"] | tuple[int, ...] | None = None
    """Several folds, one after the other, with their cross-validation: all, or a list such as [0,1]; null trains `fold`
    alone."""
    seed: int = 0
    """Seed of everything random."""
    resume: str | None = None
    """Folder of a run to go on with (`medseg train resume=RUN`)."""

    def __post_init__(self) -> None:
        if self.folds is not None:
            self._refuse_folds()
        if self.data.split.file is None:
            for number in self.fold_numbers:
                refuse_fold(number, self.data.split)

    def _refuse_folds(self) -> None:
        stated = {
            "fold": self.fold != 0,
            "data.split.validation": self.data.split.validation is not None,
            "trainer.overfit_cases": self.trainer.overfit_cases is not None,
        }
        for key in (key for key, is_set in stated.items() if is_set):
            raise MedsegError(
                Code.CONFIG,
                f"folds and {key} do not go together",
                where="folds",
                got=f"folds={self.folds} and {key}",
                remedy="leave one of them out",
            )
        if not self.folds or (self.folds != "all" and len(set(self.folds)) < len(self.folds)):
            raise MedsegError(
                Code.CONFIG,
                "each fold is trained once",
                where="folds",
                expected="all, or a list such as [0,1]",
                got=self.folds,
            )

    @property
    def fold_numbers(self) -> tuple[int, ...]:
        """The folds that are trained; those of a file are checked where they are taken from it.

        Raises:
            MedsegError: what reading data.split.file refuses; E_CONFIG if it states one split only.
        """
        split = self.data.split
        if self.folds is None:
            return (self.fold,)
        count = num_folds(split)
        if count < 2:
            raise MedsegError(
                Code.CONFIG,
                "the file states one split: there are no folds to go through",
                where="data.split.file",
                remedy="leave folds out, or give a list of splits as nnU-Net's splits_final.json",
            )
        return tuple(range(count)) if self.folds == "all" else self.folds


class _Plain(yaml.SafeDumper):
    """YAML in which every text that another reader might take for something else is quoted (1e5, 0x10)."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isidentifier() else '"')


_Plain.add_representer(str, _quoted)


def write_config(experiment: Stated, run: Path) -> None:
    """Write the configuration of a run into its folder: `CONFIG_FILE`, and `PLACES_FILE` for its owner alone.

    Raises:
        MedsegError: E_OUTPUT.
    """
    values, places = without_places(experiment)
    for name, content in ((PLACES_FILE, places), (CONFIG_FILE, values)):
        text = yaml.dump(content, Dumper=_Plain, sort_keys=False, allow_unicode=True)
        with whole_file(run / name, ".yaml") as temporary:
            temporary.touch(mode=0o600 if name == PLACES_FILE else 0o666)
            temporary.write_text(text, encoding="utf-8")


def is_place(value: object) -> bool:
    """Whether the value of a key that may hold a path is one, and not a word or a table that stands there instead."""
    return isinstance(value, str) and value not in WORDS


def without_places(experiment: Stated) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration as plain values with null for each of its `places`; and these, by their keys with dots."""
    values: dict[str, Any] = _plain(dataclasses.asdict(experiment))  # type: ignore[call-overload]
    places: dict[str, str] = {}
    for *groups, last in experiment.places:
        group = values
        for name in groups:
            group = group[name]
        if is_place(group.get(last)):
            places[".".join((*groups, last))] = group[last]
            group[last] = None
    return values, places


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
