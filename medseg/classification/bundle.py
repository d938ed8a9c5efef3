"""A trained classifier on disk: `bundle.json` (with `task: classification`), its weights, and its thresholds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from medseg import __version__
from medseg.bundle import BUNDLE_FILE, checkpoint_path, opened, read_checkpoint, write_atomically
from medseg.bundle.checkpoint import weights_in
from medseg.bundle.info import BUNDLE_FORMAT, MAX_DESCRIPTION_BYTES, TASK_KEY, built_with
from medseg.classification.sight import Sight
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.models.classifiers import CLASSIFIERS, ClassificationModel
from medseg.registry import make_config

CLASSIFICATION = "classification"
THRESHOLDS_FILE = "operating_points.json"
"""Of a run: for each class and operating point the threshold that the validation images gave."""

Thresholds = Mapping[str, Mapping[str, float]]
"""Class → operating point in words → threshold of its probability; what could not be chosen is left out."""


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier is, without its weights.

    Args:
        model: the settings that `CLASSIFIERS.build` takes, complete, and without places on a machine.
        classes: names of the outputs, in order; of two the second is the positive one.
        sight: what it sees of an image.
        modality: "CT", "MR", … of all training images; None where they differ or do not tell.
    """

    model: Mapping[str, Any]
    classes: tuple[str, ...]
    sight: Sight
    modality: str | None = None

    def build_model(self) -> ClassificationModel:
        """The network with fresh weights."""
        return CLASSIFIERS.build(
            self.model,
            in_channels=self.sight.num_channels,
            num_classes=len(self.classes),
            spatial_dims=self.sight.spatial_dims,
        )

    @property
    def shown(self) -> tuple[str, ...]:
        """The classes whose curves are shown: of two the positive one, else all."""
        return self.classes[1:] if len(self.classes) == 2 else self.classes

    def write(self, run: Path) -> None:
        """Write `bundle.json` into a run's folder."""
        content = {
            "format": BUNDLE_FORMAT,
            "medseg": __version__,
            TASK_KEY: CLASSIFICATION,
            "model": dict(self.model),
            "classes": list(self.classes),
            "sight": self.sight.to_json(),
            "modality": self.modality,
        }
        write_atomically(run / BUNDLE_FILE, json.dumps(content, indent=2).encode())

    @classmethod
    def read(cls, run: Path) -> ClassifierInfo:
        """Read `bundle.json` of a run that classifies.

        Raises:
            MedsegError: E_RUN if it is none or cannot be read; E_VERSION if another medseg wrote it.
        """
        content = _description(opened(run))
        if content is None or content.get(TASK_KEY) != CLASSIFICATION:
            raise MedsegError(
                Code.RUN,
                "this is no run that classifies",
                where=run,
                expected=f"a folder that medseg train task={CLASSIFICATION} made",
                remedy="give the run's folder: medseg train prints it when it ends",
            )
        check_format(content, BUNDLE_FORMAT, where=run / BUNDLE_FILE)
        try:
            model, classes = content["model"], content["classes"]
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                raise ValueError("model has no name")
            if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(c, str) for c in classes):
                raise ValueError("classes are no list of names")
            sight = make_config(Sight, content["sight"], where="sight")
            return cls(model, tuple(classes), sight, content.get("modality"))
        except (ValueError, KeyError, TypeError, AttributeError, MedsegError) as error:
            raise MedsegError(
                Code.RUN,
                "the run's description cannot be read",
                where=run / BUNDLE_FILE,
                got=f"{type(error).__name__}: {error}",
            ) from error


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier, in eval mode, with the thresholds that its validation images gave."""

    info: ClassifierInfo
    model: ClassificationModel
    run: Path
    checkpoint: str
    thresholds: Thresholds = field(default_factory=dict)


def is_classifier(run: Path) -> bool:
    """Whether a folder holds a run that classifies. What is broken is none: its reader says why."""
    content = _description(run) if run.is_dir() else None
    return content is not None and content.get(TASK_KEY) == CLASSIFICATION


def load_classifier(run: Path, *, checkpoint: str = "best", device: torch.device | str = "cpu") -> Classifier:
    """Open a trained classifier.

    Args:
        run: the folder that `medseg train task=classification` made.
        checkpoint: "best" (by validation) or "latest".
        device: where the network goes.
    Raises:
        MedsegError: E_RUN, E_VERSION, E_CHECKPOINT, or E_MODEL if the weights do not fit the network.
    """
    run = opened(run)
    info = ClassifierInfo.read(run)
    path = checkpoint_path(run, checkpoint)
    tensors, _ = read_checkpoint(path)
    model = built_with(info.build_model, weights_in(tensors), description=run / BUNDLE_FILE, where=path)
    thresholds = read_thresholds(run / THRESHOLDS_FILE)
    return Classifier(info, model.to(device).eval(), run, checkpoint, thresholds)


def read_thresholds(path: Path) -> Thresholds:
    """Thresholds by class and operating point; {} where the file is not there.

    Raises:
        MedsegError: E_RUN if it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))["thresholds"]
        return {str(c): {str(p): float(t) for p, t in points.items()} for c, points in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedsegError(
            Code.RUN, "the thresholds cannot be read", where=path.name, got=f"{type(error).__name__}: {error}"
        ) from error


def write_thresholds(path: Path, thresholds: Thresholds, chosen_on: str) -> None:
    """Write what `read_thresholds` reads."""
    content = {"chosen_on": chosen_on, "thresholds": {c: dict(points) for c, points in thresholds.items()}}
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False).encode())


def _description(run: Path) -> dict[str, Any] | None:
    path = run / BUNDLE_FILE
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            return None
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
