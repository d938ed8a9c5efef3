"""Images that each have a class: class folders, a CSV, or an npz as MedMNIST's.

Class folders: a folder per class, perhaps below train, val and test. In a class folder a file is a case; deeper down
`sources.images_below` says what is. DICOM files tell which images are of one patient. Where names occur twice, the
folders above stand before them in the ids: those of classes and splits by name, others, which may be named after
patients, under pseudonyms. CSV: `image`, `class`, perhaps `case`, `patient`, `split`; paths are relative to the CSV.
npz: `train_images` (N, H, W), (N, H, W, 1 or 3) or (N, D, H, W) with `train_labels` (N) or (N, 1); the same for val
and test.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.classification.images import ImageCase, NpzImage, npz_arrays
from medseg.classification.sources import images_below, with_patients
from medseg.data.layouts import name_some, visible
from medseg.data.manifest import SPLITS, exists
from medseg.errors import Code, MedsegError
from medseg.formats import Source, strip_suffix

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
HASHED_BYTES = 2**20
"""Of an image, which tell its folder from others."""
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


def find_classified(root: Path, classes: Sequence[str] | None = None, *, to_train: bool = True) -> Found:
    """The images of a data set and their classes; nothing is read but tables, arrays of an npz, headers of DICOM files.

    Args:
        root: folder of class folders, CSV or npz.
        classes: their names in the order of the outputs. Of folders and CSVs they choose and order the names found; of
            an npz they name its numbers.
        to_train: refuse what nothing can be learnt from: less than two classes.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_CONFIG for a table that is not understood, E_LABEL for classes that are
            not there, E_DUPLICATE_ID.
    """
    if not exists(root):
        raise MedsegError(
            Code.MISSING, "there is no such folder or file", where=root.name, remedy="check the path in data.root"
        )
    if root.is_dir():
        found = _from_folders(root, 2 if to_train else 1)
    elif root.suffix.lower() == ".npz":
        found = _from_npz(root, classes)
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
    found = found if root.suffix.lower() == ".npz" and root.is_file() else _with_classes(found, classes)
    if to_train:
        _refuse_number(found.classes, root.name if classes is None else "data.classes")
    return replace(found, cases=tuple(with_patients(found.cases)))


def find_images(paths: Sequence[Path], classes: Collection[str] = ()) -> Found:
    """Images without classes, to predict: files, folders of images however deep, or the images of an npz.

    Args:
        paths: where they are.
        classes: names of folders that ids may hold, so that the same folders as references have the same ids.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_DUPLICATE_ID.
    """
    cases: list[ImageCase] = []
    masks: list[str] = []
    for path in paths:
        if not exists(path):
            raise MedsegError(
                Code.MISSING, "the input is not there", where=path.name, expected="a file or a folder", got="nothing"
            )
        if path.is_file() and path.suffix.lower() == ".npz":
            cases += _from_npz(path, None, labelled=False).cases
        elif path.is_file():
            cases.append(ImageCase(strip_suffix(path.name), path))
        else:
            sources, left = images_below(path)
            masks += left
            if path in sources:
                cases.append(ImageCase(path.resolve().name, sources.pop(path)))
            cases += _named([(path, place, None, None) for place in sources], classes, sources)
    if not cases:
        raise MedsegError(
            Code.NO_CASES, "there is no image", where=name_some([path.name for path in paths]), remedy="check the paths"
        )
    _refuse_same_ids(cases)
    return Found("images", tuple(sorted(cases, key=lambda c: c.case_id)), (), _said_of(masks))


def _from_folders(root: Path, least_classes: int) -> Found:
    folders = [path for path in visible(root) if path.is_dir()]
    splits = {path: SPLITS[path.name.lower()] for path in folders if path.name.lower() in SPLITS}
    below_splits = len(splits) >= 2 or (len(splits) == 1 and len(folders) == 1)
    places = [(f, splits.get(p)) for p in splits for f in visible(p) if f.is_dir()] if below_splits else []
    places = places or [(path, None) for path in folders]
    entries: list[tuple[Path, Path, str | None, str | None]] = []
    masks: list[str] = []
    images: dict[Path, Source] = {}
    for folder, split in places:
        sources, left = images_below(folder, each_file=True)
        masks += left
        images |= sources
        entries += [(root, place, folder.name, split) for place in sources]
    if len({folder.name for folder, _ in places}) < least_classes or not entries:
        raise MedsegError(
            Code.NO_CASES,
            "no class folders with images were found",
            where=root.name,
            expected="a folder for each class (or train, val and test with them inside), a CSV, or an npz",
            got=", ".join(path.name for path in folders[:5]) or "no folders",
            remedy="sort the images into one folder per class, or list them in a CSV: image,class,patient,split",
        )
    unused = [path.name for path in folders if below_splits and path not in splits]
    left_out = [*_said_of(masks)]
    left_out += [f"folders beside train, val and test: {name_some(unused)}"] if unused else []
    cases = _named(entries, {folder.name for folder, _ in places}, images)
    _refuse_same_ids(cases)
    kind = "class folders below " + ", ".join(sorted(path.name for path in splits)) if below_splits else "class folders"
    names = sorted({case.class_name for case in cases if case.class_name is not None})
    return Found(kind, tuple(sorted(cases, key=lambda c: c.case_id)), tuple(names), tuple(left_out))


def _said_of(masks: Sequence[str]) -> tuple[str, ...]:
    return (f"{len(masks)} masks beside the images ({name_some(sorted(masks))})",) if masks else ()


def _named(
    entries: Sequence[tuple[Path, Path, str | None, str | None]],
    classes: Collection[str],
    images: Mapping[Path, Source],
) -> list[ImageCase]:
    """Cases of (root, place, class, split), read from `images`: named by their files, or by their paths where names
    occur twice."""
    stems = [strip_suffix(source.name) for _, source, _, _ in entries]
    count = Counter(stem.casefold() for stem in stems)
    names: dict[Path, str] = {}
    for root, source, _, _ in entries:
        folders = [folder for folder in source.parents if folder.is_relative_to(root) and folder != root]
        for folder in (f for f in folders if f not in names and count[strip_suffix(source.name).casefold()] > 1):
            is_plain = folder.name in classes or folder.name.lower() in SPLITS
            names[folder] = folder.name if is_plain else _pseudonym(folder, source)
    cases = []
    for stem, (root, source, class_name, split) in zip(stems, entries, strict=True):
        below = source.relative_to(root).parents if count[stem.casefold()] > 1 else ()
        parts = [names[root / folder] for folder in reversed(below) if folder.name]
        cases.append(ImageCase("/".join([*parts, stem]), images[source], class_name, split=split))
    return cases


def _pseudonym(folder: Path, source: Path) -> str:
    """What a folder is called in ids: its name may be a patient's. Without the images nobody can guess at it."""
    inside = source if source.is_dir() else source.parent  # of a series among others
    image = source if source.is_file() else next((path for path in visible(inside) if path.is_file()), source)
    try:
        with image.open("rb") as file:
            content = file.read(HASHED_BYTES)
    except OSError:  # reading the case says why
        content = b""
    return hashlib.sha256(folder.name.encode("utf-8", "surrogateescape") + b"\0" + content).hexdigest()[:10]


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
    absent = [case.case_id for case in cases if isinstance(case.source, Path) and not exists(case.source)]
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


def _from_npz(path: Path, classes: Sequence[str] | None, *, labelled: bool = True) -> Found:
    arrays = npz_arrays(path)
    cases: list[ImageCase] = []
    numbers: set[int] = set()
    for split in (name for name in NPZ_SPLITS if f"{name}_images" in arrays):
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
        if images.ndim not in (3, 4) or (labelled and not _is_one_each(labels, len(images))):
            raise MedsegError(
                Code.CONFIG,
                "the arrays of the npz do not fit each other",
                where=f"{path.name}, {split}",
                expected="images (N, H, W), (N, H, W, 1 or 3) or (N, D, H, W)"
                + (", and labels (N) or (N, 1) of whole numbers" if labelled else ""),
                got=f"images {images.shape}, labels {None if labels is None else (labels.shape, str(labels.dtype))}",
                remedy="several labels per image (multi-label tasks) are not classified here" if labelled else None,
            )
        key, digits = f"{split}_images", len(str(len(images) - 1))
        if labels is None or not labelled:
            cases += [ImageCase(f"{split}_{i:0{digits}}", NpzImage(path, key, i)) for i in range(len(images))]
            continue
        values = labels.reshape(-1).astype(int).tolist()
        numbers.update(values)
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
    return Found(f"arrays of {path.name}", tuple(sorted(cases, key=lambda c: c.case_id)), tuple(names))


def _is_one_each(labels: NDArray[Any] | None, number: int) -> bool:
    """Whether labels are a whole number for each image."""
    return labels is not None and labels.shape in ((number,), (number, 1)) and np.issubdtype(labels.dtype, np.integer)


def _with_classes(found: Found, classes: Sequence[str] | None) -> Found:
    """The cases of the classes that were named, in their order."""
    if classes is None:
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
