"""What a trained model is, without its weights (`bundle.json`), and the model with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from medseg import __version__
from medseg.bundle.archive import bundle_around, opened
from medseg.bundle.checkpoint import (
    check_weights_fit,
    checkpoint_path,
    read_checkpoint,
    weights_in,
    write_atomically,
)
from medseg.bundle.manifest import MANIFEST_FILE
from medseg.data.augment import Mirroring
from medseg.data.plan import Plan
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.labels import Labels
from medseg.models import MODELS, SegmentationModel
from medseg.models.shapes import ShapesOnly

BUNDLE_FILE = "bundle.json"
FOLDS_FILE = "folds.json"
"""In a folder of several runs that are the folds of one cross-validation: {"members": […], "finished": [of these]}."""
BUNDLE_FORMAT = 1
"""Raised when `bundle.json` changes in a way that older code would misread."""
EXPORTED = "exported"
"""In `bundle.json` of a bundle: it is used only together with the manifest that lists it."""
MAX_DESCRIPTION_BYTES = 2**22
"""Largest `bundle.json` that is read: with a thousand classes it has a hundredth of these 4 MiB."""
PARTS_PER_WEIGHT = 20
"""A network has this many layers and parameters for each tensor of its checkpoint at most: those of this toolkit and of
MONAI have two to eight, built twice …"""
MORE_PARTS = 1000
"""… and this many more."""
_NOT_BUILT = (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError)
"""What networks raise for settings that make none."""
TASK_KEY = "task"
"""In `bundle.json`: what was learnt, where that is not segmentation."""
M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class BundleInfo:
    """What a model is, without its weights.

    Args:
        model: the settings that `MODELS.build` takes, complete (nothing left to a plan).
        plan: what the network sees.
        labels: the classes.
        channels: names of the image channels, in order.
        mirror_axes: axes that training mirrored; others must not be mirrored in prediction.
        modality: "CT", "MR", … of all training cases; None where they differ or their files do not tell.
        structures: class name → the structures of DICOM annotations that mean it; None where labels were files.
        swap: classes or regions that change places when left and right are mirrored, each pair once.
        method: how a pretraining reconstructed images (name and settings of the method): its weights predict nothing,
            and `model` is the segmenter that they begin (`trainer.initial`). None of a model that segments.
    """

    model: Mapping[str, Any]
    plan: Plan
    labels: Labels
    channels: tuple[str, ...]
    mirror_axes: tuple[int, ...] = ()
    modality: str | None = None
    structures: Mapping[str, tuple[str, ...]] | None = None
    swap: Mapping[str, str] = field(default_factory=dict)
    method: Mapping[str, Any] | None = None

    @property
    def mirroring(self) -> Mirroring:
        """What training mirrors, and prediction may."""
        plan, labels = self.plan, self.labels
        return Mirroring.of(
            self.mirror_axes,
            self.swap,
            labels.declared,
            plan.orientation,
            plan.spatial_dims,
            membership=labels.membership()[: labels.num_classes] if labels.regions else None,
        )

    def build_model(self) -> SegmentationModel:
        """The network with fresh weights."""
        return MODELS.build(
            self.model,
            in_channels=self.plan.num_channels,
            num_classes=self.labels.num_outputs,
            spatial_dims=self.plan.spatial_dims,
        )

    def write(self, run: Path) -> None:
        """Write `bundle.json` into a run's folder."""
        content = {
            "format": BUNDLE_FORMAT,
            "medseg": __version__,
            "model": dict(self.model),
            "plan": self.plan.to_json(),
            "labels": self.labels.to_json(),
            "channels": list(self.channels),
            "mirror_axes": list(self.mirror_axes),
            "modality": self.modality,
            "structures": self.structures,
            "swap": dict(self.swap),
        }
        if self.method is not None:
            content |= {TASK_KEY: "pretraining", "method": dict(self.method)}
        write_atomically(run / BUNDLE_FILE, json.dumps(content, indent=2).encode())

    @classmethod
    def read(cls, run: Path) -> BundleInfo:
        """Read `bundle.json` of a run or a bundle; nothing is built yet.

        Raises:
            MedsegError: E_RUN if it is no run or its bundle cannot be read; E_VERSION if another medseg wrote it;
                E_MISSING for a bundle without its manifest; what `opened` refuses; E_CONFIG or E_LABEL for a plan or
                labels that are none.
        """
        path = opened(run) / BUNDLE_FILE
        if not path.is_file():
            raise MedsegError(
                Code.RUN,
                "this is not a run of medseg",
                where=run,
                expected=f"a folder with {BUNDLE_FILE}, as medseg train writes it, or a bundle of medseg export",
                remedy="give the run's folder: medseg train prints it when it starts and when it ends",
            )
        try:
            if path.stat().st_size > MAX_DESCRIPTION_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes are too many for a description")
            content = parse_json(path.read_text(encoding="utf-8"))
            check_format(content, BUNDLE_FORMAT, where=path)
            if content.get(EXPORTED):
                _check_is_vouched_for(path)
            if content.get(TASK_KEY) == "classification":
                raise MedsegError(
                    Code.MODEL,
                    "this run classifies whole images, which is not what is done here",
                    where=run,
                    expected="a run that segments",
                    got="task=classification",
                    remedy="medseg predict, evaluate, inspect and verify take it (docs/classification.md)",
                )
            model, structures = content["model"], content.get("structures")
            _check(isinstance(model, dict) and isinstance(model.get("name"), str), "model has no name")
            _check(_are(str, content["channels"]), "channels are no list of names")
            _check(_are(int, content["mirror_axes"]), "mirror_axes are no list of axes")
            _check(isinstance(content.get("modality"), str | None), "modality is no text")
            _check(isinstance(content.get("method"), dict | None), "method is no table")
            info = cls(
                model,
                Plan.from_json(content["plan"]),
                Labels.from_mapping(content["labels"]),
                tuple(content["channels"]),
                tuple(content["mirror_axes"]),
                content.get("modality"),
                structures and {str(name): tuple(map(str, drawn)) for name, drawn in structures.items()},
                {str(a): str(b) for a, b in content.get("swap", {}).items()},
                content.get("method"),
            )
            dims = info.plan.spatial_dims
            _check(all(0 <= axis < dims for axis in info.mirror_axes), "mirror_axes are not those of the plan")
            _check(len(info.channels) == info.plan.num_channels, "the plan has another number of channels")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise MedsegError(
                Code.RUN, "the run's description cannot be read", where=path, got=f"{type(error).__name__}: {error}"
            ) from error
        return info


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model ready to predict: `info` and the network with its trained weights, in eval mode."""

    info: BundleInfo
    model: SegmentationModel
    run: Path
    checkpoint: str


def load_bundle(run: Path, *, checkpoint: str = "best", device: torch.device | str = "cpu") -> Bundle:
    """Open a trained model. Sizes, digests and descriptions are checked before the network is built.

    Args:
        run: the folder that `medseg train` made, or what `medseg export` made of it.
        checkpoint: "best" (by validation Dice) or "latest".
        device: where the network goes.
    Raises:
        MedsegError: E_RUN if there is no such run, E_CHECKPOINT if the checkpoint is missing or damaged, E_MODEL if
            its weights do not fit the network or it is a pretraining; what `BundleInfo.read` refuses.
    """
    run = opened(run)
    info = BundleInfo.read(run)
    if info.method is not None:
        raise MedsegError(
            Code.MODEL,
            "this run is a pretraining: it has learnt to reconstruct images, and segments nothing",
            where=run,
            expected="a run that was trained with labels",
            got=f"task=pretraining method={info.method.get('name')}",
            remedy=f"train a segmenter that begins with it: medseg train data.root=FOLDER trainer.initial={run}",
        )
    path = checkpoint_path(run, checkpoint)
    tensors, _ = read_checkpoint(path)
    model = built_with(info.build_model, weights_in(tensors), description=run / BUNDLE_FILE, where=path)
    return Bundle(info, model.to(device).eval(), run, checkpoint)


def built_with(build: Callable[[], M], weights: Mapping[str, torch.Tensor], *, description: Path, where: Path) -> M:
    """A network that a stranger may have described, with its weights.

    Args:
        build: builds it with fresh weights.
        weights: by the names that the network gives them.
        description: the file that describes it, for messages.
        where: the checkpoint, for messages.
    Raises:
        MedsegError: E_MODEL if it cannot be built, or the weights do not fit.
    """
    try:
        with _at_most(PARTS_PER_WEIGHT * len(weights) + MORE_PARTS):
            with suppress(NotImplementedError, RuntimeError), ShapesOnly():
                # Only shapes: a description that asks for absurd layers is refused before it costs memory. Some of
                # MONAI's networks compute with numbers while they are built, which are not there.
                check_weights_fit(build(), weights, where=where)
            model = build()
    except _NOT_BUILT as error:
        raise MedsegError(
            Code.MODEL,
            "the network of the description cannot be built",
            where=description,
            got=f"{type(error).__name__}: {error}",
            remedy="get the bundle again from its source, or train again",
        ) from error
    check_weights_fit(model, weights, where=where)
    model.load_state_dict(weights)
    return model


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Stop networks that this thread builds once they have more layers and parameters in all.

    Raises:
        ValueError: from where the network is built.
    """
    builder, count = threading.get_ident(), 0

    def counted(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == builder:
            count += 1
            if count > most:
                raise ValueError(f"it has more than {most} layers and parameters, which its weights are too few for")

    hooks = (
        register_module_module_registration_hook(counted),
        register_module_parameter_registration_hook(counted),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_is_vouched_for(path: Path) -> None:
    """Check the bundle that a description says it is a part of, also where the folder of one of its folds was named.

    Raises:
        MedsegError: E_MISSING if there is none; what `opened` refuses.
    """
    home = bundle_around(path.parent)
    if home is None:
        raise MedsegError(
            Code.MISSING,
            "the bundle has lost its manifest: nothing says whether its files are whole",
            where=path.parent,
            expected=f"{MANIFEST_FILE} of medseg export, in this folder or above it",
            remedy="get the whole bundle again from its source; a bundle as a zip cannot lose a file",
        )
    opened(home)


def _check(is_true: bool, problem: str) -> None:
    if not is_true:
        raise ValueError(problem)


def _are(kind: type, values: Sequence[Any]) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
