"""What is looked at: the network of a run, of a plan, or of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from medseg.bundle import BundleInfo, load_bundle
from medseg.data.plan.file import read_plan
from medseg.data.plan.memory import complete_settings
from medseg.errors import Code, MedsegError
from medseg.explain.network import Network, fitting_size
from medseg.inference.members import configurations_of
from medseg.models import MODELS
from medseg.models.classifiers import CLASSIFIERS

DEFAULT_SIZE = {2: 256, 3: 64}
"""Voxels along each axis where nothing says what the network is given, by the number of axes."""
CLASSIFIER_SIZE = {2: 224, 3: 96}
"""The same of classifiers: the largest images that training shows them by itself."""
PLAIN = "unet"
RESIDUAL = "residual_encoder_unet"
"""The networks that plans are made for."""

Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to look at.

    Args:
        name: what people call it.
        model: the network, in eval mode; with trained weights where `info` is there.
        settings: what it was built from, complete.
        size: of the image that it is looked at with.
        batch_size: patches of a training step.
        info: what a trained model is; None of a plan, a configuration, or a trained classifier.
        classes: of a trained classifier.
        notes: what else is to be known, one sentence each.
    """

    name: str
    model: Network
    settings: Mapping[str, Any]
    size: Axes
    batch_size: int = 1
    info: BundleInfo | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether the weights are those of a training."""
        return self.info is not None or bool(self.classes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the network's outputs: classes with the background, or regions."""
        if self.classes:
            return self.classes
        if self.info is None:
            return tuple(f"output {i}" for i in range(self.model.num_classes))
        labels = self.info.labels
        return labels.region_names if labels.regions else labels.names


def of_run(
    path: Path, *, checkpoint: str = "best", device: torch.device | str = "cpu", size: Axes | None = None
) -> Subject:
    """The trained network of a run; of folds and ensembles the first.

    Args:
        path: a run, a run of several folds, an ensemble, or the bundle of one.
        checkpoint: "best" or "latest".
        device: where the network goes.
        size: of the image; None is the patch of the plan.
    Raises:
        MedsegError: E_RUN, E_CHECKPOINT, E_MODEL, E_MISSING, and what opening a bundle refuses.
    """
    configurations = configurations_of(path)
    members = [member for configuration in configurations for member in configuration.members]
    bundle = load_bundle(members[0].run, checkpoint=checkpoint, device=device)
    notes = () if len(members) == 1 else (f"the first of {len(members)} models: {members[0].run.name}",)
    info = bundle.info
    plan = info.plan
    name = f"{info.model['name']} of {path.name}"
    return Subject(name, bundle.model, info.model, size or plan.patch_size, plan.batch_size, info, notes=notes)


def of_plan(
    path: Path, settings: Mapping[str, Any] | None = None, *, num_classes: int = 2, size: Axes | None = None
) -> Subject:
    """The network that a plan is made for, with fresh weights.

    Args:
        path: a plan file, or the folder that holds it.
        settings: of the network; None is the one that the plan's preset names.
        num_classes: classes, with the background, which a plan does not say.
        size: of the image; None is the patch of the plan.
    Raises:
        MedsegError: E_MISSING, E_CONFIG, E_MODEL.
    """
    plan = read_plan(path)
    settings = settings or {"name": RESIDUAL if plan.preset.startswith("resenc") else PLAIN}
    complete = complete_settings(settings, plan.widths, plan.kernels, plan.strides)
    model = MODELS.build(
        complete, in_channels=plan.num_channels, num_classes=num_classes, spatial_dims=plan.spatial_dims
    ).eval()
    return Subject(f"{complete['name']} of {path.name}", model, complete, size or plan.patch_size, plan.batch_size)


def of_settings(
    settings: Mapping[str, Any], *, in_channels: int = 1, num_classes: int = 2, size: Axes | None = None
) -> Subject:
    """The network of a configuration, with fresh weights.

    Args:
        settings: `name` and fields, as `MODELS.build` takes them, or `CLASSIFIERS.build`.
        in_channels: channels of the image.
        num_classes: classes, with the background.
        size: of the image, which says whether the network is one in 2D or 3D; None is 2D.
    Raises:
        MedsegError: E_NAME, E_CONFIG, E_MODEL.
    """
    dims = 2 if size is None else len(size)
    context = {"in_channels": in_channels, "num_classes": num_classes, "spatial_dims": dims}
    notes: tuple[str, ...] = ()
    model: Network
    if classifies(settings):
        lengths = size or (CLASSIFIER_SIZE[dims],) * dims
        known = {field.name for field in fields(CLASSIFIERS.part(settings["name"]).config)}
        if "image_size" in known and settings.get("image_size") is None:  # fully connected layers need to know it
            settings = {**settings, "image_size": lengths}
        model = CLASSIFIERS.build(settings, **context).eval()
    else:
        model = MODELS.build(settings, **context).eval()
        lengths = size or (DEFAULT_SIZE[dims],) * dims
    if size is None:
        size = fitting_size(model, lengths)
        notes = ("in 2D, with an image of a size that fits; --size 128x128x128 says another one, in 3D",)
    return Subject(str(settings.get("network") or settings["name"]), model, dict(settings), size, notes=notes)


def classifies(settings: Mapping[str, Any]) -> bool:
    """Whether a network is a classifier."""
    return settings.get("name") in CLASSIFIERS.names()


def parsed_size(text: str, *, where: str = "--size") -> Axes:
    """Sizes along axes as people write them: "572x572", "64,128,128".

    Raises:
        MedsegError: E_CONFIG.
    """
    try:
        size = tuple(int(part) for part in text.lower().replace("×", "x").replace(",", "x").split("x"))
    except ValueError:
        size = ()
    if len(size) not in (2, 3):
        raise MedsegError(
            Code.CONFIG, "this is no size of an image", where=where, expected="2 or 3 numbers: 572x572", got=repr(text)
        )
    return size


def output_named(subject: Subject, name: str | None, counts: Sequence[int]) -> int:
    """The number of a class.

    Args:
        subject: the network.
        name: of the class; None takes the one with the most voxels, not the background.
        counts: voxels that the network gives to each output.
    Raises:
        MedsegError: E_NAME for a class that the model does not know.
    """
    names = subject.outputs
    if name is not None:
        if name not in names:
            raise MedsegError(
                Code.NAME, "the model knows no such class", where="--class", expected=", ".join(names), got=name
            )
        return names.index(name)
    regions = subject.info is not None and bool(subject.info.labels.regions)
    first = 0 if regions else min(1, len(names) - 1)
    return max(range(first, len(names)), key=lambda number: counts[number])
