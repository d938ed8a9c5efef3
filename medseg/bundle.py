"""A trained model on disk: what it is (`bundle.json`) and its weights (`checkpoints/*.safetensors`).

Everything is JSON or safetensors: opening a stranger's model builds registered parts by name and never runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medseg import __version__
from medseg.data.augment import Mirroring
from medseg.data.plan import Plan
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.labels import Labels
from medseg.models import MODELS, SegmentationModel

BUNDLE_FILE = "bundle.json"
FOLDS_FILE = "folds.json"
"""In a folder of several runs that are the folds of one cross-validation: {"members": […], "finished": [of these]}."""
CHECKPOINT_FOLDER = "checkpoints"
BUNDLE_FORMAT = 1
"""Raised when `bundle.json` changes in a way that older code would misread."""
MODEL_PREFIX = "model."
"""Names of the model's weights in a checkpoint start with this; the rest is the trainer's."""


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
    """

    model: Mapping[str, Any]
    plan: Plan
    labels: Labels
    channels: tuple[str, ...]
    mirror_axes: tuple[int, ...] = ()
    modality: str | None = None
    structures: Mapping[str, tuple[str, ...]] | None = None
    swap: Mapping[str, str] = field(default_factory=dict)

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
        write_atomically(run / BUNDLE_FILE, json.dumps(content, indent=2).encode())

    @classmethod
    def read(cls, run: Path) -> BundleInfo:
        """Read `bundle.json` of a run.

        Raises:
            MedsegError: E_RUN if the folder is no run or its bundle cannot be read.
        """
        path = run / BUNDLE_FILE
        if not path.is_file():
            raise MedsegError(
                Code.RUN,
                "this is not a run of medseg",
                where=run,
                expected=f"a folder with {BUNDLE_FILE}, as medseg train writes it",
                remedy="give the run's folder: medseg train prints it when it starts and when it ends",
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != BUNDLE_FORMAT:
                raise MedsegError(
                    Code.RUN,
                    "this run was written by another version of medseg",
                    where=path,
                    expected=f"format {BUNDLE_FORMAT}",
                    got=f"format {content['format']} of medseg {content.get('medseg')}",
                    remedy="install that version of medseg, or train again",
                )
            structures = content.get("structures")
            return cls(
                content["model"],
                Plan.from_json(content["plan"]),
                Labels.from_mapping(content["labels"]),
                tuple(content["channels"]),
                tuple(content["mirror_axes"]),
                content.get("modality"),
                structures and {str(name): tuple(drawn) for name, drawn in structures.items()},
                {str(a): str(b) for a, b in content.get("swap", {}).items()},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise MedsegError(
                Code.RUN, "the run's description cannot be read", where=path, got=f"{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model ready to predict: `info` and the network with its trained weights, in eval mode."""

    info: BundleInfo
    model: SegmentationModel
    run: Path
    checkpoint: str


def checkpoint_path(run: Path, name: str) -> Path:
    """Where a run keeps its checkpoint `name` ("best" or "latest")."""
    return run / CHECKPOINT_FOLDER / f"{name}.safetensors"


def load_bundle(run: Path, *, checkpoint: str = "best", device: torch.device | str = "cpu") -> Bundle:
    """Open a trained model.

    Args:
        run: the folder that `medseg train` made.
        checkpoint: "best" (by validation Dice) or "latest".
        device: where the network goes.
    Raises:
        MedsegError: E_RUN if there is no such run, E_CHECKPOINT if the checkpoint is missing or damaged, E_MODEL if
            its weights do not fit the network.
    """
    info = BundleInfo.read(run)
    path = checkpoint_path(run, checkpoint)
    tensors, _ = read_checkpoint(path)
    model = info.build_model()
    load_weights(model, tensors, where=path)
    return Bundle(info, model.to(device).eval(), run, checkpoint)


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Put a checkpoint's weights into a network.

    Raises:
        MedsegError: E_MODEL with the first names that differ.
    """
    weights = {k.removeprefix(MODEL_PREFIX): v for k, v in tensors.items() if k.startswith(MODEL_PREFIX)}
    expected = model.state_dict()
    wrong = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    extra = [name for name in weights if name not in expected]
    if wrong or extra:
        raise MedsegError(
            Code.MODEL,
            "the checkpoint's weights do not fit the network",
            where=where,
            expected=f"{len(expected)} tensors",
            got=f"missing or of another shape: {wrong[:3] or 'none'}; unknown: {extra[:3] or 'none'}",
            remedy="use the bundle.json that was written with this checkpoint",
        )
    model.load_state_dict(weights)


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata as one safetensors file, atomically.

    Args:
        path: final name.
        tensors: flat names → tensors.
        metadata: JSON-able values.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"json": json.dumps(metadata)}))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Raises:
        MedsegError: E_CHECKPOINT if the file is missing, cut short or not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {})["json"])
    except FileNotFoundError as error:
        raise MedsegError(
            Code.CHECKPOINT,
            "there is no such checkpoint",
            where=path,
            got=", ".join(sorted(p.name for p in path.parent.glob("*.safetensors"))) or "no checkpoint at all",
            remedy="a run has checkpoints from its first validation on; see medseg predict --checkpoint",
        ) from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise MedsegError(
            Code.CHECKPOINT,
            "the checkpoint is damaged: it was cut short, or is no checkpoint",
            where=path,
            got=f"{path.stat().st_size if path.exists() else 0} bytes; {error}",
            remedy="use the run's other checkpoint: --checkpoint latest (or best), or copy the file again",
        ) from error
    return tensors, metadata


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its final name only ever holds the whole content, also after a power cut.

    Raises:
        MedsegError: E_OUTPUT if the operating system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, path.suffix) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
