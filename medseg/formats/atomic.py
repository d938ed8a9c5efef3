"""Writing files that are either whole or not there, and the folders for them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import Code, MedsegError


@contextmanager
def whole_file(path: Path, suffix: str) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto `path` when the block ends well and removed when it does not.

    Args:
        path: the final name; its folder must exist.
        suffix: the ending of the temporary name, for writers that look at it (".nii.gz").
    Raises:
        MedsegError: E_OUTPUT if the operating system refuses (no such folder, disk full, read-only).
    """
    temporary = path.parent / f".{uuid.uuid4().hex}{suffix}"  # same folder: os.replace is atomic within a file system
    try:
        yield temporary
        temporary.replace(path)  # os.replace
    except OSError as error:
        raise MedsegError(
            Code.OUTPUT,
            "the file cannot be written",
            where=path.name,
            got=error.strerror or type(error).__name__,
            remedy="check that the folder exists, is writable and has room",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder for outputs, with those above it; it may be there.

    Raises:
        MedsegError: E_OUTPUT.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MedsegError(
            Code.OUTPUT,
            "the folder cannot be made",
            where=folder.name,
            got=error.strerror or type(error).__name__,
            remedy="check that no file has its name and that the place is writable and has room",
        ) from error
