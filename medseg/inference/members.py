"""Which models a folder stands for: a run, the folds of a run, or the ensemble that `medseg select` made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medseg import __version__
from medseg.bundle import (
    BUNDLE_FILE,
    FOLDS_FILE,
    Bundle,
    BundleInfo,
    checkpoint_path,
    is_archive,
    is_bundle,
    load_bundle,
    opened,
)
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file

ENSEMBLE_FILE = "ensemble.json"
"""In the folder that `medseg select` makes: the runs that it chose, relative to it."""
FORMAT = 1
"""Raised when `ensemble.json` changes in a way that older code would misread."""
NOT_SEEN = ("reasons", "batch_size", "memory_gb", "preset")
"""What of a plan does not change what a network sees."""


@dataclass(frozen=True)
class Member:
    """A run of which an ensemble consists.

    Args:
        run: its folder.
        digest: SHA-256 of its best checkpoint when it was chosen; None where nothing recorded it.
    """

    run: Path
    digest: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A run, or a run of several folds: the models of one configuration.

    Args:
        folder: the run's folder.
        members: the models; one for each fold that is finished.
        unfinished: names of the folds that are not.
    """

    folder: Path
    members: tuple[Member, ...]
    unfinished: tuple[str, ...] = ()


def is_model(path: Path) -> bool:
    """True for what can predict: a run, a run of several folds, an ensemble, or the zip of one."""
    return is_archive(path) or any((path / name).is_file() for name in (BUNDLE_FILE, FOLDS_FILE, ENSEMBLE_FILE))


def configurations_of(folder: Path) -> tuple[Configuration, ...]:
    """The configurations of an ensemble; one of a run, with or without folds.

    Args:
        folder: of the run or ensemble, or the bundle of one.
    Raises:
        MedsegError: E_RUN if the folder is none of these or its file cannot be read; E_MISSING if a run that it names
            is not there; what `opened` refuses.
    """
    folder = opened(folder)
    try:
        if (folder / ENSEMBLE_FILE).is_file():
            content = parse_json((folder / ENSEMBLE_FILE).read_text(encoding="utf-8"))
            check_format(content, FORMAT, where=folder / ENSEMBLE_FILE)
            found = tuple(
                Configuration(
                    folder / run["run"],
                    tuple(Member(folder / m["run"], str(m["digest"])) for m in run["members"]),
                )
                for run in content["runs"]
            )
        elif (folder / FOLDS_FILE).is_file():
            found = (_folds(folder),)
        else:
            return (Configuration(folder, (Member(folder),)),)
        if not all(configuration.members for configuration in found) or not found:
            raise ValueError("no members")
        runs = [member.run.resolve() for configuration in found for member in configuration.members]
        if is_bundle(folder) and not all(run.is_relative_to(folder.resolve()) for run in runs):
            raise ValueError("it names runs outside of the bundle")
        for configuration in found:
            home = configuration.folder.resolve()
            if not all(member.run.resolve().is_relative_to(home) for member in configuration.members):
                raise ValueError("it names folds outside of their run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedsegError(
            Code.RUN,
            "the table of the folder's models cannot be read",
            where=folder,
            expected=f"{ENSEMBLE_FILE} of format {FORMAT}, or {FOLDS_FILE}",
            got=f"{type(error).__name__}: {error}",
            remedy="make it again: medseg select RUN... -o ENSEMBLE, or medseg train resume=RUN",
        ) from error
    gone = [m.run for configuration in found for m in configuration.members if not (m.run / BUNDLE_FILE).is_file()]
    if gone:
        raise MedsegError(
            Code.MISSING,
            f"{len(gone)} of the runs that this folder consists of are not there",
            where=folder,
            got=", ".join(str(path) for path in gone[:5]),
            remedy="move an ensemble together with its runs (paths are relative), or make it again with medseg select; "
            "go on with unfinished folds: medseg train resume=RUN",
        )
    return found


def _folds(folder: Path) -> Configuration:
    content = parse_json((folder / FOLDS_FILE).read_text(encoding="utf-8"))
    names = [str(name) for name in content["members"]]
    finished = [name for name in names if name in content.get("finished", names)]
    if names and not finished:
        raise MedsegError(
            Code.RUN,
            "no fold of this run is finished",
            where=folder,
            remedy=f"go on with it: medseg train resume={folder}; or predict with one fold as it is: "
            f"medseg predict {folder / names[0]} SCAN -o OUT",
        )
    unfinished = tuple(name for name in names if name not in finished)
    return Configuration(folder, tuple(Member(folder / name) for name in finished), unfinished)


def load_members(
    configuration: Configuration, *, checkpoint: str = "best", device: torch.device | str = "cpu"
) -> list[Bundle]:
    """Open the models of a configuration.

    Raises:
        MedsegError: what `load_bundle` refuses; E_CHECKPOINT if the best checkpoint is another than the one chosen.
    """
    for member in configuration.members:
        changed = checkpoint == "best" and member.digest not in (None, digest_of(member.run))
        if changed:
            raise MedsegError(
                Code.CHECKPOINT,
                "the run's best checkpoint is another than when the ensemble was chosen",
                where=member.run,
                remedy="choose again: medseg select RUN... -o ENSEMBLE",
            )
    return [load_bundle(member.run, checkpoint=checkpoint, device=device) for member in configuration.members]


def digest_of(run: Path) -> str | None:
    """SHA-256 of a run's best checkpoint; None where it has none."""
    path = checkpoint_path(run, "best")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_ensemble(folder: Path, configurations: Sequence[Configuration]) -> None:
    """Write `ensemble.json`: the runs relative to the folder, and the digests of their best checkpoints.

    Raises:
        MedsegError: E_OUTPUT.
    """
    home = folder.resolve()
    runs = [
        {
            "run": _relative(configuration.folder, home),
            "members": [
                {"run": _relative(member.run, home), "digest": digest_of(member.run)}
                for member in configuration.members
            ],
        }
        for configuration in configurations
    ]
    with whole_file(folder / ENSEMBLE_FILE, ".json") as temporary:
        content = {"format": FORMAT, "medseg": __version__, "runs": runs}
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def together(bundles: Sequence[Bundle]) -> list[list[Bundle]]:
    """Models in sets that see the same: same plan, same part of the tile that they label, same mirroring."""
    groups: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        info = bundle.info
        plan: dict[str, Any] = {k: v for k, v in info.plan.to_json().items() if k not in NOT_SEEN}
        size = bundle.model.output_size(info.plan.patch_size)
        groups.setdefault(json.dumps([plan, size, repr(info.mirroring)], sort_keys=True), []).append(bundle)
    return list(groups.values())


def check_agreement(models: Sequence[tuple[Path, BundleInfo]]) -> None:
    """Refuse models that do not segment the same from the same.

    Args:
        models: run → what its model is.
    Raises:
        MedsegError: E_MODEL, naming what differs.
    """
    first_run, first = models[0]
    for run, info in models[1:]:
        ours, theirs = first.labels.to_json(), info.labels.to_json()
        different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        what = f"classes: {', '.join(different)} differ" if different else None
        if what is None and first.labels != info.labels:
            what, different = "classes: they stand in another order", ["order"]
        elif what is None and first.channels != info.channels:
            what, ours, theirs = "channels", {"channels": first.channels}, {"channels": info.channels}
        elif what is None and first.plan.spatial_dims != info.plan.spatial_dims:
            what, ours, theirs = "dimensions", {"axes": first.plan.spatial_dims}, {"axes": info.plan.spatial_dims}
        if what is not None:
            raise MedsegError(
                Code.MODEL,
                f"these models have other {what}",
                where=run,
                expected=f"{ours} ({first_run.name})",
                got=theirs,
                remedy="put together runs that were trained on the same data and labels",
            )


def _relative(path: Path, home: Path) -> str:
    """A path from a folder, with ".." where it leads out of it."""
    return Path(os.path.relpath(path.resolve(), home)).as_posix()
