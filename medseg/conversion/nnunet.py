"""A model that nnU-Net trained, as a run that `medseg predict` takes.

nnU-Net never turns an image: its networks see the array of a file from the last axis to the first (k, j, i), then
transposed as plans.json says. Which anatomical directions these axes had is written nowhere. `--orientation` states
that of the training files; the plan of the run then asks for the same, and scans of any orientation are turned to it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from medseg.bundle import BUNDLE_FILE, MODEL_PREFIX, BundleInfo, checkpoint_path, write_checkpoint
from medseg.conversion.nnunet_network import network_of, our_weights, refused
from medseg.conversion.nnunet_plan import DATASET_FILE, PLANS_FILE, channels_of, labels_of, plan_of
from medseg.conversion.options import check_targets, is_file_name
from medseg.data.plan.memory import GIB, step_cost
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import make_folder

FINAL_CHECKPOINT = "checkpoint_final.pth"
DEFAULT_TRAINER = "nnUNetTrainer"
NUMPY_VALUES = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
"""What stands in a pickle for the numbers of nnU-Net's training log."""


@dataclass(frozen=True)
class Training:
    """What a folder of nnU-Net's results says of a model."""

    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    path: Path
    """Of the checkpoint."""

    @property
    def configuration_name(self) -> str:
        """2d, 3d_fullres, 3d_lowres, …"""
        return str(self.checkpoint["init_args"]["configuration"])

    def configuration(self) -> dict[str, Any]:
        """The configuration with what it inherits."""
        chain = [self.configuration_name]
        while (parent := self.plans["configurations"][chain[-1]].get("inherits_from")) is not None:
            if parent in chain:
                raise ValueError(f"{parent} inherits from itself")
            chain.append(parent)
        merged: dict[str, Any] = {}
        for name in reversed(chain):
            merged |= self.plans["configurations"][name]
        return merged


class _LeftOut:
    """Stands for a numpy value of the training log, which is not needed: nothing of numpy is built from a pickle."""

    def __new__(cls, *_arguments: object) -> _LeftOut:
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Take any state."""


def convert_model(
    source: Path, target: Path, console: Console, *, orientation: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Write a run from a model that nnU-Net trained.

    Args:
        source: the folder with plans.json, one of its folds, or a checkpoint.
        target: the run's folder.
        console: where the user reads.
        orientation: of the training files: where their axes i, j, k run to; None is RAS.
        overwrite: replace a run.
    Returns:
        What was written.
    Raises:
        MedsegError: E_MISSING for what is not there, E_CHECKPOINT for what cannot be read safely, E_MODEL for what
            medseg does not have, E_CONFIG for a wrong orientation, E_LABEL, E_OUTPUT.
    """
    if is_file_name(target):
        raise MedsegError(Code.OUTPUT, "a model is written into a folder", where=target.name)
    training = read_training(_checkpoint_in(source))
    try:
        info, weights = _bundle(training, orientation)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MedsegError(
            Code.CHECKPOINT,
            "the description of the model is incomplete",
            where=f"{PLANS_FILE}, {DATASET_FILE}, {training.path.name}",
            got=f"{type(error).__name__}: {error}",
        ) from error
    written = [checkpoint_path(target, "best"), target / "plan.yaml", target / BUNDLE_FILE]
    check_targets(written, [training.path], overwrite=overwrite)
    make_folder(target)
    tensors = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in weights.items()}
    write_checkpoint(written[0], tensors, {"nnunet": _provenance(training)})
    info.plan.write(written[1])
    info.write(target)
    _say(console, info, training, target)
    return written


def read_training(checkpoint: Path) -> Training:
    """Read a checkpoint and the two descriptions that lie above its folder."""
    folder = checkpoint.parent.parent
    return Training(
        _read_json(folder / PLANS_FILE), _read_json(folder / DATASET_FILE), read_pth(checkpoint), checkpoint
    )


def read_pth(path: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net: tensors and plain values only; whatever else its pickle asks for is refused, not run.

    Raises:
        MedsegError: E_MISSING if it is not there; E_CHECKPOINT if it is damaged, asks for more, or is no checkpoint
            of nnU-Net.
    """
    if not path.is_file():
        raise MedsegError(Code.MISSING, "there is no such checkpoint", where=f"{path.parent.name}/{path.name}")
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in NUMPY_VALUES]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise MedsegError(
            Code.CHECKPOINT,
            "the checkpoint holds more than tensors and plain values; opening it could run a stranger's code",
            where=path.name,
            got=asked[1] if asked else str(error).splitlines()[0],
            remedy="get the checkpoint from nnU-Net itself, or from who trained it",
        ) from error
    except Exception as error:  # a damaged archive or pickle fails in every way
        raise MedsegError(
            Code.CHECKPOINT,
            "the checkpoint is damaged, or is none of nnU-Net v2",
            where=path.name,
            got=f"{path.stat().st_size} bytes; {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy="copy the file again",
        ) from error
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise MedsegError(
            Code.CHECKPOINT, "this is no checkpoint of nnU-Net v2", where=path.name, expected="network_weights"
        )
    return content


def _checkpoint_in(source: Path) -> Path:
    """The one checkpoint that is meant.

    Raises:
        MedsegError: E_MISSING if there is none, E_CONFIG if there are several.
    """
    if source.is_file():
        return source.resolve()
    found = sorted(source.glob("checkpoint_*.pth")) or sorted(source.glob("fold_*/checkpoint_*.pth"))
    final = [path for path in found if path.name == FINAL_CHECKPOINT]
    if len(final) == 1:
        return final[0].resolve()
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in final or found)
    if final:
        raise MedsegError(
            Code.CONFIG,
            "there are several trained folds, and a run holds one model",
            where=source.name,
            got=names,
            remedy=f"name one: medseg convert {source.name}/{final[0].parent.name}/{FINAL_CHECKPOINT} RUN",
        )
    raise MedsegError(
        Code.MISSING,
        "there is no finished training",
        where=source.name,
        expected=f"fold_N/{FINAL_CHECKPOINT}",
        got=names or "no checkpoint",
        remedy="give the checkpoint itself to convert one of an unfinished training" if found else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MedsegError(
            Code.MISSING,
            "the model's description is not there",
            where=path.name,
            expected=f"{PLANS_FILE} and {DATASET_FILE} in the folder that holds fold_N",
            remedy="keep the folder as nnU-Net wrote it",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise MedsegError(Code.CHECKPOINT, "the file cannot be read", where=path.name, got=str(error)) from error
    if not isinstance(content, dict):
        raise MedsegError(Code.CHECKPOINT, "the file holds no table", where=path.name, got=type(content).__name__)
    return content


def _bundle(training: Training, orientation: str | None) -> tuple[BundleInfo, dict[str, Tensor]]:
    """What the model is, and its weights under our names."""
    configuration = training.configuration()
    if configuration.get("previous_stage") is not None:
        raise refused(
            f"cascades ({training.configuration_name} needs the labels of {configuration['previous_stage']})",
            PLANS_FILE,
            remedy="convert 3d_fullres or 3d_lowres",
        )
    labels = labels_of(training.dataset)
    channels = channels_of(training.dataset)
    network = network_of(configuration, where=PLANS_FILE)
    model = network.build(in_channels=len(channels), num_classes=labels.num_outputs)
    weights = our_weights(training.checkpoint["network_weights"], network, model.state_dict(), where=training.path.name)
    plan = plan_of(
        training.plans,
        configuration,
        network,
        name=training.configuration_name,
        num_channels=len(channels),
        orientation=orientation,
    )
    cost = step_cost(
        network.settings, in_channels=len(channels), num_outputs=labels.num_outputs, patch_size=plan.patch_size
    )
    memory = cost.bytes_of(plan.batch_size, device="cuda", precision="fp16") / GIB
    plan = replace(
        plan,
        memory_gb=round(memory, 2),
        reasons={**plan.reasons, "memory_gb": "estimated for a training step of medseg in fp16 on a GPU"},
    )
    mirrored = tuple(int(axis) for axis in training.checkpoint.get("inference_allowed_mirroring_axes") or ())
    if not set(mirrored) <= set(range(plan.spatial_dims)):
        raise ValueError(f"mirrored axes {mirrored}")
    modality = "CT" if {name.upper() for name in channels} == {"CT"} else None
    return BundleInfo(network.settings, plan, labels, channels, mirrored, modality), weights


def _provenance(training: Training) -> dict[str, Any]:
    """Where the model comes from, for the checkpoint's metadata."""
    epoch = training.checkpoint.get("current_epoch")
    return {
        "dataset": str(training.plans.get("dataset_name")),
        "plans": str(training.plans.get("plans_name")),
        "configuration": training.configuration_name,
        "trainer": str(training.checkpoint.get("trainer_name")),
        "fold": training.path.parent.name,
        "epoch": epoch if isinstance(epoch, int) else None,
    }


def _say(console: Console, info: BundleInfo, training: Training, target: Path) -> None:
    """What was written, and what is to be known of it."""
    source, labels = _provenance(training), info.labels
    what = f"{len(labels.regions)} regions" if labels.regions else f"{labels.num_classes} classes"
    console.print(
        f"{target}  {info.model['name']} of {source['dataset']} {source['configuration']} {source['fold']}, {what}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    notes = [info.plan.reasons["orientation"]] if info.plan.orientation else []
    if source["trainer"] != DEFAULT_TRAINER:
        notes.append(f"trained by {source['trainer']}, whose network is taken to be the one in {PLANS_FILE}")
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True, markup=False)
