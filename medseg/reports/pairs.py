"""Which prediction belongs to which reference, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.data.manifest import read_dataset_json
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, is_image_file, open_label, strip_suffix
from medseg.formats.label_table import labels_for, read_labels
from medseg.label_values import integer_values
from medseg.labels import IGNORE_INDEX, REST, TABLE_FILE, Labels
from medseg.volume import Grid, Volume

MissingPolicy = Literal["error", "count", "skip"]
DATASET_FILE = "dataset.json"
"""Declares the classes of a data set in nnU-Net's layout, and of what nnU-Net has predicted."""
MAX_CLASSES = 255
"""More values than this in references are not classes but instances (or the file is an image)."""
INSTANCES = "object"
"""Name of the class of instances where nobody gave one."""
_LISTED = 10
_ROLE = re.compile(r"[_-](seg|segmentation|mask|label|labels)$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """One case; `predicted` is None where there is no prediction and that is to be counted as an empty one."""

    case: str
    predicted: Path | None
    reference: Path


def case_id(path: Path) -> str:
    """The file's name without its type and without a trailing `_seg`, `_mask` or `_label`."""
    return _ROLE.sub("", strip_suffix(path.name))


def match_pairs(predicted: Path, reference: Path, *, missing: MissingPolicy) -> list[Pair]:
    """Match two files, or the files of two folders by their case id, in the order of the ids.

    Args:
        predicted: a file or a folder.
        reference: the same.
        missing: what a reference without a prediction is: an "error", an empty prediction ("count"), or left out
            ("skip": for a look at a part; the mean then is not that of the data set).
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_DUPLICATE_ID.
    """
    for path in (predicted, reference):
        if not path.exists():
            raise MedsegError(Code.MISSING, "there is no such file or folder", where=path.name)
    if reference.is_file() and predicted.is_file():
        return [Pair(case_id(reference), predicted, reference)]
    if reference.is_file() or predicted.is_file():
        raise MedsegError(
            Code.MISSING,
            "a file can be compared with a file, a folder with a folder",
            where=f"{predicted.name} and {reference.name}",
            remedy="give two files, or two folders",
        )
    predictions, references = by_case(predicted), by_case(reference)
    remedy = (
        "remove them, or add their references; files with other names can be compared one by one: PRED_FILE REF_FILE"
    )
    alone = set(predictions) - set(references)
    _refuse(alone, f"prediction without a reference in {reference.name}", predicted, remedy)
    if missing == "error":
        remedy = "predict them too, or use --missing count (as empty predictions) or --missing skip (left out)"
        _refuse(
            set(references) - set(predictions), f"reference without a prediction in {predicted.name}", reference, remedy
        )
    wanted = references.keys() & predictions.keys() if missing == "skip" else references.keys()
    return [Pair(case, predictions.get(case), references[case]) for case in sorted(wanted)]


def labels_of(
    predicted: Path,
    reference: Path,
    references: Sequence[Path],
    *,
    reading: Reading = STRICT,
    instances: bool = False,
) -> Labels:
    """The classes that a table or a dataset.json beside the predictions declares, else one beside the references, else
    one class per value of the references.

    Args:
        predicted: a file or a folder.
        reference: the same.
        references: the files of `reference` that are compared.
        reading: what is asked of the readers beyond their strict defaults.
        instances: the files number instances; where nothing is declared they are of one class.
    Raises:
        MedsegError: E_LABEL or E_CONFIG if the file cannot be understood, or there are no classes or too many.
    """
    for place in (predicted, reference):
        declared = declared_labels(place)
        if declared is not None:
            return declared
    if instances:
        return Labels.from_mapping({"background": 0, INSTANCES: REST})
    values: set[int] = set()
    for reference in references:
        values.update(
            int(v) for v in np.unique(integer_values(open_label(reference, reading).array, where=reference.name))
        )
        if len(values) > MAX_CLASSES:
            raise MedsegError(
                Code.LABEL,
                "the references hold too many values to be classes",
                where=reference.name,
                expected=f"at most {MAX_CLASSES}",
                got=f"{len(values)} or more",
                remedy="give the classes; if each value is one object (nucleus, lesion), use --instances",
            )
    names = {v: "background" if v == 0 else f"label_{v}" for v in sorted(values)}
    return Labels.from_mapping({name: v for v, name in names.items()})


def instance_labels(labels: Labels) -> Labels:
    """The same for files whose values number instances: all that is not background or ignored is the one class.

    Raises:
        MedsegError: E_LABEL where there are several classes.
    """
    if labels.regions or labels.num_classes != 2:
        raise MedsegError(
            Code.LABEL,
            "maps of instances have one class, of which each value is an instance",
            where="--instances",
            got=labels.to_json(),
            remedy='evaluate the classes one by one, or give --labels "{background: 0, nucleus: rest}"',
        )
    return Labels(labels.names, (labels.values[0], ()), ignore=labels.ignore)


def numbered_instances(
    volumes: tuple[Volume, Volume], indices: tuple[NDArray[np.uint8], NDArray[np.uint8]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The instances of prediction and reference, 0 where there is none or where the reference is not counted.

    Args:
        volumes: maps with the values of files, on one grid.
        indices: the same as class indices.
    """
    counted = indices[1] != IGNORE_INDEX
    ours, theirs = (
        np.where((index == 1) & counted, _distinct(volume.array), 0)
        for volume, index in zip(volumes, indices, strict=True)
    )
    return ours, theirs


def _distinct(values: NDArray[Any]) -> NDArray[np.int64]:
    """1, 2, … for the values of a file, whatever they are."""
    _, inverse = np.unique(values, return_inverse=True)
    return inverse.reshape(values.shape).astype(np.int64) + 1


def aligned(predicted: Volume, grid: Grid, case: str) -> Volume:
    """A prediction with its axes in the order of the reference's grid.

    Raises:
        MedsegError: E_GRID if the two do not lie on one grid.
    """
    if predicted.grid.difference(grid) is None:
        return predicted
    try:
        return predicted.oriented_as(grid)
    except MedsegError as error:
        raise MedsegError(
            Code.GRID,
            "prediction and reference do not lie on one grid",
            where=case,
            expected=f"{_describe(grid)} (reference)",
            got=f"{_describe(predicted.grid)} (prediction): {predicted.grid.difference(grid)}",
            remedy="predict on the scan's own grid, or resample the prediction with nearest neighbour",
        ) from error


def _describe(grid: Grid) -> str:
    spacing = " × ".join(f"{s:.4g}" for s in grid.spacing_mm)
    if grid.is_picture:
        return f"picture of shape {grid.shape}"
    return f"shape {grid.shape}, spacing {spacing} mm, orientation {grid.orientation}"


def declared_labels(place: Path) -> Labels | None:
    """The classes of a table beside label files, or of the dataset.json in their folder or the one above it, where
    nnU-Net has it."""
    is_folder = place.is_dir()
    table = read_labels(place / TABLE_FILE) if is_folder else labels_for(place)
    if table is not None:
        return table
    folder = place.absolute() if is_folder else place.absolute().parent
    for description in (folder / DATASET_FILE, folder.parent / DATASET_FILE):
        if description.is_file():
            classes = read_dataset_json(description).labels
            return None if classes is None else Labels.from_mapping(classes)
    return None


def by_case(folder: Path) -> dict[str, Path]:
    """The images of a folder by their case id, in the order of their names.

    Raises:
        MedsegError: E_DUPLICATE_ID, E_NO_CASES.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or not is_image_file(path):
            continue
        case = case_id(path)
        if case in found:
            raise MedsegError(
                Code.DUPLICATE_ID,
                f"two files have the case id {case!r}",
                where=folder.name,
                got=f"{found[case].name} and {path.name}",
                remedy="keep only the masks in this folder",
            )
        found[case] = path
    if not found:
        raise MedsegError(Code.NO_CASES, "the folder holds no image that can be read", where=folder.name)
    return found


def _refuse(cases: set[str], what: str, where: Path, remedy: str | None = None) -> None:
    if not cases:
        return
    listed = ", ".join(sorted(cases)[:_LISTED]) + (", …" if len(cases) > _LISTED else "")
    raise MedsegError(
        Code.MISSING,
        f"{len(cases)} × {what}",
        where=where.name,
        got=listed,
        remedy=remedy or "remove them, or add their references",
    )
