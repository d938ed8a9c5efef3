"""`manifest.json`: which files belong to a run or a bundle, their sizes and SHA-256, and how they came to be."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from medseg.bundle.checkpoint import write_atomically
from medseg.documents import check_format, parse_json, parse_yaml
from medseg.environment import environment
from medseg.errors import Code, MedsegError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised when `manifest.json` changes in a way that older code would misread."""
RUN, BUNDLE = "run", "bundle"
"""Kinds of manifests: a run's is for medseg verify; a bundle's is enforced whenever it is opened."""
MAX_MANIFEST_BYTES = 2**24
"""Largest manifest that is read: a run of ten thousand label files has a tenth of these 16 MiB."""
LEFT_OUT = ("tensorboard", "places.yaml")
"""Of a run: logs for who looks on, and where its owner keeps the data, which changes when they are moved."""


@dataclass(frozen=True)
class Listed:
    """A file as the manifest knows it: its size and SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Args:
        kind: `RUN` or `BUNDLE`.
        made: when, by which versions and revision of the code.
        trainings: of each run in it: seed, number of cases, fingerprint of the data.
        files: name, relative to the folder → size and SHA-256; the manifest itself is not among them.
    """

    kind: str
    made: Mapping[str, Any]
    trainings: Mapping[str, Any]
    files: Mapping[str, Listed]

    @property
    def is_bundle(self) -> bool:
        """True for what `medseg export` made."""
        return self.kind == BUNDLE

    def to_json(self) -> str:
        """The text of the file."""
        files = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())}
        content = {"format": FORMAT, "kind": self.kind, "made": dict(self.made), "trainings": dict(self.trainings)}
        return json.dumps({**content, "files": files}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            MedsegError: E_RUN if it is not there or is none; E_VERSION if another medseg wrote it.
        """
        path = folder / MANIFEST_FILE
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes are too many for a manifest")
            content = parse_json(path.read_text(encoding="utf-8"))
            check_format(content, FORMAT, where=path)
            if content["kind"] not in (RUN, BUNDLE):
                raise ValueError("its kind is not known")
            files = {
                _safe_name(name): Listed(int(file["bytes"]), str(file["sha256"]))
                for name, file in content["files"].items()
            }
            return cls(content["kind"], dict(content["made"]), dict(content["trainings"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedsegError(
                Code.RUN,
                "the manifest cannot be read",
                where=path,
                expected=f"format {FORMAT}, as medseg train and medseg export write it",
                got=f"{type(error).__name__}: {error}",
                remedy="get the bundle again from its source",
            ) from error

    def check(self, folder: Path, found: Collection[str], *, where: Path) -> None:
        """Refuse a folder whose files are not exactly those of the manifest.

        Args:
            folder: holds the files.
            found: the names of all of them.
            where: what the user gave, for the message.
        Raises:
            MedsegError: E_CHECKPOINT, naming the first that differ.
        """
        wrong = [f"{name} is not listed" for name in sorted({*found} - {MANIFEST_FILE, *self.files})]
        for name, file in self.files.items():
            problem = problem_of(folder / name, file)
            wrong += [] if problem is None else [f"{name} {problem}"]
        if wrong:
            raise MedsegError(
                Code.CHECKPOINT,
                "the bundle is not what its manifest says: it was damaged or changed",
                where=where,
                expected=f"{len(self.files)} files with the sizes and SHA-256 of {MANIFEST_FILE}",
                got="; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
                remedy="get the bundle again from its source; medseg verify lists all files",
            )


def write_manifest(
    folder: Path,
    *,
    kind: str = RUN,
    trainings: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write down all files of a folder with their sizes and SHA-256.

    Args:
        folder: a run that is done, or a bundle; hidden files, logs and temporary files are left out.
        kind: `RUN` or `BUNDLE`.
        trainings: what is to be known of the runs; None looks for it in the folder.
        made: by what; None is by this program, now.
    Raises:
        MedsegError: E_OUTPUT.
    """
    files = {name: listed_file(folder / name) for name in names_in(folder)}
    manifest = Manifest(
        kind, made_now() if made is None else made, trainings_in(folder) if trainings is None else trainings, files
    )
    write_atomically(folder / MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def forget_manifest(folder: Path) -> None:
    """Remove the manifest of a run that goes on: its files will change."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def names_in(folder: Path) -> Iterator[str]:
    """The files of a folder that a manifest lists, relative to it, with slashes."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part in LEFT_OUT for part in relative.parts)
        if not hidden and path.is_file() and path.suffix != ".log" and relative.as_posix() != MANIFEST_FILE:
            yield relative.as_posix()


def listed_file(path: Path) -> Listed:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Listed(stream.tell(), digest)


def problem_of(path: Path, listed: Listed) -> str | None:
    """What is wrong with a file, in words; None if it is as it was. Its size is looked at before its content."""
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != listed.size:
            return f"has {size} bytes instead of {listed.size}"
        return None if listed_file(path).sha256 == listed.sha256 else "has another SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"


def made_now() -> dict[str, Any]:
    """When, and with what versions, revision of the code and hardware; no name of a machine."""
    return {"utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "environment": environment()}


def trainings_in(folder: Path) -> dict[str, Any]:
    """Of each run in a folder what it was trained with: seed, number of cases, fingerprint of the data.

    The fingerprint is a SHA-256 of what the survey found (sizes, intensities, voxels of each class) without the cases'
    names: the same for the same cases, and it tells nothing of them.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("survey.json")):
        run = path.parent
        try:
            cases = parse_json(path.read_text(encoding="utf-8"))["cases"]
            config = run / "config.yaml"
            seed = parse_yaml(config.read_text(encoding="utf-8")).get("seed") if config.is_file() else None
            lines = sorted(json.dumps({**case, "case_id": ""}, sort_keys=True) for case in cases)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        name = run.relative_to(folder).as_posix()
        found[name] = {"seed": seed, "num_cases": len(lines), "data_sha256": digest}
    return found


def _safe_name(name: str) -> str:
    """A name that stays in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or "\\" in name or ":" in name:
        raise ValueError("a file's name leads out of the folder")
    return name
