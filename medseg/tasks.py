"""What `medseg train task=NAME` can learn, and what states a run of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.classification.experiment import (
    ClassificationDataConfig,
    ClassificationExperiment,
    ClassificationTrainerConfig,
)
from medseg.data.augment import AugmentConfig
from medseg.documents import parse_yaml
from medseg.errors import Code, MedsegError, nearest
from medseg.losses import LOSSES
from medseg.models import MODELS
from medseg.models.classifiers import CLASSIFIERS
from medseg.pretraining.experiment import PretrainingExperiment, PretrainingTrainerConfig
from medseg.pretraining.methods import METHODS
from medseg.registry import Registry, described_fields
from medseg.training.experiment import DataConfig, Experiment, SegmentationTrainerConfig, Stated
from medseg.training.optimizers import OPTIMIZERS
from medseg.training.schedules import SCHEDULES


@dataclass(frozen=True)
class Task:
    """What `medseg train` can learn.

    Args:
        config: its main YAML of `configs/`, without suffix.
        experiment: everything that states a run of it.
        runs: the function that runs it, as "module:name": imported when it is called.
        parts: groups whose options are registered parts.
        plain: groups with one dataclass each, and the name of its defaults in Hydra.
    """

    config: str
    experiment: type[Stated]
    runs: str
    parts: Mapping[str, Registry[Any]]
    plain: Mapping[str, tuple[str, type]]

    def run(self, experiment: Any, run: Path) -> Any:
        """Train."""
        module, _, name = self.runs.partition(":")
        return getattr(importlib.import_module(module), name)(experiment, run)

    @property
    def groups(self) -> set[str]:
        """Keys that are tables of their own."""
        return {*self.parts, *self.plain}

    def options(self, group: str) -> list[str]:
        """The YAML files of a group that serve it: those that start from its defaults, or from none."""
        names = {f"_{name}" for name in self.parts[group].names()} if group in self.parts else set()
        names |= {self.plain[group][0]} if group in self.plain else set()
        paths = sorted((configs_folder() / group).glob("*.yaml"))
        if group not in self.groups:  # presets and the like, which set keys of several groups
            main = parse_yaml((configs_folder() / f"{self.config}.yaml").read_text(encoding="utf-8"))
            named = any(group in entry for entry in main["defaults"] if isinstance(entry, dict))
            return [path.stem for path in paths if named and self._has_all_keys_of(path)]
        found = {path.stem: _starts_from(path) for path in paths}
        return [name for name, start in found.items() if start is None or start in names]

    def _has_all_keys_of(self, path: Path) -> bool:
        """Whether everything that a YAML sets is there to be set."""
        content = parse_yaml(path.read_text(encoding="utf-8")) or {}
        for entry in content.pop("defaults", []):
            for place, option in entry.items() if isinstance(entry, dict) else ():
                group = str(place).removeprefix("override /")
                if group not in self.groups or option not in self.options(group):
                    return False
        known = {key for key, _, _ in described_fields(self.experiment)}
        known |= {key for group, (_, cls) in self.plain.items() for key, _, _ in described_fields(cls, group)}
        return all(key in known or key.split(".")[0] in self.parts for key in _keys(content))


TASKS: dict[str, Task] = {
    "segmentation": Task(
        config="train",
        experiment=Experiment,
        runs="medseg.training.train:train",
        parts={"model": MODELS, "loss": LOSSES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES},
        plain={
            "data": ("_data", DataConfig),
            "augment": ("_augment", AugmentConfig),
            "trainer": ("_trainer", SegmentationTrainerConfig),
        },
    ),
    "classification": Task(
        config="classification",
        experiment=ClassificationExperiment,
        runs="medseg.classification.train:train",
        parts={"model": CLASSIFIERS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES},
        plain={
            "data": ("_classification_data", ClassificationDataConfig),
            "augment": ("_augment", AugmentConfig),
            "trainer": ("_classification_trainer", ClassificationTrainerConfig),
        },
    ),
    "pretraining": Task(
        config="pretraining",
        experiment=PretrainingExperiment,
        runs="medseg.pretraining.train:train",
        parts={"model": MODELS, "method": METHODS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES},
        plain={
            "data": ("_data", DataConfig),
            "augment": ("_augment", AugmentConfig),
            "trainer": ("_pretraining_trainer", PretrainingTrainerConfig),
        },
    ),
}
"""What `task=` chooses from."""
LEFT_AS_THEY_ARE = {("data", "store"), ("resume",)}
"""Places that are made absolute where they are used: the store may be called "auto"."""
SEGMENTATION = "segmentation"
"""The task where nothing names one."""


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        MedsegError: E_CONFIG with the nearest names.
    """
    if name not in TASKS:
        raise MedsegError(
            Code.CONFIG,
            f"there is no task {name!r}",
            where=f"task={name}",
            expected=" | ".join(TASKS),
            remedy=nearest(name, list(TASKS)),
        )
    return TASKS[name]


def task_of(arguments: Sequence[str]) -> Task:
    """The task that a command line names.

    Raises:
        MedsegError: E_CONFIG if there is no such task.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    return task_named(named[-1] if named else SEGMENTATION)


def configs_folder() -> Path:
    """Where the YAML files lie: inside an installed wheel, or at the top of the source tree."""
    package = Path(__file__).resolve().parent
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def _starts_from(path: Path) -> str | None:
    """The defaults that a YAML begins with (`_unet`), if it names any."""
    defaults = (parse_yaml(path.read_text(encoding="utf-8")) or {}).get("defaults") or [None]
    first = defaults[0]
    return first if isinstance(first, str) and first.startswith("_") and first != "_self_" else None


def _keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of nested tables, with dots between them."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
