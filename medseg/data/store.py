"""The store: what was worked out of each case's files, kept on disk and found again by content and settings.

**Keys.** An entry's name is the SHA-256 of everything that it follows from: the bytes of all files of the case, what
is asked of the readers, the label table, the settings of the plan that shape it, and medseg's own code that reads and
prepares, with the versions of the libraries that it uses. Whatever changes, the key changes: an entry is never stale,
only useless. Names tell nothing of the patient.

**Entries** are folders, or single files where they hold no arrays. They are written under another name and moved to
their own once they are whole, so that processes that prepare at the same time, and processes that are killed, leave
whole entries or none. Nothing is forced to the disk (fsync, for which small cases would wait longest): a power cut may
tear an entry, and that is found like any other damage, by the checksum of every file, which is verified when an entry
is opened. A damaged entry is reported and made again.

**Old entries** go by themselves: those that no run has used for `KEEP_DAYS`, when a run opens the store. The whole
folder can be deleted whenever no run is using it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from medseg.data.layouts import Case
from medseg.data.memory import available_bytes
from medseg.data.stored_array import forget
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, Source
from medseg.formats.dicom.annotations import DrawnLabel
from medseg.formats.dicom.files import SeriesInfo
from medseg.volume import Volume

FORMAT = 1
"""Of the entries; raised with each change of what they hold."""
KEEP_DAYS = 30
"""Days without use after which an entry is deleted."""
DECODED_SHARE = 0.25
"""Share of the free memory that may hold decoded cases between the survey and their preparation."""
CONTENT = "content.json"
README = """\
What medseg has prepared of training cases, so that it need not be done again. Entries that no run has used for {days}
days are deleted; the whole folder can be deleted whenever no run is using it. Nothing here is needed for predictions.
It holds the voxels of the cases: protect it like the data.
"""
TEMPORARY = ".new-"
"""How names of what is not an entry yet begin; what is left of them is deleted after a day."""
_HALVES = (".hdr", ".img", ".hdr.gz", ".img.gz")
"""Endings of the halves of a NIfTI pair."""
_READ_BYTES = 1 << 20
_LIBRARIES = ("numpy", "scipy", "torch", "nibabel", "pydicom", "pyjpegls", "python-gdcm", "pillow")
"""What decodes and resamples."""
_CODE = ("formats", "data", "label_values.py", "labels.py", "resampling.py", "volume.py")
"""What of medseg decides what entries hold."""

Known = tuple[str, list[tuple[int, int]]]
"""Digest of a case's files, and their sizes and times when they were read."""


@dataclass(frozen=True)
class Entry:
    """An entry that is whole: its folder (the file itself where there are values alone), and its values."""

    folder: Path
    values: Mapping[str, Any]


class Store:
    """Entries by key.

    Args:
        folder: where they lie; made when the first is written. None: nothing is kept or found.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.decoded = Decoded(int(DECODED_SHARE * available_bytes()))
        self.damaged: list[str] = []
        """What was found damaged, in words."""
        self._digests: dict[str, Known] = {}
        if folder is not None and folder.is_dir():
            _tidy(folder)

    def key(self, case: Case, basis: str) -> str:
        """The key of what follows from a case's files.

        Args:
            case: its files are read.
            basis: what it follows from beside them, by `basis_of`.
        """
        return hashlib.sha256(json.dumps([basis, case.case_id, self.digest(case)]).encode()).hexdigest()

    def digest(self, case: Case) -> str:
        """`case_digest` of a case; its files are read once."""
        if case.case_id not in self._digests:
            stamps = _stamps(case)
            self._digests[case.case_id] = (case_digest(case), stamps)
        return self._digests[case.case_id][0]

    def known(self, case: Case) -> Known | None:
        """What `digest` found, for the store of another process; None where it was not asked, or not answered."""
        return self._digests.get(case.case_id)

    def know(self, case: Case, known: Known | None) -> None:
        """Take over what another process has read: the files need not be read again for their digest."""
        if known is not None:
            self._digests[case.case_id] = known

    def forget(self, case: Case) -> None:
        """Let go of what is known of a case."""
        self._digests.pop(case.case_id, None)

    def is_unchanged(self, case: Case) -> bool:
        """Whether the case's files are, by size and time, those that its key was made of."""
        try:
            return self._digests[case.case_id][1] == _stamps(case)
        except OSError:  # a file is gone
            return False

    def begin(self) -> None:
        """Make the folder, if entries are kept and it is not there.

        Raises:
            MedsegError: E_OUTPUT.
        """
        if self.folder is None or self.folder.is_dir():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "README.txt").write_text(README.format(days=KEEP_DAYS), encoding="utf-8")
        except OSError as error:
            raise _cannot_keep(error) from error

    def read(self, key: str, case_id: str) -> Entry | None:
        """An entry whose files are all there and whole; None where there is none. Damage is noted in `damaged`."""
        if self.folder is None:
            return None
        folder = self.folder / key
        is_folder = folder.is_dir()
        try:
            content = parse_json((folder / CONTENT if is_folder else folder).read_bytes())
            values, sums = content["values"], content["sums"]
            whole = content["digest"] == _digest_of(values, sums)
            whole = whole and all(_checksum(folder / name) == wanted for name, wanted in sums.items())
        except FileNotFoundError:
            if not is_folder:
                return None
            whole = False
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.damaged.append(f"{case_id}: what the store held of it was damaged and is made again")
            forget(folder)
            _delete(folder)
            return None
        with suppress(OSError):  # a store that others own
            os.utime(folder)  # used: see KEEP_DAYS
        return Entry(folder, values)

    def write(self, key: str, values: Mapping[str, Any], files: Mapping[str, bytes]) -> Entry | None:
        """Keep an entry; None where nothing is kept.

        Raises:
            MedsegError: E_OUTPUT if the disk is full or cannot be written.
        """
        if self.folder is None:
            return None
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        sums = {name: zlib.crc32(content) for name, content in files.items()}
        content = {"values": values, "sums": sums, "digest": _digest_of(values, sums)}
        try:
            self.begin()
            if files:
                temporary.mkdir()
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            (temporary / CONTENT if files else temporary).write_bytes(json.dumps(content).encode())
            try:
                temporary.rename(self.folder / key)
            except OSError as error:  # another process was first: its entry holds the same
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        except OSError as error:
            raise _cannot_keep(error) from error
        finally:
            if temporary.exists():
                _delete(temporary)
        return Entry(self.folder / key, values)


class Decoded:
    """Cases that were decoded for one purpose and will be needed for another, as long as they fit.

    Args:
        budget: bytes of arrays.
    """

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._cases: dict[str, tuple[Volume, Volume]] = {}
        self._lock = threading.Lock()

    def keep(self, case_id: str, image: Volume, label: Volume) -> None:
        """Keep a case's image and the values of its label, if there is room."""
        needed = image.array.nbytes + label.array.nbytes
        with self._lock:
            if needed <= self._left:
                self._left -= needed
                self._cases[case_id] = image, label

    def take(self, case_id: str) -> tuple[Volume, Volume] | None:
        """What was kept, and forget it."""
        with self._lock:
            found = self._cases.pop(case_id, None)
            if found is not None:
                self._left += sum(volume.array.nbytes for volume in found)
        return found

    def clear(self) -> None:
        """Forget everything: the survey's cases that are not prepared."""
        for case_id in list(self._cases):
            self.take(case_id)


def basis_of(kind: str, settings: Mapping[str, Any], reading: Reading) -> str:
    """What entries follow from beside the files of their case; the same for all cases.

    Args:
        kind: what an entry holds.
        settings: plain values, as JSON holds them.
        reading: how the files are read.
    """
    parts = {
        "format": [FORMAT, code_digest()],
        "kind": kind,
        "reading": asdict(reading),
        "settings": settings,
    }
    return json.dumps(parts, sort_keys=True, default=str)


def case_digest(case: Case) -> str:
    """SHA-256 of the bytes of all files of a case, of which structures mean which class, and of nothing else."""
    digest = hashlib.sha256()
    for part in (*case.images, case.label):
        for path in files_of(part):
            with path.open("rb") as stream:
                while chunk := stream.read(_READ_BYTES):
                    digest.update(chunk)
            digest.update(b"\0end of file\0")
        if part is not None and not isinstance(part, Path):
            digest.update(b"" if isinstance(part, SeriesInfo) else repr(part.classes).encode())
        digest.update(b"\0end of part\0")
    return digest.hexdigest()


def files_of(part: Source | DrawnLabel | None) -> Iterator[Path]:
    """The files that an image or label is read from, always in the same order."""
    if part is None:
        return
    if not isinstance(part, Path):  # a DICOM series, or structures of annotations
        yield from part.files if isinstance(part, SeriesInfo) else (a.path for a in part.annotations)
    elif part.is_dir():
        yield from sorted(p for p in part.rglob("*") if p.is_file())
    else:
        yield part
        if not part.name.lower().endswith(_HALVES):
            return
        for one, other in ((".hdr", ".img"), (".img", ".hdr")):  # the halves of a NIfTI pair
            for ending in ("", ".gz"):
                if part.name.lower().endswith(one + ending):
                    half = part.with_name(part.name[: len(part.name) - len(one + ending)] + other + ending)
                    yield from [half] if half.is_file() else []


@cache
def code_digest() -> str:
    """SHA-256 of the parts of medseg that read and prepare cases: a new version prepares anew."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    digest.update(repr([(name, _version(name)) for name in _LIBRARIES]).encode())
    for name in _CODE:
        part = package / name
        for path in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # a codec that is an extra
        return None


def _stamps(case: Case) -> list[tuple[int, int]]:
    """Size and time of all files of a case."""
    stats: list[os.stat_result] = []
    for part in (*case.images, case.label):
        if isinstance(part, Path) and not part.name.lower().endswith(_HALVES):
            stat = part.stat()
            if not S_ISDIR(stat.st_mode):
                stats.append(stat)
                continue
        stats += [path.stat() for path in files_of(part)]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _digest_of(values: Mapping[str, Any], sums: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps([values, sums], sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            total = zlib.crc32(chunk, total)
    return total


def _cannot_keep(error: OSError) -> MedsegError:
    return MedsegError(
        Code.OUTPUT,
        "prepared cases cannot be kept: the disk is full"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "prepared cases cannot be kept",
        where="data.store",
        got=error.strerror or type(error).__name__,
        remedy="make room, name a folder on another disk (data.store=FOLDER), or keep them in memory only "
        "(data.store=null)",
    )


def _delete(entry: Path) -> None:
    """Take an entry away: its name first, so that nobody meets half of it."""
    grave = entry.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    with suppress(OSError):  # somebody else was first
        entry.rename(grave)
        if grave.is_dir():
            shutil.rmtree(grave, ignore_errors=True)
        else:
            grave.unlink()


def _tidy(folder: Path) -> None:
    """Delete entries that were not used for `KEEP_DAYS`, and what killed processes left a day ago or earlier."""
    now = time.time()
    for path in folder.iterdir():
        days = KEEP_DAYS if len(path.name) == 64 else 1 if path.name.startswith(TEMPORARY) else None
        try:
            if days is not None and now - path.stat().st_mtime > days * 86400:
                _delete(path)
        except OSError:  # another process tidies too
            continue
