"""Bundles: what prediction needs of a run, of its folds or of an ensemble, as one zip or folder to hand on.

Left out is what only training needs, and what tells of the cases: their split, survey, label files and pictures,
places on this machine, logs. The model card stays, and names cases by their ids.
"""

from __future__ import annotations

import json
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.bundle import BUNDLE_FILE, FOLDS_FILE, checkpoint_path, is_archive, is_bundle, load_bundle, opened
from medseg.bundle.info import EXPORTED
from medseg.bundle.manifest import BUNDLE, MANIFEST_FILE, Manifest, made_now, trainings_in, write_manifest
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.inference.members import ENSEMBLE_FILE, Configuration, Member, configurations_of, write_ensemble

ARCHIVE_SUFFIX = ".zip"
OF_MODEL = (
    *("plan.yaml", "model_card.md", "postprocessing.json", "postprocessing.md", "selection.md"),
    BUNDLE_FILE,
)
"""What of a run's folder goes along besides the best checkpoint, where it is there."""
MODELS_FOLDER = "models"
"""In the bundle of an ensemble: its runs, `0_NAME`, `1_NAME`, …"""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every file in a zip: the same model gives the same bytes, but for the manifest's own time."""


def export_bundle(run: Path, target: Path, *, overwrite: bool = False) -> Manifest:
    """Write the bundle of a run, whole or not at all.

    Args:
        run: a run, a run of several folds (the finished ones go along), an ensemble, or a bundle.
        target: a name that ends in .zip, or else the folder that is made.
        overwrite: replace a bundle that is there; no other folder is ever replaced.
    Returns:
        What is in it.
    Raises:
        MedsegError: E_RUN, E_MISSING, E_CHECKPOINT or E_MODEL for models that do not open; E_OUTPUT.
    """
    run = opened(run)
    configurations = configurations_of(run)
    for configuration in configurations:
        for member in configuration.members:
            load_bundle(member.run)  # only what opens is handed on; one at a time in memory
    _check_target(target, overwrite=overwrite)
    staged, former = (target.parent / f".{uuid.uuid4().hex}" for _ in range(2))
    try:
        trainings = _stage(run, configurations, staged)
        manifest = write_manifest(staged, kind=BUNDLE, trainings=trainings, made=_made(run))
        if target.suffix == ARCHIVE_SUFFIX:
            _pack(staged, target)
        else:
            if target.exists():  # aside, so that at no moment both are gone
                target.replace(former)
            staged.replace(target)
    except OSError as error:
        raise MedsegError(
            Code.OUTPUT,
            "the bundle cannot be written",
            where=target.name,
            got=error.strerror or type(error).__name__,
            remedy="check that the folder exists, is writable and has room",
        ) from error
    finally:
        if former.exists() and not target.exists():
            former.replace(target)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(staged, ignore_errors=True)
    return manifest


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    is_ours = is_archive(target) if target.is_file() else is_bundle(target)  # never a run, which has a manifest too
    if not (overwrite and is_ours):
        raise MedsegError(
            Code.OUTPUT,
            "there is something already",
            where=target,
            expected="a name that is free",
            got="a file" if target.is_file() else "a folder",
            remedy="replace a bundle with --overwrite" if is_ours else "give another name with -o",
        )


def _stage(run: Path, configurations: Sequence[Configuration], staged: Path) -> dict[str, Any]:
    """Copy the files to where they lie in the bundle; what is to be known of the trainings, by the same places."""
    staged.mkdir()
    _copy(run, staged)
    known = _trainings(run)
    if not (run / ENSEMBLE_FILE).is_file():
        (configuration,) = configurations
        home = run.resolve()  # a name may lead out of the run and back into it
        names = [member.run.resolve().relative_to(home).as_posix() for member in configuration.members]
        for member, name in zip(configuration.members, names, strict=True):
            _copy_member(member.run, staged / name)
        if (run / FOLDS_FILE).is_file():
            (staged / FOLDS_FILE).write_text(json.dumps({"members": names, "finished": names}), encoding="utf-8")
        return {name: training for name, training in known.items() if name in names}
    trainings: dict[str, Any] = {}
    placed = []
    for number, configuration in enumerate(configurations):
        name = configuration.folder.name.removeprefix(f"{number}_")  # of a bundle, that is made of again
        place_of_run = staged / MODELS_FOLDER / f"{number}_{name}"
        members = []
        for member in configuration.members:
            place = place_of_run / member.run.resolve().relative_to(configuration.folder.resolve())
            _copy_member(member.run, place)
            members.append(Member(place))
            trainings |= {place.relative_to(staged).as_posix(): t for t in _trainings(member.run).values()}
        placed.append(Configuration(place_of_run, tuple(members)))
    write_ensemble(staged, placed)
    return trainings or known


def _copy_member(run: Path, target: Path) -> None:
    _copy(run, target)
    best = checkpoint_path(target, "best")
    best.parent.mkdir(parents=True)
    shutil.copyfile(checkpoint_path(run, "best"), best)


def _copy(run: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in OF_MODEL:
        if (run / name).is_file():
            shutil.copyfile(run / name, target / name)
    if (target / BUNDLE_FILE).is_file():  # without its manifest it is not whole
        content = {**parse_json((target / BUNDLE_FILE).read_text(encoding="utf-8")), EXPORTED: True}
        (target / BUNDLE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _trainings(run: Path) -> dict[str, Any]:
    """By place in the run; of a bundle, that is made of again, what its own manifest says."""
    return trainings_in(run) or (dict(Manifest.read(run).trainings) if (run / MANIFEST_FILE).is_file() else {})


def _made(run: Path) -> dict[str, Any]:
    """When and by what it was trained, as far as the run says, and exported."""
    before = dict(Manifest.read(run).made) if (run / MANIFEST_FILE).is_file() else None
    return {"trained": before, "exported": made_now()}


def _pack(folder: Path, target: Path) -> None:
    """A folder's files as a zip: the manifest first, weights as they are (they do not shrink)."""
    paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.name != MANIFEST_FILE, p))
    with whole_file(target, ARCHIVE_SUFFIX) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for path in paths:
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if path.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as written:
                shutil.copyfileobj(source, written, 2**20)
