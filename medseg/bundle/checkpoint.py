"""Checkpoints: tensors and JSON in one safetensors file that is written whole, and carries its own SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medseg import __version__
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import make_folder, whole_file

CHECKPOINT_FOLDER = "checkpoints"
MODEL_PREFIX = "model."
"""Names of the model's weights in a checkpoint start with this; the rest is the trainer's."""
JSON_KEY = "json"
"""Of the safetensors metadata: what is no tensor."""
FORMAT = 1
"""Raised when checkpoints change in a way that older code would misread."""
FORMAT_KEY = "format"
"""Of the safetensors metadata, which holds texts only."""
DIGEST_KEY = "sha256"
"""Of the safetensors metadata: of all tensors and of the rest of the metadata. The format itself notices cut files, not
flipped bits."""


def checkpoint_path(run: Path, name: str) -> Path:
    """Where a run keeps its checkpoint `name` ("best", "latest", or "previous", the latest before it)."""
    return run / CHECKPOINT_FOLDER / f"{name}.safetensors"


def write_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], *, keep: Path | None = None
) -> None:
    """Write tensors and JSON metadata as one safetensors file, atomically.

    Args:
        path: final name.
        tensors: flat names → tensors.
        metadata: JSON-able values.
        keep: the name under which the file that `path` has now remains; None lets it go.
    Raises:
        MedsegError: E_OUTPUT if the operating system refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stated = {JSON_KEY: json.dumps(metadata), FORMAT_KEY: str(FORMAT), "medseg": __version__}
    write_atomically(path, save(plain, metadata=with_digest(plain, stated)), keep=keep)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Raises:
        MedsegError: E_CHECKPOINT if the file is missing, cut short, changed or not a checkpoint; E_VERSION if another
            medseg wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stated: dict[str, str] = file.metadata() or {}
            check_format({**stated, FORMAT_KEY: int(stated[FORMAT_KEY])}, FORMAT, where=path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = parse_json(stated[JSON_KEY])
        if not isinstance(metadata, dict):
            raise ValueError("its description is no table")
        if stated != with_digest(tensors, stated):
            raise ValueError("its content is not that of its SHA-256")
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
            "the checkpoint is damaged: it was cut short or changed, or is no checkpoint",
            where=path,
            got=f"{path.stat().st_size if path.exists() else 0} bytes; {error}",
            remedy="use the run's other checkpoint: --checkpoint latest (or best), or copy the file again",
        ) from error
    return tensors, metadata


def with_digest(tensors: Mapping[str, torch.Tensor], stated: Mapping[str, str]) -> dict[str, str]:
    """Metadata with the SHA-256 of themselves and of names, types, shapes and values of tensors.

    Args:
        tensors: contiguous, in the computer's memory.
        stated: texts; what stands under `DIGEST_KEY` is replaced.
    """
    plain = {name: stated[name] for name in sorted(stated) if name != DIGEST_KEY}
    digest = hashlib.sha256(json.dumps(plain).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {**plain, DIGEST_KEY: digest.hexdigest()}


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Put a checkpoint's weights into a network.

    Raises:
        MedsegError: E_MODEL with the first names that differ.
    """
    weights = weights_in(tensors)
    check_weights_fit(model, weights, where=where)
    model.load_state_dict(weights)


def weights_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's weights among a checkpoint's tensors, by the names that the model gives them."""
    return {k.removeprefix(MODEL_PREFIX): v for k, v in tensors.items() if k.startswith(MODEL_PREFIX)}


def check_weights_fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Refuse weights that are not those of a network, which may be on the meta device.

    Raises:
        MedsegError: E_MODEL with the first names that differ.
    """
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


def write_atomically(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Write a file so that its final name only ever holds the whole content, also after a power cut.

    Args:
        path: the final name; its folder is made.
        content: everything.
        keep: the name, in the same folder, under which the file that is there now remains; None lets it go.
    Raises:
        MedsegError: E_OUTPUT if the operating system refuses.
    """
    make_folder(path.parent)
    with whole_file(path, path.suffix) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote a checkpoint."""
    for path in folder.glob(".*.safetensors"):
        if len(path.stem) == 1 + len(uuid.uuid4().hex):
            with suppress(OSError):
                path.unlink()


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name, so that there is no moment at which the first one stands for nothing."""
    fresh = path.parent / f".{uuid.uuid4().hex}{path.suffix}"
    try:
        os.link(path, fresh)
        fresh.replace(keep)  # os.replace
    except OSError:  # a file system without hard links: for a moment only `keep` is there
        path.replace(keep)
    finally:
        # Two names of one file may be replaced by each other: POSIX then does nothing and leaves both.
        fresh.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the disk hold the new name too; where folders cannot be opened (Windows) the system sees to it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
