"""Whether the files of a run, a bundle, an ensemble or of predictions are what they were when they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path, PurePath

from medseg.bundle import BUNDLE_FILE, CHECKPOINT_FOLDER, FOLDS_FILE, BundleInfo, read_checkpoint
from medseg.bundle.archive import files_in, unpacked_bundle
from medseg.bundle.manifest import MANIFEST_FILE, Manifest, names_in, problem_of
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.archive import is_zip
from medseg.inference.manifest import MANIFEST_FILE as PREDICTIONS_FILE
from medseg.inference.manifest import Manifest as Predictions
from medseg.inference.manifest import digest_of_file
from medseg.inference.members import ENSEMBLE_FILE, configurations_of, digest_of


class Status(StrEnum):
    """What was found of a file."""

    OK = "ok"
    """As it was."""
    WRONG = "wrong"
    """Missing, changed, damaged, or not one of a bundle's."""
    UNKNOWN = "unknown"
    """Nothing was written down of it."""


@dataclass(frozen=True)
class Finding:
    """A file, relative to the folder, and what was found."""

    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """Everything that was found.

    Args:
        kind: what was looked at: "run", "bundle", "unfinished run", "ensemble" or "predictions".
        findings: one for each file.
    """

    kind: str
    findings: tuple[Finding, ...]

    @property
    def is_ok(self) -> bool:
        """True if nothing is wrong."""
        return not any(finding.status is Status.WRONG for finding in self.findings)

    def to_json(self) -> str:
        """For scripts."""
        return json.dumps({"kind": self.kind, "ok": self.is_ok, "files": [asdict(f) for f in self.findings]}, indent=1)


def verify(path: Path) -> Verification:
    """Compare all files with what was written down of them.

    Args:
        path: a run, a bundle (folder or zip), an ensemble, or a folder of predictions.
    Raises:
        MedsegError: E_RUN if it is none of these; what a bundle's zip is refused for before it is unpacked.
    """
    folder = unpacked_bundle(path) if is_zip(path) else path
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.read(folder)
        return Verification(manifest.kind, tuple(_listed(folder, manifest)))
    if (folder / PREDICTIONS_FILE).is_file():
        return Verification("predictions", tuple(_predicted(folder)))
    if (folder / ENSEMBLE_FILE).is_file():
        return Verification("ensemble", tuple(_chosen(folder)))
    if (folder / BUNDLE_FILE).is_file() or (folder / FOLDS_FILE).is_file():
        return Verification("unfinished run", tuple(_unfinished(folder)))
    raise MedsegError(
        Code.RUN,
        "there is nothing to verify" if path.exists() else "there is no such folder or file",
        where=path,
        expected=f"a run, a bundle, an ensemble or predictions, with {MANIFEST_FILE}, {PREDICTIONS_FILE} or "
        f"{ENSEMBLE_FILE}",
        remedy="give the folder that medseg train, select or predict made, or the zip of medseg export",
    )


def _listed(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    for name, listed in manifest.files.items():
        problem = problem_of(folder / name, listed)
        yield Finding(name, Status.OK if problem is None else Status.WRONG, problem or "")
    found = [str(name) for name in files_in(folder)] if manifest.is_bundle else names_in(folder)
    for name in sorted({*found} - {MANIFEST_FILE, *manifest.files}):
        if manifest.is_bundle:
            yield Finding(name, Status.WRONG, "is not listed in the manifest")
        else:
            yield Finding(name, Status.UNKNOWN, "came after the training")


def _predicted(folder: Path) -> Iterator[Finding]:
    for entry in Predictions(folder, "", {}).entries.values():
        for name, digest in entry.files.items():
            if name in entry.delivered:
                yield Finding(name, Status.UNKNOWN, f"of {entry.case}: was delivered elsewhere")
                continue
            problem = _problem_of(folder, name, digest)
            yield Finding(name, Status.WRONG if problem else Status.OK, problem and f"of {entry.case}: {problem}")


def _problem_of(folder: Path, name: str, digest: str) -> str:
    """What is wrong with a file of a prediction, in words; empty if it is as it was."""
    if PurePath(name).anchor or ".." in PurePath(name).parts:
        return "leads out of the folder"
    try:
        if not (folder / name).is_file():  # devices and pipes, which may have no end, are none
            return "is missing"
        return "" if digest_of_file(folder / name) == digest else "was changed after it was written"
    except OSError as error:
        return error.strerror or type(error).__name__


def _chosen(folder: Path) -> Iterator[Finding]:
    for configuration in configurations_of(folder):
        for member in configuration.members:
            is_same = digest_of(member.run) == member.digest
            detail = "" if is_same else "its best checkpoint is another than the one chosen"
            name = os.path.relpath(member.run, folder)  # runs may lie beside the ensemble
            yield Finding(name, Status.OK if is_same else Status.WRONG, detail)


def _unfinished(folder: Path) -> Iterator[Finding]:
    """Only checkpoints carry their own SHA-256 before a run is done; a bundle that has lost its manifest is no run."""
    for name in names_in(folder):
        if Path(name).name == BUNDLE_FILE:
            try:
                BundleInfo.read((folder / name).parent)
            except MedsegError as error:
                yield Finding(name, Status.WRONG, error.message)
                continue
        if Path(name).parent.name != CHECKPOINT_FOLDER:
            yield Finding(name, Status.UNKNOWN, "the manifest is written when the training is done")
            continue
        try:
            read_checkpoint(folder / name)
            yield Finding(name, Status.OK)
        except MedsegError as error:
            yield Finding(name, Status.WRONG, error.message)
