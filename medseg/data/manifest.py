"""Tables that describe data: manifests of cases (CSV, JSON) and the `dataset.json` of MSD and nnU-Net.

A manifest is for data that no folder layout describes.
CSV columns (any case): `case`, `image` (or several: `image_<channel>`), `label`, `patient`, `split`, `stratum` (or
`site`: what folds should have like shares of). JSON: a list of objects with the same keys (`images` may be a list), or
`{"cases": [...], "labels": {name: value}, "channels": [...]}`.
Paths are relative to the manifest's folder, or to the data folder where one is given beside it.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from medseg.data.layouts import Case, DataFolder, name_some
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats import strip_suffix
from medseg.labels import IGNORE, ORDER_KEY

COLUMNS = {
    "case": "case",
    "case_id": "case",
    "id": "case",
    "image": "image",
    "images": "image",
    "label": "label",
    "patient": "patient",
    "patient_id": "patient",
    "subject": "patient",
    "split": "split",
    "stratum": "stratum",
    "site": "stratum",
}
"""Accepted column names → what they mean; besides these, `image_<channel>`."""
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "": None,
}
"""Accepted values of the split column."""
TYPO_CUTOFF = 0.8
"""Similarity above which an unknown column is taken for a misspelled one and refused; others are left unread."""


def is_manifest(path: Path) -> bool:
    """Whether a path is a file that is read as a manifest."""
    return path.is_file() and path.suffix.lower() in (".csv", ".json") and path.name != "dataset.json"


P = ParamSpec("P")
T = TypeVar("T")


def _understood(read: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """A reader of a table in which a value of another kind than it must be (a number for a list) is a refusal."""

    @wraps(read)
    def reading(path: Path, /, *args: P.args, **options: P.kwargs) -> T:
        try:
            return read(path, *args, **options)
        except (AttributeError, TypeError, ValueError, KeyError, OSError, csv.Error) as error:
            raise MedsegError(
                Code.CONFIG,
                "the table holds a value that is not understood",
                where=path.name,
                got=error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}",
                remedy="correct it, or describe the cases in a manifest.csv (case,image,label)",
            ) from error

    return reading


@_understood
def read_manifest(path: Path, root: Path) -> DataFolder:
    """Read a manifest.

    Args:
        path: the CSV or JSON file.
        root: folder that relative paths start from.
    Raises:
        MedsegError: E_CONFIG for a table that is not understood.
    """
    rows, labels, channels = _rows(path)
    _check_columns({str(key) for row in rows for key in row}, path)
    cases = tuple(_case(row, f"{path.name}, case {number}", root) for number, row in enumerate(rows, start=1))
    named = tuple(key[len("image_") :] for key in (rows[0] if rows else ()) if key.lower().startswith("image_"))
    return DataFolder(root, f"manifest {path.name}", cases, labels, channels or (named if len(named) > 1 else None))


@_understood
def read_patients(path: Path) -> list[tuple[str, str]]:
    """The (case, patient) of a table's rows that have both; a manifest is such a table, and needs no images here.

    Args:
        path: CSV or JSON, with the columns of a manifest. A row without a case has the name of its image for it.
    Raises:
        MedsegError: E_CONFIG for a table that is not understood.
    """
    found = []
    for row in _rows(path)[0]:
        fields = {meaning: value for column, value in reversed(row.items()) if (meaning := _meaning(str(column)))}
        image = fields.get("image")
        image = image[0] if isinstance(image, list) and image else image
        case = str(fields.get("case") or strip_suffix(Path(str(image or "")).name)).strip()
        patient = str(fields.get("patient") or "").strip()
        if case and patient:
            found.append((case, patient))
    return found


def _rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None, tuple[str, ...] | None]:
    """The rows of a manifest, and the classes and channels that one in JSON declares."""
    if path.suffix.lower() != ".json":
        return _read_csv(path), None, None
    labels: dict[str, Any] | None = None
    channels: tuple[str, ...] | None = None
    table = read_json(path)
    if isinstance(table, Mapping):
        labels = dict(table["labels"]) if table.get("labels") else None
        channels = tuple(str(c) for c in table["channels"]) if table.get("channels") else None
        table = table.get("cases")
    if not isinstance(table, list) or not all(isinstance(row, Mapping) for row in table):
        raise MedsegError(
            Code.CONFIG,
            "the manifest is no list of cases",
            where=path.name,
            expected='[{"case": …, "image": …, "label": …}, …] or {"cases": [the same]}',
            got=type(table).__name__,
            remedy="write the cases as this list",
        )
    return [dict(row) for row in table], labels, channels


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MedsegError: E_CONFIG if it is not valid JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise MedsegError(
            Code.CONFIG,
            f"not valid JSON: {error}",
            where=path.name,
            expected="JSON in UTF-8",
            remedy="correct the file at the place that the message names",
        ) from error


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MedsegError(
            Code.CONFIG,
            "the manifest is not UTF-8 text",
            where=path.name,
            expected="UTF-8",
            got=f"byte {error.start} is none",
            remedy="save it as CSV UTF-8",
        ) from error
    # spreadsheets of many countries write ; where others write a comma
    first = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count)))
    ragged = [number for number, row in enumerate(rows, start=2) if None in row or None in row.values()]
    if ragged:
        raise MedsegError(
            Code.CONFIG,
            "lines with more or fewer fields than the header",
            where=path.name,
            got="lines " + name_some(ragged),
            remedy="put paths that hold the separator in double quotes",
        )
    return rows


def _check_columns(columns: Iterable[str], path: Path) -> None:
    meanings = {_meaning(column) for column in columns}
    for column in columns:
        close = difflib.get_close_matches(column.lower(), COLUMNS, n=1, cutoff=TYPO_CUTOFF)
        if _meaning(column) is None and close:
            raise MedsegError(
                Code.CONFIG,
                f"unknown column {column!r}",
                where=path.name,
                expected=", ".join(sorted({*COLUMNS.values(), "image_NAME"})),
                got=column,
                remedy=f"did you mean {close[0]!r}? otherwise rename the column",
            )
    if "image" not in meanings:
        raise MedsegError(
            Code.CONFIG,
            "the manifest has no column of images",
            where=path.name,
            expected="case,image,label,patient,split (only image is required)",
            got=", ".join(sorted(columns)),
            remedy="name the column of the images' paths image",
        )


def _meaning(column: str) -> str | None:
    return "image" if column.lower().startswith("image_") else COLUMNS.get(column.lower().strip())


def _case(row: Mapping[str, Any], where: str, root: Path) -> Case:
    """One row as a case; without an id the image's name is the id."""
    images: list[str] = []
    fields: dict[str, str] = {}
    for column, value in row.items():
        meaning = _meaning(column)
        if meaning == "image":
            images += [str(v) for v in (value if isinstance(value, list) else [value]) if v]
        elif meaning is not None and value is not None:
            fields[meaning] = str(value).strip()
    if not images:
        raise MedsegError(
            Code.CONFIG,
            "a case without an image",
            where=where,
            expected="at least one path",
            remedy="add the path of its image, or take the row out",
        )
    split = fields.get("split", "").lower()
    if split not in SPLITS:
        raise MedsegError(
            Code.CONFIG,
            "unknown split",
            where=where,
            expected="train, val, test or nothing",
            got=repr(split),
            remedy="correct the column split",
        )
    paths = tuple(root / image.strip() for image in images)
    return Case(
        case_id=fields.get("case") or strip_suffix(paths[0].name),
        images=paths,
        label=root / fields["label"] if fields.get("label") else None,
        patient=fields.get("patient") or None,
        split=SPLITS[split],
        stratum=fields.get("stratum") or None,
    )


def absent_files(case: Case) -> list[str]:
    """Names of the files of a case that are not there."""
    return [path.name for path in (*case.images, case.label) if isinstance(path, Path) and not exists(path)]


def exists(path: Path) -> bool:
    """Whether there is something at a path; nothing is where a name is longer than names may be."""
    try:
        return path.exists()
    except OSError:
        return False


@dataclass(frozen=True)
class DatasetJson:
    """What a `dataset.json` says."""

    layout: str
    """Which kind it is, in words."""
    labels: dict[str, Any] | None
    """As `Labels.from_mapping` takes it: class name → value, list of values or "rest"."""
    channels: tuple[str, ...] | None
    """Names of the channels in their order."""
    file_ending: str | None
    """nnU-Net v2: how names of images and labels end."""
    listed: tuple[str, ...]
    """Ids of the training cases that it lists."""
    cases: tuple[Case, ...] | None
    """nnU-Net v2's `dataset` table: cases whose files lie elsewhere."""


@_understood
def read_dataset_json(path: Path) -> DatasetJson:
    """Read a `dataset.json` (MSD, nnU-Net v1 and v2).

    Raises:
        MedsegError: E_CONFIG if it is not understood, E_LABEL if a class name stands twice.
    """
    table = read_json(path)
    if not isinstance(table, Mapping):
        raise MedsegError(
            Code.CONFIG,
            "a dataset.json is an object",
            where=path.name,
            expected='{"labels": {…}, …}',
            got=type(table).__name__,
            remedy="get the data set again, or write a manifest.csv (case,image,label)",
        )
    channels = table.get("channel_names", table.get("modality"))
    if isinstance(channels, Mapping):
        channels = [channels[key] for key in sorted(channels, key=int)]
    listed = [row.get("image", "") if isinstance(row, Mapping) else str(row) for row in table.get("training", ())]
    cases = None
    if isinstance(table.get("dataset"), Mapping):
        cases = tuple(
            _case({"case": name, **row}, f"{path.name}, case {name}", path.parent)
            for name, row in table["dataset"].items()
        )
    return DatasetJson(
        layout="nnU-Net v2 (dataset.json)" if "channel_names" in table else "MSD / nnU-Net v1 (dataset.json)",
        labels=_with_order(table, _names_to_values(table["labels"], path)) if table.get("labels") else None,
        channels=tuple(str(c) for c in channels) if channels else None,
        file_ending=None if table.get("file_ending") is None else str(table["file_ending"]),
        listed=tuple(strip_suffix(Path(str(name)).name) for name in listed),
        cases=cases,
    )


def _names_to_values(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Labels as name → value, whichever way round they stand (MSD: "1": "tumour"; nnU-Net v2: "tumour": 1)."""
    if not all(str(key).lstrip("-").isdigit() for key in table):
        return dict(table)
    names = [str(name) for name in table.values()]
    if len(set(names)) != len(names):
        raise MedsegError(
            Code.LABEL,
            "a class name stands twice",
            where=path.name,
            expected="a name for each value",
            got=", ".join(names),
            remedy="rename one of them, or state data.labels",
        )
    return {str(name): int(value) for value, name in table.items()}


def _with_order(table: Mapping[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    """The labels with the order of their regions; like nnU-Net, only where one of them has several values."""
    has_regions = any(isinstance(v, list) and len(v) > 1 for name, v in labels.items() if name != IGNORE)
    order = table.get(ORDER_KEY)
    return {**labels, ORDER_KEY: order} if has_regions and order else labels
