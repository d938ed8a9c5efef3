"""Bundles as they come from others: a zip or a folder, checked against its manifest before anything is read from it."""

from __future__ import annotations

import stat
import threading
from contextlib import suppress
from pathlib import Path, PurePosixPath

from medseg.bundle.manifest import MANIFEST_FILE, Manifest
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.archive import is_zip, listed, unpacked

SUFFIXES = (".json", ".yaml", ".md", ".safetensors")
"""Kinds of files in a bundle: text and plain tensors, nothing that code could hide in."""
MAX_FILES = 2000
"""Most files of a bundle: an ensemble of several configurations of ten folds has a tenth of that."""
MAX_RATIO = 20
"""A bundle unpacks to this many times its size at most: weights hardly shrink …"""
MAX_LEVELS = 3
"""Folders between that of a model and its bundle's: `models/0_NAME/fold_0`."""
SLACK_BYTES = 2**24
"""… and descriptions, which do, stay below 16 MiB."""

_checked: dict[tuple[Path, int, int], Path] = {}
_lock = threading.Lock()


def is_archive(path: Path) -> bool:
    """True for a zip with the manifest of a bundle.

    Raises:
        MedsegError: what is wrong with a zip's table of contents.
    """
    return is_zip(path) and PurePosixPath(MANIFEST_FILE) in listed(path)


def is_bundle(folder: Path) -> bool:
    """True for a folder with the manifest of a bundle."""
    return (folder / MANIFEST_FILE).is_file() and Manifest.read(folder).is_bundle


def bundle_around(folder: Path) -> Path | None:
    """The bundle that a folder is, or lies in as that of a fold or a run of an ensemble; None where there is none."""
    folder = folder.resolve()
    for home in (folder, *folder.parents[:MAX_LEVELS]):
        with suppress(MedsegError):  # a data set may have a manifest.json too
            if is_bundle(home):
                return home
    return None


def opened(path: Path) -> Path:
    """The folder of a model: that of a bundle is checked first, and a zip is unpacked into a private folder.

    Args:
        path: a run, a folder of several, a bundle's folder, or a bundle's zip.
    Returns:
        The folder to read from: `path` itself unless it is a zip. Runs of one's own are left unchecked: their files
        may be edited, and medseg verify tells which were.
    Raises:
        MedsegError: E_RUN for a zip that is no bundle; E_MALFORMED for links, paths that leave the folder, and kinds of
            files that no bundle has (pickles); E_LIMIT for bombs; E_TRUNCATED for cut archives; E_CHECKPOINT for files
            that are not those of the manifest; E_MISSING, E_UNSUPPORTED.
    """
    is_packed = is_zip(path)
    if not is_packed and not (path / MANIFEST_FILE).is_file():
        return path
    named = path if is_packed else path / MANIFEST_FILE
    status = named.stat()
    key = (named.resolve(), status.st_mtime_ns, status.st_size)
    with _lock:
        folder = _checked.get(key)
        if folder is None or not folder.is_dir():
            folder = unpacked_bundle(path) if is_packed else path
            manifest = Manifest.read(folder)
            if not manifest.is_bundle and not is_packed:
                return folder
            found = files_in(folder)
            _refuse_kinds(found, where=path)
            manifest.check(folder, [str(name) for name in found], where=path)
            _checked[key] = folder
        return folder


def unpacked_bundle(path: Path) -> Path:
    """A zip's files in a private folder, once its table of contents is that of a bundle; contents are not checked.

    Raises:
        MedsegError: as `opened`, but for E_CHECKPOINT.
    """
    sizes = listed(path)
    if PurePosixPath(MANIFEST_FILE) not in sizes:
        raise MedsegError(
            Code.RUN,
            "this zip is no bundle of medseg",
            where=path,
            expected=f"a zip that medseg export wrote, with {MANIFEST_FILE} at its top",
            remedy="make one: medseg export RUN -o model.zip",
        )
    _refuse_kinds(list(sizes), where=path)
    total, most = sum(sizes.values()), MAX_RATIO * path.stat().st_size + SLACK_BYTES
    if total > most or len(sizes) > MAX_FILES:
        raise MedsegError(
            Code.LIMIT,
            "the bundle unpacks to an absurd size",
            where=path,
            expected=f"at most {MAX_FILES} files and {most} bytes",
            got=f"{len(sizes)} files and {total} bytes",
            remedy="do not trust it: get it again from its source",
        )
    return unpacked(path)


def files_in(folder: Path) -> list[PurePosixPath]:
    """Everything in a bundle's folder that is no folder, but for hidden files, which nobody reads.

    Raises:
        MedsegError: E_MALFORMED for links and special files.
    """
    found: list[PurePosixPath] = []
    for path in folder.rglob("*"):
        mode, name = path.lstat().st_mode, PurePosixPath(path.relative_to(folder).as_posix())
        if stat.S_ISDIR(mode) or any(part.startswith(".") for part in name.parts):
            continue
        if not stat.S_ISREG(mode):
            raise _malformed(folder, "the bundle holds a link or a special file", name.name)
        found.append(name)
        if len(found) > MAX_FILES:
            raise _malformed(folder, "the bundle holds too many files", f"more than {MAX_FILES}")
    return found


def _refuse_kinds(names: list[PurePosixPath], *, where: Path) -> None:
    wrong = sorted({name.suffix or name.name for name in names if name.suffix not in SUFFIXES})
    if wrong:
        raise _malformed(where, "the bundle holds files of kinds that no bundle has", ", ".join(wrong[:5]))


def _malformed(where: Path, problem: str, got: str) -> MedsegError:
    return MedsegError(
        Code.MALFORMED,
        problem,
        where=where,
        expected=f"plain files, of the kinds {', '.join(SUFFIXES)}",
        got=got,
        remedy="do not trust it: get it again from its source",
    )
