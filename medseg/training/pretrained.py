"""Weights that training begins with: torchvision's, those of a file, those of a run (`model.weights`,
`model.classifier`).

Nothing is downloaded. A bundle holds neither key: it has weights of its own.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medseg.bundle import BUNDLE_FILE, MODEL_PREFIX, checkpoint_path, opened, read_checkpoint
from medseg.bundle.checkpoint import weights_in
from medseg.bundle.info import BUNDLE_FORMAT, MAX_DESCRIPTION_BYTES, TASK_KEY
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.models.backbones import TORCHVISION, Backbone, load_backbone, torchvision_name
from medseg.models.fcn import FCN
from medseg.torchvision_compat import prepare_torchvision

IMAGENET = "imagenet"
"""Value of `model.weights`: torchvision's weights of its first recipe (IMAGENET1K_V1), from its own cache."""
PICKLED = (".pth", ".pt")
BACKBONE = "backbone."
"""Names of a backbone's tensors in our networks start with this."""
_ZIP_MAGIC = b"PK\x03\x04"
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""torchvision's file of DenseNet writes norm.1 where its network says norm1."""


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network as a bundle keeps them: without places on this machine.

    Args:
        settings: of a segmenter or classifier, as the user states them.
    Returns:
        The same with `weights` null, and with the settings of the classifier where a run of one was named.
    Raises:
        MedsegError: E_RUN if that is no run of a classifier; E_VERSION if another medseg wrote it.
    """
    kept = {key: None if key == "weights" else value for key, value in settings.items()}
    classifier = kept.get("classifier")
    if isinstance(classifier, str):
        kept["classifier"] = _classifier_in(Path(classifier))
    return kept


def load_pretrained(model: nn.Module, settings: Mapping[str, Any], classes: Sequence[str] = ()) -> list[str]:
    """Put the weights that `model.weights` or `model.classifier` names into a fresh network.

    Args:
        model: changed in place.
        settings: as the user states them.
        classes: names of the network's scores; the scores of a classifier of other classes are not taken.
    Returns:
        Lines that say what was taken; none where nothing is named.
    Raises:
        MedsegError: E_MISSING if ImageNet's weights or a file are not there; E_CHECKPOINT if they are damaged or hold
            more than tensors; E_LIMIT for a .pth that unpacks to more than it is; E_MODEL if they do not fit; E_RUN,
            E_VERSION, E_UNSUPPORTED; E_CONFIG for weights and a trained classifier at once.
    """
    place, classifier = settings.get("weights"), settings.get("classifier")
    if isinstance(classifier, str) and place is not None:
        raise MedsegError(
            Code.CONFIG,
            "the network cannot begin with two sets of weights",
            where="model.weights",
            got=f"model.weights={place} and model.classifier={classifier}",
            remedy="leave one of them out",
        )
    place = classifier if isinstance(classifier, str) else place
    if place is None:
        lines, frozen = [], settings.get("frozen_stages")
        if frozen:
            lines.append(f"warning    the first {frozen} stages keep fresh weights: model.weights says nothing better")
        if settings.get("keep_statistics"):
            lines.append(
                "warning    batch normalisations keep the statistics of a fresh network, which normalise nothing: "
                "model.keep_statistics needs model.weights"
            )
        return lines
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise MedsegError(
            Code.MODEL,
            "this network has no part that such weights are for",
            where="model.weights",
            remedy="trainer.initial=RUN begins with all weights of a run of the same network",
        )
    tensors = read_weights(str(place), backbone.network)
    notes = load_backbone(backbone, own_names(backbone, tensors))
    if isinstance(classifier, str) and isinstance(model, FCN):
        before = _description(Path(classifier))["classes"]
        model.load_classifier(tensors, with_scores=before == list(classes))
        if before != list(classes):
            notes.append(f"the scores begin anew, for {', '.join(classes)} instead of {', '.join(before)}")
    number, whole = len(backbone.state_dict()), len(model.state_dict())
    lines = [f"weights    {number} of {whole} tensors: {backbone.network or 'the convolutions'} as in {place}"]
    if isinstance(classifier, str):
        lines = [f"weights    of the classifier in {place}"]
    return lines + [f"           {note}" for note in notes]


def read_weights(place: str, network: str | None) -> dict[str, Tensor]:
    """Tensors by the names that they have there.

    Args:
        place: imagenet, a safetensors or .pth file, a run, or a bundle.
        network: the network of torchvision that they are for; None of others.
    Raises:
        MedsegError: as `load_pretrained`.
    """
    if place == IMAGENET:
        return _read_pickled(imagenet_file(network))
    path = Path(place)
    if path.suffix in PICKLED:
        return _read_pickled(path)
    if path.suffix != ".safetensors":
        return weights_in(read_checkpoint(checkpoint_path(opened(path), "best"))[0])
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise MedsegError(Code.CHECKPOINT, "the file of weights is damaged", where=path, got=error) from error
    return weights_in(tensors) or tensors


def own_names(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a network of ours, or of torchvision's, by the names that a backbone gives them."""
    ours = {name.removeprefix(BACKBONE): t for name, t in tensors.items() if name.startswith(BACKBONE)}
    if ours or backbone.network is None:
        return ours or dict(tensors)
    theirs = {_OLD_DENSENET.sub(r"\1\2", name.removeprefix("module.")): t for name, t in tensors.items()}
    named = {name: torchvision_name(backbone.network, name) for name in backbone.state_dict()}
    return {name: theirs[other] for name, other in named.items() if other in theirs}


def imagenet_file(network: str | None) -> Path:
    """torchvision's file of ImageNet weights in its cache, once its hash is right.

    Args:
        network: one of torchvision's; other networks have none.
    Raises:
        MedsegError: E_MODEL for other networks; E_MISSING with the address to get it from; E_CHECKPOINT if the file is
            damaged.
    """
    if network is None:
        raise MedsegError(
            Code.MODEL,
            "torchvision has no ImageNet weights of this network",
            where="model.weights",
            expected=" | ".join(TORCHVISION),
            got=IMAGENET,
        )
    prepare_torchvision()
    import torchvision  # here, because it takes a second and other models do not need it

    url: str = getattr(torchvision.models, TORCHVISION[network].weights).IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise MedsegError(
            Code.MISSING,
            "the ImageNet weights are not on this machine, and medseg downloads nothing",
            where=path,
            expected=url,
            remedy=f"download it there yourself, or put {name} anywhere and give model.weights=FILE",
        )
    stated = Path(name).stem.rpartition("-")[2]
    found = _sha256(path)
    if not found.startswith(stated):
        raise MedsegError(
            Code.CHECKPOINT,
            "the file of ImageNet weights is damaged, or another",
            where=path,
            expected=f"a SHA-256 that begins with {stated}",
            got=found[: len(stated)],
            remedy=f"download it again: {url}",
        )
    return path


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """A state dict that torch.save wrote; whatever else its pickle asks for is refused, not run."""
    if not path.is_file():
        raise _missing(path)
    try:
        _refuse_inflating(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MedsegError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise MedsegError(
            Code.CHECKPOINT,
            "the file holds more than tensors and plain values; opening it could run a stranger's code",
            where=path.name,
            got=asked[1] if asked else str(error).splitlines()[0],
            remedy="save the state dict alone: torch.save(model.state_dict(), FILE), or as safetensors",
        ) from error
    except Exception as error:  # a damaged archive or pickle fails in every way
        raise MedsegError(
            Code.CHECKPOINT,
            "the file of weights is damaged, or is none",
            where=path.name,
            got=f"{path.stat().st_size} bytes; {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy="copy the file again",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise MedsegError(
            Code.CHECKPOINT,
            "the file holds no state dict",
            where=path.name,
            expected="names and tensors, or a table with these under state_dict or model",
            got=type(content).__name__,
        )
    return {str(name).removeprefix(MODEL_PREFIX): tensor for name, tensor in content.items()}


def _refuse_inflating(path: Path) -> None:
    """Refuse a zip that unpacks to more than it is: torch.save stores tensors as they are, torch.load reads any zip.

    Raises:
        MedsegError: E_LIMIT.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:  # torch.load knows zips by this, too
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    total, most = sum(member.file_size for member in members), path.stat().st_size
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or total > most:
        raise MedsegError(
            Code.LIMIT,
            "the file of weights unpacks to more than it holds",
            where=path.name,
            expected=f"members that are stored as they are, {most} bytes at most, as torch.save writes them",
            got=f"{len(packed)} of {len(members)} members compressed; {total} bytes",
            remedy="if it comes from a stranger, do not trust it; else write it again with torch.save",
        )


def _classifier_in(run: Path) -> dict[str, Any]:
    """The settings of the classifier that a run trained, without what only its training had."""
    settings: dict[str, Any] = _description(run)["model"]
    return {key: value for key, value in settings.items() if key not in ("weights", "frozen_stages")}


def _description(run: Path) -> dict[str, Any]:
    """What the bundle of a classifier states.

    Raises:
        MedsegError: E_RUN if it is none, or cannot be read; E_VERSION.
    """
    path = opened(run) / BUNDLE_FILE
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many for a description")
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        check_format(content, BUNDLE_FORMAT, where=path)
        if content.get(TASK_KEY) != "classification" or not isinstance(content["model"]["name"], str):
            raise ValueError("it does not classify")
        content["classes"] = [str(name) for name in content["classes"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedsegError(
            Code.RUN,
            "this is no run of a classifier",
            where="model.classifier",
            expected="a folder that medseg train task=classification made, or its bundle",
            got=f"{run}: {error}",
        ) from error
    return content


def _missing(path: Path) -> MedsegError:
    return MedsegError(
        Code.MISSING,
        "there is no such file of weights",
        where=path,
        expected="a safetensors or .pth file, a run of medseg, its bundle, or imagenet",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
