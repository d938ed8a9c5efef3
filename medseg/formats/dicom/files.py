"""Which DICOM files lie in a folder and what they are: before any pixel is read."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import Code, MedsegError
from medseg.formats.content import is_dicom_start
from medseg.formats.dicom.archive import ZIPS, is_zip, unpacked
from medseg.formats.dicom.header import Slice, read_header
from medseg.formats.dicom.parsing import cannot_open, not_dicom
from medseg.formats.dicom.sop_classes import SEGMENTATIONS, STRUCTURE_SET, kind_of_object

logger = logging.getLogger(__name__)

NUM_THREADS = 4
"""Files that are read at once: enough to hide the latency of a disk or a network drive."""
FILES_AHEAD = 256
"""Files whose first bytes are held in memory."""
START_BYTES = 2**14
"""Read of each file at first; holds the whole header of most."""
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
"""Files of such names that are not DICOM are reported as damaged, others are left out."""

LINKS = "link"
"""Key in `Scan.others` of the links that were not followed."""
EMPTY_FILES = "empty file"
"""Key in `Scan.others` of the files without a byte whose names do not say what they are: slices that a copy lost?"""
NO_OBJECTS = (LINKS, EMPTY_FILES, ZIPS)
"""What a scan counts that is no DICOM."""

Progress = Callable[[int, int], None]
"""Called with (files done, all files)."""


DIGITS = 6
"""Of the digests in the names of series and patients."""


@dataclass(frozen=True)
class SeriesInfo:
    """One series in a folder, without a word about the patient."""

    uid: str
    """SeriesInstanceUID."""
    modality: str
    """Modality of the first file, "" if unknown."""
    num_slices: int
    """Number of images: files, and the frames of multi-frame files."""
    shape: tuple[int, int, int]
    """(columns, rows, slices) of the first file's matrix; several matrices are found when the series is read."""
    files: tuple[Path, ...]
    """The image files, sorted by name."""

    @property
    def name(self) -> str:
        """What messages call it, as `series_names`: the names of its files and folders may hold the patient's."""
        return series_names({self.uid: self.modality})[self.uid]

    def __str__(self) -> str:
        size = " × ".join(str(n) for n in self.shape[:2])
        return f"{self.name} ({self.num_slices} slices {size}, UID {self.uid})"


def series_names(modalities: Mapping[str, str]) -> dict[str, str]:
    """What medseg calls series: "CT_3f9a2c", which tells nothing about the patient.

    Args:
        modalities: SeriesInstanceUID → Modality of the series that must be told apart.
    Returns:
        SeriesInstanceUID → modality and digest.
    """
    kinds = {uid: re.sub("[^A-Za-z0-9]", "", modality)[:16] or "OT" for uid, modality in modalities.items()}
    return {uid: f"{kinds[uid]}_{digest}" for uid, digest in digests(modalities).items()}


def digests(uids: Iterable[str]) -> dict[str, str]:
    """The first digits of the SHA-256 of each UID: `DIGITS`, or as many as tell them apart."""
    whole = {uid: hashlib.sha256(uid.encode()).hexdigest() for uid in uids}
    length = next(n for n in range(DIGITS, 65) if len({d[:n] for d in whole.values()}) == len(whole))
    return {uid: digest[:length] for uid, digest in whole.items()}


@dataclass(frozen=True)
class Scan:
    """What lies in a tree."""

    slices: tuple[Slice, ...]
    """The headers of images, sorted by path; a multi-frame file is one."""
    annotations: list[Path]
    """SEG and RTSTRUCT files."""
    others: dict[str, int]
    """Other DICOM objects by kind ("SR", "DICOMDIR", …), and those of `NO_OBJECTS`, and how many."""
    refusals: list[tuple[Path, MedsegError]]
    """Files and folders that cannot be read though they should, and why."""

    @property
    def damaged(self) -> list[tuple[Path, str]]:
        """Files and folders that cannot be read though they should, and why in words."""
        return [(path, f"{error.code}: {error.message}") for path, error in self.refusals]


def scan(path: Path, *, without_preamble: bool = False, progress: Progress | None = None) -> Scan:
    """Look at every file of a tree, headers only.

    Links are not followed: what they point at within the tree is met anyway, and what lies outside was not asked for.
    A DICOMDIR is counted, not followed.

    Args:
        path: a folder with all that is below it, a zip, or a single file.
        without_preamble: try DICOM on files without "DICM" at byte 128 too.
        progress: is told how far it is.
    Raises:
        MedsegError: E_MISSING if there is nothing at the path; E_UNSUPPORTED for a pipe or a device; what
            `archive.unpacked` refuses.
    """
    path = Path(path)
    if not path.exists():
        raise MedsegError(
            Code.MISSING,
            "there is no such file or folder",
            where=path.name,
            expected="a file or a folder",
            got="nothing",
            remedy="check the path",
        )
    if not path.is_dir() and not path.is_file():
        raise MedsegError(
            Code.UNSUPPORTED,
            "this is neither a folder nor a file",
            where=path.name,
            expected="a file or a folder",
            got="a pipe or a device",
            remedy="copy what it gives into a file",
        )
    if is_zip(path):
        path = unpacked(path)
    others: Counter[str] = Counter()
    refusals: list[tuple[Path, MedsegError]] = []
    files = sorted(_walk(path, others, refusals)) if path.is_dir() else [path]
    slices, annotations = [], []
    for file, found in _look(files, without_preamble, progress):
        if isinstance(found, Slice):
            slices.append(found)
        elif isinstance(found, MedsegError):
            refusals.append((file, found))
        elif found is not None and (found.startswith(SEGMENTATIONS) or found == STRUCTURE_SET):
            annotations.append(file)
        elif found is not None:
            others[kind_of_object(found)] += 1
        elif _is_lost(file):
            others[EMPTY_FILES] += 1
        elif file.suffix.lower() == ".zip" and is_zip(file):
            others[ZIPS] += 1
    left_out = len(annotations) + sum(count for kind, count in others.items() if kind not in NO_OBJECTS)
    if left_out:
        logger.info("%d DICOM objects are not images (SEG, RTSTRUCT, SR, …)", left_out)
    return Scan(tuple(slices), annotations, dict(others), sorted(refusals, key=lambda r: r[0]))


def read_slices(files: Sequence[Path], *, without_preamble: bool = False) -> list[Slice]:
    """The headers of image files.

    Raises:
        MedsegError: what the first damaged file is refused for; E_UNSUPPORTED for one that is no image.
    """
    slices = []
    for file, found in _look(files, without_preamble, None):
        if isinstance(found, MedsegError):
            raise found
        if not isinstance(found, Slice):
            raise MedsegError(
                Code.UNSUPPORTED,
                "the file is not a DICOM image",
                where=file.name,
                expected="an image of a series",
                got=kind_of_object(found) if found else "another kind of file",
                remedy="check the path",
            )
        slices.append(found)
    return slices


def find_series(path: Path) -> list[SeriesInfo]:
    """One entry per SeriesInstanceUID, sorted by it; see `medseg.formats.find_series`."""
    return describe(scan(path).slices)


def describe(slices: Iterable[Slice]) -> list[SeriesInfo]:
    """Gather slices by SeriesInstanceUID."""
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for item in slices:
        by_uid[item.uid].append(item)
    found = []
    for uid, members in sorted(by_uid.items()):
        count = sum(1 if m.frame is not None else m.frames for m in members)
        files = tuple(dict.fromkeys(m.path for m in members))
        found.append(SeriesInfo(uid, members[0].modality, count, (*members[0].matrix, count), files))
    return found


def _walk(root: Path, others: Counter[str], refusals: list[tuple[Path, MedsegError]]) -> list[Path]:
    """The regular files of a tree."""
    files: list[Path] = []
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        others[LINKS] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        files.append(Path(entry.path))
        except OSError as error:
            refusals.append((folder, cannot_open(folder, error)))
    return files


def _is_lost(file: Path) -> bool:
    """True for an empty file that may have been DICOM: a name without an ending, or one that ends in a number."""
    named = not file.name.startswith(".") and (not file.suffix or file.suffix[1:].isdigit())
    return named and file.stat().st_size == 0


Found = Slice | str | MedsegError | None
"""The header of an image, the SOP class of another DICOM object, a refusal, None for what is not DICOM."""


def _look(files: Sequence[Path], without_preamble: bool, progress: Progress | None) -> Iterator[tuple[Path, Found]]:
    """What each file is, in their order. Threads wait for the disk; parsing is serial, since Python's threads would
    only hinder each other at it."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for first in range(0, len(files), FILES_AHEAD):
            batch = files[first : first + FILES_AHEAD]
            tasks = [batch[n::NUM_THREADS] for n in range(NUM_THREADS)]
            starts = {f: s for task in pool.map(lambda t: [(f, _start(f)) for f in t], tasks) for f, s in task}
            for number, file in enumerate(batch, start=first + 1):
                yield file, _look_at(file, starts[file], without_preamble)
                if progress is not None:
                    progress(number, len(files))


def _start(file: Path) -> bytes | MedsegError:
    try:
        with file.open("rb", buffering=0) as stream:
            return stream.read(START_BYTES) or b""
    except OSError as error:
        return cannot_open(file, error)


def _look_at(file: Path, start: bytes | MedsegError, without_preamble: bool) -> Found:
    if isinstance(start, MedsegError):
        return start
    promised = file.name.lower().endswith(DICOM_SUFFIXES)
    marked = is_dicom_start(start)
    if not marked and not without_preamble:
        return not_dicom(file) if promised else None
    try:
        return read_header(file, start, without_preamble=not marked)
    except MedsegError as error:
        return error if marked or promised else None
