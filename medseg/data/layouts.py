"""Which files of a folder belong together: the layouts that are recognised, by names alone.

A layout is found by looking at names only; no image is opened here. The layouts, in the order in which they are tried:

1. `dataset.json` with `imagesTr` and `labelsTr`: Medical Segmentation Decathlon, nnU-Net v1 and v2;
2. paired folders: one of `IMAGE_FOLDERS` beside one of `LABEL_FOLDERS`;
3. one folder per case, with its channels and one file named as a label in it;
4. images and labels in one folder, the labels told apart by a suffix (`img01.png`, `img01_mask.png`).

**Channels.** `case_0000.nii.gz`, `case_0001.nii.gz` are two channels of `case`, but many ids end in digits of their
own. So `_dddd` (exactly four digits) is a channel only where a label stands under the name without it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from medseg.errors import Code, MedsegError
from medseg.formats import Source, is_dicom, is_image_file, strip_suffix

if TYPE_CHECKING:
    from medseg.data.structure_table import StructureTable
    from medseg.formats.dicom.annotations import DrawnLabel

T = TypeVar("T")

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


class Found(NamedTuple):
    """Cases that a layout explains."""

    layout: str
    cases: list[Case]
    channels: tuple[str, ...] | None


def visible(folder: Path) -> list[Path]:
    """What lies in a folder without hidden entries, sorted."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


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


def image_paths(folder: Path) -> dict[str, Path]:
    """Image files and DICOM series folders directly in a folder, by id (the name without its suffix).

    DICOM annotations are left out, but not from among slices.

    Raises:
        MedsegError: E_DUPLICATE_ID if two have the same id.
    """
    found: dict[str, Path] = {}
    slices = is_series(folder)  # whose headers are not read one by one
    for path in visible(folder):
        if path.is_file() and is_image_file(path) and (slices or not is_annotation(path)):
            add_entry(found, strip_suffix(path.name), path)
        elif is_series(path):
            add_entry(found, path.name, path)
    return found


def image_entries(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Like `image_paths`, and each further folder of images as one id with all of them but labels."""
    found: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in image_paths(folder).items()}
    for path in visible(folder):
        if path.is_dir() and not is_series(path):
            inside = [p for name, p in image_paths(path).items() if not is_label_name(name)]
            if inside:
                add_entry(found, path.name, tuple(inside))
    return found


def add_entry(found: dict[str, T], case_id: str, entry: T) -> None:
    """Put an entry under an id.

    Raises:
        MedsegError: E_DUPLICATE_ID if the id is there already (`a.png` beside `a.tif`).
    """
    if case_id in found:
        raise MedsegError(
            Code.DUPLICATE_ID,
            "two files have the same id",
            where=case_id,
            got=f"{_names(found[case_id])}, {_names(entry)}",
            remedy="keep one of them, or name the right one in a manifest",
        )
    found[case_id] = entry


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


def paired_folders(root: Path, *, require_labels: bool) -> Found | None:
    """Layout 2: a folder of images beside a folder of labels."""
    images, labels = folder_named(root, IMAGE_FOLDERS), folder_named(root, LABEL_FOLDERS)
    if images is None or (labels is None and require_labels):
        return None
    cases, channels = match_labels(
        image_entries(images), image_paths(labels) if labels else {}, require_labels=require_labels
    )
    return Found(f"folders {images.name} and {labels.name}" if labels else f"folder {images.name}", cases, channels)


def folder_per_case(root: Path, *, require_labels: bool) -> Found | None:
    """Layout 3: in each folder the channels of a case and one file named as its label."""
    images: dict[str, tuple[Path, ...]] = {}
    labels: dict[str, Path] = {}
    for folder in (p for p in visible(root) if p.is_dir()):
        inside = image_paths(folder)
        of_label = [path for name, path in inside.items() if is_label_name(name) and not is_annotation(path)]
        of_image = tuple(path for name, path in inside.items() if not is_label_name(name))
        if is_series(folder):
            of_image = (folder,)
        if len(of_label) > 1:
            raise MedsegError(
                Code.DUPLICATE_ID,
                "two files of a case are named as labels",
                where=folder.name,
                got=name_some(p.name for p in of_label),
                remedy="list the cases in a manifest (case,image,label)",
            )
        if of_image:
            images[folder.name] = of_image
            labels.update(dict.fromkeys([folder.name], of_label[0]) if of_label else {})
    if not labels:
        return None
    return Found("one folder per case", *match_labels(images, labels, require_labels=require_labels))


def labels_beside_images(root: Path, *, require_labels: bool) -> Found | None:
    """Layout 4: images and labels in one folder."""
    images, labels = split_off_labels(image_paths(root))
    if not labels:
        return None
    entries = {name: (path,) for name, path in images.items()}
    return Found("labels beside images", *match_labels(entries, labels, require_labels=require_labels))


def split_off_labels(paths: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and the labels that lie among them: files named as the label of one of the others."""
    known = set(paths) | {match["id"] for name in paths if (match := CHANNEL_SUFFIX.fullmatch(name))}
    labels = {
        name: path for name, path in paths.items() if (match := LABEL_NAME.fullmatch(name)) and match["id"] in known
    }
    return {name: path for name, path in paths.items() if name not in labels}, labels


def match_labels(
    images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path], *, require_labels: bool
) -> tuple[list[Case], tuple[str, ...] | None]:
    """Bring images and labels together by their names.

    Args:
        images: as `image_entries` gives them.
        labels: as `image_paths` gives them.
        require_labels: whether an image without a label is refused.
    Returns:
        The cases sorted by id, and the names of the channels where files are named by them.
    Raises:
        MedsegError: E_MISSING for an image without a label or a label without an image; E_DUPLICATE_ID for two
            labels of one image; E_CHANNELS if cases have other channel files.
    """
    label_of, files_of = _group(images, labels)
    if not label_of.keys() & files_of.keys() and images and labels:
        # "21_training.tif" and "21_manual1.gif": what all files of a folder end in is not part of the id
        again = _group(_without_common_tail(images), _without_common_tail(labels))
        if again[0].keys() & again[1].keys():
            label_of, files_of = again
    _refuse_missing(files_of, label_of, require_labels=require_labels)
    channels = _channel_names(files_of)
    cases = [
        Case(case_id, tuple(files_of[case_id][key] for key in sorted(files_of[case_id])), label_of.get(case_id))
        for case_id in sorted(files_of)
    ]
    return cases, channels


def _group(
    images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Labels by id, and for each id its files by channel ("" where there is one)."""
    numbered = {name: match for name in images if (match := CHANNEL_SUFFIX.fullmatch(name))}
    known = set(images) | {match["id"] for match in numbered.values()}
    label_of: dict[str, Path] = {}
    for name, path in labels.items():
        case_id = _id_of_label(name, known)
        if case_id in label_of:
            raise MedsegError(
                Code.DUPLICATE_ID,
                "two labels belong to one image",
                where=case_id,
                got=f"{label_of[case_id].name}, {path.name}",
                remedy="keep one of them, or name the right one in a manifest",
            )
        label_of[case_id] = path
    files_of: dict[str, dict[str, Path]] = {}
    for name, paths in images.items():
        match = numbered.get(name)
        if match and match["id"] in label_of and name not in label_of:
            files_of.setdefault(match["id"], {})[match["channel"]] = paths[0]
        elif len(paths) == 1:
            files_of.setdefault(name, {})[""] = paths[0]
        else:
            files_of.setdefault(name, {}).update({channel_of_file(path, name): path for path in paths})
    return label_of, files_of


def channel_of_file(path: Path, case_id: str) -> str:
    """The channel that a file in a case's own folder is named by: "flair" of `case7/case7_flair.nii.gz`."""
    return strip_suffix(path.name).removeprefix(case_id).lstrip("_-. ")


def _channel_names(files_of: Mapping[str, Mapping[str, Path]]) -> tuple[str, ...] | None:
    """The names that files give to the channels, None where they only number them.

    Raises:
        MedsegError: E_CHANNELS naming the cases whose files differ from the other cases'.
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for case_id, files in files_of.items():
        kinds.setdefault(() if set(files) <= {"", "0000"} else tuple(sorted(files)), []).append(case_id)
    usual = max(kinds, key=lambda kind: len(kinds[kind]), default=())
    others = [case_id for kind, ids in kinds.items() if kind != usual for case_id in ids]
    if others:
        raise MedsegError(
            Code.CHANNELS,
            f"{len(others)} cases have other channel files than the rest",
            where=name_some(others),
            expected="one file" if not usual else "the channels " + ", ".join(usual),
            got=f"{others[0]}: " + (", ".join(sorted(files_of[others[0]])).strip() or "one file"),
            remedy="every case needs the same channels under the same names: add the missing files, or leave cases out",
        )
    return usual if usual and not all(re.fullmatch(r"\d*", name) for name in usual) else None


def _id_of_label(name: str, known: set[str]) -> str:
    match = None if name in known else LABEL_NAME.fullmatch(name)
    return match["id"] if match and match["id"] in known else name


def _without_common_tail(names: Mapping[str, T]) -> dict[str, T]:
    """The same entries without the `_word` that all names end in; unchanged if there is none."""
    tails = {name[name.rfind("_") :] if "_" in name[1:] else "" for name in names}
    tail = tails.pop() if len(tails) == 1 and len(names) > 1 else ""
    return {name.removesuffix(tail): value for name, value in names.items()}


def _refuse_missing(images: Iterable[str], labels: Mapping[str, Path], *, require_labels: bool) -> None:
    alone = sorted(set(images) - labels.keys())
    extra = sorted(labels.keys() - set(images))
    if alone and require_labels:
        raise MedsegError(
            Code.MISSING,
            f"{len(alone)} of {len(set(images))} images have no label",
            where=name_some(alone),
            expected="a label with the image's name, or with _seg, _mask or _label behind it",
            got=_most_similar(alone[0], extra, "label"),
            remedy="add the labels, take the images away, or list the cases to use in a manifest (case,image,label)",
        )
    if extra:
        raise MedsegError(
            Code.MISSING,
            f"{len(extra)} labels have no image",
            where=name_some(extra),
            got=_most_similar(extra[0], alone, "image"),
            remedy="add the images, take the labels away, or list the cases to use in a manifest (case,image,label)",
        )


def _most_similar(name: str, candidates: Iterable[str], kind: str) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.0)
    return f"the nearest {kind} left over for {name!r} is {close[0]!r}" if close else f"no other {kind} is left over"


def name_some(ids: Iterable[object]) -> str:
    """The first `MAX_NAMED` of some ids, and how many more there are."""
    names = [str(i) for i in ids]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
