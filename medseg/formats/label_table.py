"""The table beside label files: which value means which class, and what is to be known of each file.

`predictions.json` speaks for all label files of its folder, `NAME.json` for `NAME.nii.gz` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from medseg.documents import parse_json, parse_yaml
from medseg.errors import Code, MedsegError
from medseg.formats import strip_suffix
from medseg.formats.atomic import whole_file
from medseg.labels import TABLE_FILE, Labels

LABELS_KEY = "labels"
CASES_KEY = "cases"


@dataclass(frozen=True)
class CaseRecord:
    """What a table says of one case."""

    files: tuple[str, ...]
    """Names of the files that were written, relative to the table."""
    notes: tuple[str, ...] = ()
    """`Volume.notes`: lossy sources, what was resampled, overlaps."""


def write_table(path: Path, labels: Mapping[str, Any] | None, cases: Mapping[str, CaseRecord] | None = None) -> None:
    """Write a table, whole or not at all.

    Args:
        path: TABLE_FILE of a folder, or `beside` a file.
        labels: {name: value}, as `Labels.to_json` gives it; None where no label was written.
        cases: id → record.
    Raises:
        MedsegError: E_OUTPUT.
    """
    content: dict[str, Any] = {} if labels is None else {LABELS_KEY: dict(labels)}
    if cases:
        content[CASES_KEY] = {case: asdict(record) for case, record in sorted(cases.items())}
    with whole_file(path, ".json") as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def beside(label: Path) -> Path:
    """The table that speaks for one file alone."""
    return label.with_name(strip_suffix(label.name) + ".json")


def read_labels(table: Path) -> Labels | None:
    """The classes of a table; None where there is no such file, or it holds no classes.

    Raises:
        MedsegError: E_LABEL if the file cannot be understood.
    """
    labels = _read(table).get(LABELS_KEY)
    return Labels.from_mapping(labels) if isinstance(labels, dict) else None


def read_cases(table: Path) -> dict[str, CaseRecord]:
    """The records of a table; empty where there is no such file, or it holds none.

    Raises:
        MedsegError: E_LABEL if the file cannot be understood.
    """
    cases = _read(table).get(CASES_KEY)
    try:
        return {
            str(case): CaseRecord(tuple(map(str, record["files"])), tuple(map(str, record.get("notes", ()))))
            for case, record in (cases or {}).items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise _unreadable(table, error) from error


def labels_for(label: Path) -> Labels | None:
    """The classes of a label file: its own table, else its folder's; None if it has neither.

    Raises:
        MedsegError: E_LABEL if a table cannot be understood.
    """
    own = read_labels(beside(label))
    return own if own is not None else read_labels(label.with_name(TABLE_FILE))


def table_of(text: str) -> dict[str, Any]:
    """A table of classes as a command line holds it, in YAML: {name: value}, {name: structure} or lists of these.

    Raises:
        MedsegError: E_LABEL if it is no table.
    """
    try:
        table = parse_yaml(text)
    except yaml.YAMLError:
        table = None
    if not isinstance(table, dict):
        raise MedsegError(
            Code.LABEL,
            "the table of labels cannot be read",
            where="--labels",
            expected='"{liver: 1, spleen: 2}"',
            got=text,
            remedy="put the whole table into quotes, with a blank behind each colon",
        )
    return {str(name): value for name, value in table.items()}


def written_names(labels: Labels) -> dict[int, str]:
    """Value in label files → name of the class, without the background, for the header of NIfTI files."""
    return dict(zip(labels.written_values()[1:], labels.names[1:], strict=True))


def _read(table: Path) -> dict[str, Any]:
    if not table.is_file():
        return {}
    try:
        content = parse_json(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(table, error) from error
    if not isinstance(content, dict):
        raise _unreadable(table, TypeError("no table"))
    return content


def _unreadable(table: Path, error: Exception) -> MedsegError:
    return MedsegError(
        Code.LABEL,
        "the table of labels cannot be read",
        where=table.name,
        expected='{"labels": {"liver": 1}}',
        got=f"{type(error).__name__}: {error}",
        remedy="correct it, or remove it",
    )
