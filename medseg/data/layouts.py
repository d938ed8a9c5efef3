"""Which files of a folder are images and labels: by names, and by the first bytes of files without an ending.

No image is opened here. `medseg.data.pairing` brings images and labels together, by one of these layouts, in the order
in which they are tried:

1. `dataset.json` with `imagesTr` and `labelsTr`: Medical Segmentation Decathlon, nnU-Net v1 and v2;
2. paired folders: one of `IMAGE_FOLDERS` beside one of `LABEL_FOLDERS`;
3. one folder per case, with its channels and one file named as a label in it;
4. images and labels in one folder, the labels told apart by a suffix (`img01.png`, `img01_mask.png`).

**Channels.** `case_0000.nii.gz`, `case_0001.nii.gz` are two channels of `case`, but many ids end in digits of their
own. So `_dddd` (exactly four digits) is a channel only where a label stands under the name without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.errors import Code, MedsegError
from medseg.formats import Source, is_dicom, is_image_file, strip_suffix

if TYPE_CHECKING:
    from medseg.data.structure_table import StructureTable
    from medseg.formats.dicom.annotations import DrawnLabel

T = TypeVar("T")
Bad = list[tuple[str, MedsegError]]
"""Cases that cannot be used, by id, and why."""

IMAGE_FOLDERS = ("imagestr", "images", "image", "img", "imgs")
"""Names of folders of images (any case)."""
DRIVE_LABELS = "1st_manual"
"""DRIVE's folder of reference vessels. It wins over `mask`, which holds the field of view there."""
LABEL_FOLDERS = (
    DRIVE_LABELS,
    *("labelstr", "labels", "label", "masks", "mask", "segmentations", "segmentation", "annotations"),
)
"""Names of folders of labels (any case)."""
LABEL_NAME = re.compile(r"(?:(?P<id>.+)[_-])?(?:seg|mask|label|labels|segmentation|gt)", re.IGNORECASE)
"""A file name (without suffix) that says that it is a label, and the id that it is the label of."""
DECISIVE = ("imagestr", "labelstr", DRIVE_LABELS)
"""Folders that are meant even where another one has a known name too."""
CHANNEL_SUFFIX = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})")
"""nnU-Net's channel number behind an id."""
MAX_NAMED = 10
"""Most cases that one message names."""


@dataclass(frozen=True)
class Case:
    """One scan to learn from or to segment: its files, not its pixels."""

    case_id: str
    """Name that is used in splits, tables, messages and names of output files."""
    images: tuple[Source, ...]
    """One or several files (or DICOM series) of one grid, each with at least one channel."""
    label: Path | DrawnLabel | None
    """The reference segmentation: a file of labels, or structures of DICOM annotations."""
    patient: str | None = None
    """Who it is of, where a manifest (a name) or DICOM (a pseudonym) says so: their cases stay together in splits."""
    split: str | None = None
    """"train", "val" or "test", where a manifest says so."""
    stratum: str | None = None
    """Site, scanner or another group that folds should have like shares of, where a manifest says so."""


@dataclass(frozen=True)
class DataFolder:
    """What was found in a folder."""

    root: Path
    """The folder, or the manifest's folder."""
    layout: str
    """What kind of folder it is, in words."""
    cases: tuple[Case, ...]
    """Sorted by id."""
    labels: dict[str, Any] | None = None
    """Class names → values as a dataset.json or manifest declares them (not checked yet)."""
    channels: tuple[str, ...] | None = None
    """Names of the channels, where something names them."""
    structures: StructureTable | None = None
    """Of a tree of DICOM files: which structures mean which class."""
    problems: tuple[tuple[str, MedsegError], ...] = ()
    """What is wrong in the folder beside its cases, by a name for it: annotations whose images are not there."""
    left_out: tuple[str, ...] = ()
    """What lies there and is no case, in words."""


def visible(folder: Path) -> list[Path]:
    """What lies in a folder without hidden entries, sorted."""
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda path: path.name)


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM slices: it is one image then, whatever else lies there."""
    return folder.is_dir() and any(is_dicom(p) and not is_annotation(p) for p in visible(folder))


def is_annotation(path: Path) -> bool:
    """Whether a file is DICOM SEG or RTSTRUCT: no image, and a label only of a tree of DICOM files."""
    if not is_dicom(path):
        return False
    from medseg.formats.dicom import rtstruct, seg

    try:
        return seg.is_mine(path) or rtstruct.is_mine(path)
    except MedsegError:  # too damaged to tell: whoever reads it will say so
        return False


def image_paths(folder: Path, bad: Bad | None = None) -> dict[str, Path]:
    """Image files and DICOM series folders directly in a folder, by id (the name without its suffix).

    DICOM annotations are left out, but not from among slices.

    Args:
        folder: where to look.
        bad: takes what would be refused; the first file of an id is then found.
    Raises:
        MedsegError: E_DUPLICATE_ID if two have the same id.
    """
    found: dict[str, Path] = {}
    inside = visible(folder)
    annotations: set[Path] = set()
    slices = False  # of a series, whose headers are not read one by one
    for path in inside:
        if is_dicom(path):
            if not is_annotation(path):
                slices = True
                break
            annotations.add(path)
    for path in inside:
        if is_image_file(path) and (slices or path not in annotations):
            add_entry(found, strip_suffix(path.name), path, bad)
        elif is_series(path):
            add_entry(found, path.name, path, bad)
    return found


def image_entries(folder: Path, bad: Bad | None = None) -> dict[str, tuple[Path, ...]]:
    """Like `image_paths`, and each further folder of images as one id with all of them but labels."""
    found: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in image_paths(folder, bad).items()}
    for path in visible(folder):
        if path.is_dir() and not is_series(path):
            inside = [p for name, p in image_paths(path, bad).items() if not is_label_name(name)]
            if inside:
                add_entry(found, path.name, tuple(inside), bad)
    return found


def add_entry(found: dict[str, T], case_id: str, entry: T, bad: Bad | None = None) -> None:
    """Put an entry under an id.

    Args:
        found: the entries by id.
        case_id: the id.
        entry: what to put there.
        bad: takes what would be refused; the entry that came first then stays.
    Raises:
        MedsegError: E_DUPLICATE_ID if the id is there already (`a.png` beside `a.tif`).
    """
    if case_id not in found:
        found[case_id] = entry
        return
    error = MedsegError(
        Code.DUPLICATE_ID,
        "two files have the same id",
        where=case_id,
        expected="one file, or one folder, under each name without its ending",
        got=f"{_names(found[case_id])}, {_names(entry)}",
        remedy="keep one of them, or name the right one in a manifest",
    )
    if bad is None:
        raise error
    bad.append((case_id, error))


def _names(entry: object) -> str:
    return "+".join(p.name for p in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(p, Path))


def is_label_name(name: str) -> bool:
    """Whether a name (without suffix) says that it is a label."""
    return LABEL_NAME.fullmatch(name) is not None


def has_label_files(root: Path) -> bool:
    """Whether there is a file (or series) that one of the layouts would take for a label; annotations are none."""
    folders = [p for p in visible(root) if p.is_dir()]
    named = (p for folder in (root, *folders) for p in visible(folder) if is_label_name(strip_suffix(p.name)))
    inside = (p for folder in folders if folder.name.lower() in LABEL_FOLDERS for p in visible(folder))
    return any(is_series(p) or (is_image_file(p) and not is_annotation(p)) for p in (*named, *inside))


def folder_named(root: Path, names: Sequence[str]) -> Path | None:
    """The one folder in `root` with one of these names (any case), None where there is none.

    Raises:
        MedsegError: E_NO_CASES if several have such a name and none of them is in `DECISIVE`.
    """
    found = {p.name.lower(): p for p in visible(root) if p.is_dir() and p.name.lower() in names}
    for name in DECISIVE:
        if name in found:
            return found[name]
    if len(found) > 1:
        raise MedsegError(
            Code.NO_CASES,
            "several folders could be meant",
            where=root.resolve().name,
            got=", ".join(p.name for p in found.values()),
            remedy="rename those that are not to be used, or list the cases in a manifest (case,image,label)",
        )
    return next(iter(found.values()), None)


def split_off_labels(paths: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and the labels that lie among them: files named as the label of one of the others."""
    known = set(paths) | {match["id"] for name in paths if (match := CHANNEL_SUFFIX.fullmatch(name))}
    labels = {
        name: path for name, path in paths.items() if (match := LABEL_NAME.fullmatch(name)) and match["id"] in known
    }
    return {name: path for name, path in paths.items() if name not in labels}, labels


def name_some(ids: Iterable[object]) -> str:
    """The first `MAX_NAMED` of some ids, and how many more there are."""
    names = [str(i) for i in ids]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
