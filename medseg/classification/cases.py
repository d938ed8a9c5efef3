"""Images that each have a class: class folders, a CSV, or an npz as MedMNIST's.

Class folders: a folder per class, perhaps below train, val and test. In a class folder a file is a case, and so is a
folder below it that holds the files of one DICOM series. CSV: `image`, `class`, perhaps `case`, `patient`, `split`;
paths are relative to the CSV. npz: `train_images` (N, H, W), (N, H, W, 3) or (N, D, H, W) with `train_labels` (N) or
(N, 1); the same for val and test.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg.classification.images import ImageCase, NpzImage, npz_arrays
from medseg.data.layouts import name_some, visible
from medseg.data.manifest import SPLITS
from medseg.errors import Code, MedsegError
from medseg.formats import is_dicom, is_image_file, strip_suffix

MASK_NAME = re.compile(r"(?:^|[ _.\-])masks?(?:[ _.\-]\d+)?$", re.IGNORECASE)
"""Names of drawn masks beside images ("benign (1)_mask", "benign (1)_mask_1"): they are no images to classify."""
COLUMNS = {
    "image": "image",
    "path": "image",
    "file": "image",
    "filename": "image",
    "class": "class",
    "label": "class",
    "diagnosis": "class",
    "case": "case",
    "case_id": "case",
    "id": "case",
    "patient": "patient",
    "patient_id": "patient",
    "subject": "patient",
    "split": "split",
}
"""Accepted names of CSV columns → what they mean."""
NPZ_SPLITS = ("train", "val", "test")
MAX_CLASSES = 1000
"""More classes than this are no classes: a column of ids was taken for them."""


@dataclass(frozen=True)
class Found:
    """What was found.

    Args:
        layout: of what kind it is, in words.
        cases: sorted by id.
        classes: their names, sorted; the order of the network's outputs.
        left_out: what lies there and is no case, in words.
    """

    layout: str
    cases: tuple[ImageCase, ...]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def find_classified(root: Path, classes: Sequence[str] | None = None) -> Found:
    """The images of a data set and their classes; nothing is read but tables and the labels of an npz.

    Args:
        root: folder of class folders, CSV or npz.
        classes: their names in the order of the outputs. Of folders and CSVs they choose and order the names found; of
            an npz they name its numbers.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_CONFIG for a table that is not understood, E_LABEL for classes that are
            not there, E_DUPLICATE_ID.
    """
    if not root.exists():
        raise MedsegError(
            Code.MISSING, "there is no such folder or file", where=root.name, remedy="check the path in data.root"
        )
    if root.is_dir():
        found = _from_folders(root)
    elif root.suffix.lower() == ".npz":
        return _from_npz(root, classes)
    elif root.suffix.lower() == ".csv":
        found = _from_csv(root)
    else:
        raise MedsegError(
            Code.UNSUPPORTED,
            "classes cannot be read from a file of this kind",
            where=root.name,
            expected="a folder of class folders, a CSV (image,class,patient,split), or an npz as MedMNIST's",
            remedy="list the images in a CSV",
        )
    return _with_classes(found, classes)


def find_images(paths: Sequence[Path]) -> tuple[ImageCase, ...]:
    """Images without classes, to predict: files, folders of images however deep, or the images of an npz.

    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_DUPLICATE_ID.
    """
    cases: list[ImageCase] = []
    for path in paths:
        if not path.exists():
            raise MedsegError(
                Code.MISSING, "the input is not there", where=path.name, expected="a file or a folder", got="nothing"
            )
        if path.is_file() and path.suffix.lower() == ".npz":
            cases += [replace(case, class_name=None, split=None) for case in _from_npz(path, None).cases]
        elif path.is_file():
            cases.append(ImageCase(strip_suffix(path.name), path))
        elif _is_series(path):
            cases.append(ImageCase(path.resolve().name, path))
        else:
            sources, _ = _images_below(path)
            cases += _named([(path, source, None, None) for source in sources])
    if not cases:
        raise MedsegError(
            Code.NO_CASES, "there is no image", where=name_some([path.name for path in paths]), remedy="check the paths"
        )
    _refuse_same_ids(cases)
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _from_folders(root: Path) -> Found:
    folders = [path for path in visible(root) if path.is_dir()]
    splits = {path: SPLITS[path.name.lower()] for path in folders if path.name.lower() in SPLITS}
    below_splits = len(splits) >= 2 or (len(splits) == 1 and len(folders) == 1)
    places = [(f, splits.get(p)) for p in splits for f in visible(p) if f.is_dir()] if below_splits else []
    places = places or [(path, None) for path in folders]
    entries: list[tuple[Path, Path, str | None, str | None]] = []
    masks: list[str] = []
    for folder, split in places:
        sources, left = _images_below(folder)
        masks += left
        entries += [(root, source, folder.name, split) for source in sources]
    if len({folder.name for folder, _ in places}) < 2 or not entries:
        raise MedsegError(
            Code.NO_CASES,
            "no class folders with images were found",
            where=root.name,
            expected="a folder for each class (or train, val and test with them inside), a CSV, or an npz",
            got=", ".join(path.name for path in folders[:5]) or "no folders",
            remedy="sort the images into one folder per class, or list them in a CSV: image,class,patient,split",
        )
    unused = [path.name for path in folders if below_splits and path not in splits]
    left_out = [f"{len(masks)} masks beside the images ({name_some(sorted(masks))})"] if masks else []
    left_out += [f"folders beside train, val and test: {name_some(unused)}"] if unused else []
    cases = _named(entries)
    _refuse_same_ids(cases)
    kind = "class folders below " + ", ".join(sorted(path.name for path in splits)) if below_splits else "class folders"
    names = sorted({case.class_name for case in cases if case.class_name is not None})
    return Found(kind, tuple(sorted(cases, key=lambda c: c.case_id)), tuple(names), tuple(left_out))


def _images_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Files and DICOM series at any depth, and the names of masks that were left out."""
    sources: list[Path] = []
    masks: list[str] = []
    for path in visible(folder):
        if path.is_dir():
            if _is_series(path):
                sources.append(path)
            else:
                below, left = _images_below(path)
                sources += below
                masks += left
        elif is_image_file(path) or is_dicom(path):
            if MASK_NAME.search(strip_suffix(path.name)):
                masks.append(path.name)
            else:
                sources.append(path)
    return sources, masks


def _is_series(folder: Path) -> bool:
    files = [path for path in visible(folder) if path.is_file()]
    return bool(files) and is_dicom(files[0]) and sum(is_dicom(path) for path in files[:3]) == len(files[:3])


def _named(entries: Sequence[tuple[Path, Path, str | None, str | None]]) -> list[ImageCase]:
    """Cases of (root, source, class, split): named by their files, or by their paths where names occur twice."""
    stems = [strip_suffix(source.name) for _, source, _, _ in entries]
    count = Counter(stem.casefold() for stem in stems)
    return [
        ImageCase(
            stem if count[stem.casefold()] == 1 else strip_suffix(source.relative_to(root).as_posix()),
            source,
            class_name,
            split=split,
        )
        for stem, (root, source, class_name, split) in zip(stems, entries, strict=True)
    ]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV by the meaning of their columns; columns of no known meaning are left out.

    Raises:
        MedsegError: E_CONFIG.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count), strict=True)
        meanings = {column: COLUMNS.get(column.strip().lower()) for column in reader.fieldnames or ()}
        rows = []
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise ValueError(f"line {number} has more or fewer fields than the header")
            rows.append({m: row[c].strip() for c, m in meanings.items() if m is not None})
    except (OSError, ValueError, csv.Error) as error:
        raise MedsegError(
            Code.CONFIG,
            "the table cannot be read",
            where=path.name,
            expected="CSV in UTF-8 with a header: image,class,patient,split",
            got=str(error),
            remedy="save it as CSV UTF-8; put paths that hold the separator in double quotes",
        ) from error
    twice = [meaning for meaning, n in Counter(m for m in meanings.values() if m).items() if n > 1]
    if twice:
        raise MedsegError(
            Code.CONFIG,
            f"several columns mean the {twice[0]}",
            where=path.name,
            got=", ".join(column for column, meaning in meanings.items() if meaning == twice[0]),
            remedy="keep one of them, or rename the others",
        )
    return rows


def _from_csv(path: Path) -> Found:
    rows = read_table(path)
    if not rows or not {"image", "class"} <= rows[0].keys():
        raise MedsegError(
            Code.CONFIG,
            "the table lacks the columns image and class, or has no rows",
            where=path.name,
            expected="image,class, and perhaps case,patient,split",
            got=", ".join(rows[0]) if rows else "no rows",
        )
    cases = []
    for number, row in enumerate(rows, start=2):
        where, split = f"{path.name}, line {number}", row.get("split", "").lower()
        if not row["image"] or not row["class"]:
            raise MedsegError(Code.CONFIG, "a row without an image or a class", where=where)
        if split not in SPLITS:
            raise MedsegError(
                Code.CONFIG, "unknown split", where=where, expected="train, val, test or nothing", got=repr(split)
            )
        source = path.parent / row["image"]
        case_id = row.get("case") or strip_suffix(source.name)
        cases.append(ImageCase(case_id, source, row["class"], row.get("patient") or None, SPLITS[split]))
    absent = [case.case_id for case in cases if isinstance(case.source, Path) and not case.source.exists()]
    if absent:
        raise MedsegError(
            Code.MISSING,
            f"{len(absent)} of {len(cases)} images are not there",
            where=f"{path.name}: {name_some(absent)}",
            remedy="paths are relative to the folder of the CSV: correct them, or take the rows out",
        )
    _refuse_same_ids(cases)
    names = sorted({case.class_name for case in cases if case.class_name is not None})
    return Found(f"table {path.name}", tuple(sorted(cases, key=lambda c: c.case_id)), tuple(names))


def _from_npz(path: Path, classes: Sequence[str] | None) -> Found:
    arrays = npz_arrays(path)
    cases: list[ImageCase] = []
    numbers: set[int] = set()
    for split in (name for name in NPZ_SPLITS if f"{name}_images" in arrays):
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
        if (
            labels is None
            or len(labels) != len(images)
            or labels.reshape(len(images), -1).shape[1:] != (1,)
            or not np.issubdtype(labels.dtype, np.integer)
            or images.ndim not in (3, 4)
        ):
            raise MedsegError(
                Code.CONFIG,
                "the arrays of the npz do not fit each other",
                where=f"{path.name}, {split}",
                expected="images (N, H, W), (N, H, W, 3) or (N, D, H, W), and labels (N) or (N, 1) of whole numbers",
                got=f"images {images.shape}, labels {None if labels is None else (labels.shape, str(labels.dtype))}",
                remedy="several labels per image (multi-label tasks) are not classified here",
            )
        values = labels.reshape(-1).astype(int).tolist()
        numbers.update(values)
        key, digits = f"{split}_images", len(str(len(images) - 1))
        cases += [
            ImageCase(f"{split}_{i:0{digits}}", NpzImage(path, key, i), str(value), split=split)
            for i, value in enumerate(values)
        ]
    if not cases:
        raise MedsegError(
            Code.NO_CASES,
            "the npz holds no images under the names that are looked for",
            where=path.name,
            expected="train_images, train_labels, val_images, …",
            got=", ".join(list(arrays)[:8]) or "no arrays",
        )
    if classes is not None and not all(0 <= number < len(classes) for number in numbers):
        raise MedsegError(
            Code.LABEL,
            "the labels of the npz are no places in the list of classes",
            where="data.classes",
            expected=f"numbers from 0 to {len(classes) - 1}",
            got=f"{min(numbers)} to {max(numbers)}",
        )
    names = [str(number) for number in sorted(numbers)]
    if classes is not None:
        cases = [replace(case, class_name=classes[int(case.class_name or 0)]) for case in cases]
        names = list(classes)
    _refuse_number(names, path.name)
    return Found(f"arrays of {path.name}", tuple(sorted(cases, key=lambda c: c.case_id)), tuple(names))


def _with_classes(found: Found, classes: Sequence[str] | None) -> Found:
    """The cases of the classes that were named, in their order."""
    if classes is None:
        _refuse_number(found.classes, "data.root")
        return found
    absent = [name for name in classes if name not in found.classes]
    if absent or len(set(classes)) < len(classes):
        raise MedsegError(
            Code.LABEL,
            "classes that no image has" if absent else "a class is named twice",
            where="data.classes",
            expected=", ".join(found.classes),
            got=", ".join(absent or classes),
        )
    _refuse_number(classes, "data.classes")
    cases = tuple(case for case in found.cases if case.class_name in classes)
    other = [name for name in found.classes if name not in classes]
    left_out = (*found.left_out, f"the images of {name_some(other)}: data.classes does not name them") if other else ()
    return replace(found, cases=cases, classes=tuple(classes), left_out=left_out or found.left_out)


def _refuse_number(classes: Sequence[str], where: str) -> None:
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise MedsegError(
            Code.LABEL,
            "this is no number of classes",
            where=where,
            expected=f"2 to {MAX_CLASSES}",
            got=f"{len(classes)}: {name_some(list(classes))}",
        )


def _refuse_same_ids(cases: Iterable[ImageCase]) -> None:
    count = Counter(case.case_id.casefold() for case in cases)
    twice = sorted(case_id for case_id, n in count.items() if n > 1)
    if twice:
        raise MedsegError(
            Code.DUPLICATE_ID,
            f"{len(twice)} names stand for several images",
            where=name_some(twice),
            remedy="give each image a name of its own, in a column case of a CSV",
        )
