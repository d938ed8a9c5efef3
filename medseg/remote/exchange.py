"""Scans that are fetched one at a time into a private folder, and label files that are delivered."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.inference.exchange import Exchange

PREFIX = "medseg-fetched-"
LOCK = ".lock"
"""In the folder of a process that lives: held by it."""
BEING_MADE_S = 60.0
"""Seconds in which a folder may not have its lock yet."""
MIN_FREE_BYTES = 2**26
"""Of the disk of the folder for temporary files: with less, no scan has room."""
DIGITS = 16
"""Of the digest of a place."""


@dataclass(frozen=True)
class RemoteCase(Case):
    """A scan that lies elsewhere: `images` are known when it was fetched."""

    key: tuple[str, ...] = ()
    """What its source knows it by. It may identify the patient, and stands in no message and no file."""
    num_bytes: int = 0
    """What its source says of its size; 0 where it says nothing."""


class Unreachable(MedsegError):
    """An archive that does not answer, or not to us: the next case would fare no better."""


class NoRoom(MedsegError):
    """A folder for temporary files that takes no scan: the next case would fare no better."""


class Source(Protocol):
    """Where scans are fetched from. It is sent to other processes, without its connections."""

    def cases(self) -> list[RemoteCase]:
        """All that is to be done, sorted by id."""
        ...

    def digest(self, case: RemoteCase) -> str:
        """What a scan is, without fetching it."""
        ...

    def fetch(self, case: RemoteCase, folder: Path) -> tuple[Path, ...]:
        """Write the files of a scan into an empty folder of the case's name; returns its images, as `Case` has them."""
        ...


class Sink(Protocol):
    """Where label files are delivered to. It is sent to other processes, without its connections."""

    url: str
    """Where they go."""
    replaces: bool
    """Whether a file takes the place of an object of the same name."""

    def begin(self, *, may_replace: bool) -> None:
        """Called before any work: refuse what would be replaced unasked."""
        ...

    def takes(self, name: str) -> bool:
        """Whether a file of this name is delivered; others stay in the output folder."""
        ...

    def standing(self, names: Collection[str]) -> dict[str, str]:
        """The objects that files of these names would replace: name → SHA-256."""
        ...

    def deliver(self, files: Mapping[str, Path], identity: str) -> None:
        """Deliver files that it takes: all of them, under names that the same identity always gives them."""
        ...

    def end(self, folder: Path) -> None:
        """Called when work that has begun ends, however it does, with the output folder."""
        ...


class Remote(Exchange):
    """Scans from a source, or from this disk; files to a sink, or to this disk.

    Used as a context: with it the private folder ends.

    Args:
        source: None: the cases lie on this disk.
        sink: None: the files stay here.
    """

    def __init__(self, source: Source | None, sink: Sink | None) -> None:
        self.source, self.sink = source, sink
        self._folder: Path | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # readable for its owner alone
        try:
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            folder.rmdir()
            raise
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = None

    def digest(self, case: Case) -> str:
        """As `Exchange`; of a source's scans without fetching them."""
        if self.source is None or not isinstance(case, RemoteCase):
            return super().digest(case)
        return self.source.digest(case)

    def fetch(self, case: Case) -> Case:
        """The case with its files in the private folder.

        Raises:
            NoRoom: E_OUTPUT where this disk takes nothing.
            MedsegError: what the source refuses; E_OUTPUT for a case that cannot be kept under its name.
        """
        if self.source is None or not isinstance(case, RemoteCase):
            return case
        folder = self._place(case)
        try:
            if shutil.disk_usage(folder.parent).free < MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, "there is hardly any room")
            folder.mkdir()
            images = self.source.fetch(case, folder)
        except OSError as error:
            self.drop(case)
            kind = MedsegError if error.errno == errno.ENAMETOOLONG else NoRoom
            raise kind(
                Code.OUTPUT,
                "a scan cannot be kept in the folder for temporary files",
                where=case.case_id,
                got=error.strerror or type(error).__name__,
                remedy="make room, or set TMPDIR to a folder that has some",
            ) from error
        except BaseException:
            self.drop(case)
            raise
        return Case(case.case_id, images, None)

    def staying(self, names: Collection[str]) -> list[str]:
        """The files that the sink does not take."""
        return [name for name in names if self.sink is None or not self.sink.takes(name)]

    def delivered(self, names: Collection[str]) -> dict[str, str]:
        """The files that the sink takes, and the digest of its URL."""
        if self.sink is None:
            return {}
        place = hashlib.sha256(self.sink.url.encode()).hexdigest()[:DIGITS]
        return {name: place for name in names if self.sink.takes(name)}

    def replacing(self, names: Collection[str]) -> list[str]:
        """The files that the sink takes, if it keeps their names."""
        return list(self.delivered(names)) if self.sink is not None and self.sink.replaces else []

    def standing(self, names: Collection[str]) -> dict[str, str]:
        """What the sink has under these names."""
        replacing = self.replacing(names)
        return self.sink.standing(replacing) if self.sink is not None and replacing else {}

    def deliver(self, case: Case, files: Mapping[str, Path], identity: str) -> None:
        """Give the sink what it takes."""
        taken = {name: files[name] for name in self.delivered(files)}
        if self.sink is not None and taken:
            self.sink.deliver(taken, identity)

    def drop(self, case: Case) -> None:
        """Remove what was fetched for a case."""
        if self._folder is not None:
            shutil.rmtree(self._place(case), ignore_errors=True)

    def is_fatal(self, error: Exception) -> bool:
        """True where an archive is out of reach, or no scan has room."""
        return isinstance(error, (Unreachable, NoRoom))

    def _place(self, case: Case) -> Path:
        if self._folder is None:
            raise RuntimeError("the exchange is used outside its context")
        return self._folder / case.case_id


def _sweep() -> None:
    """Remove the folders of processes that were killed: scans of patients must not stay where nobody looks."""
    for folder in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        try:
            if time.time() - folder.stat().st_mtime < BEING_MADE_S or folder.stat().st_uid != os.getuid():
                continue
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:  # another's, or gone meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(handle)
