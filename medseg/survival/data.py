"""Tables of features and outcomes as arrays: who, how long, whether the event came, and what was measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError, nearest
from medseg.measurement.columns import ABOUT

KEYS = ("case", "patient")
"""Columns by which tables are joined, the first that all of them have."""
LABEL = "label"
TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
"""How tables write whether the event came (any case)."""
Records = list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Those whose time and features are known.

    Args:
        ids: what the tables call each row.
        patients: whose each row is: cross-validation and intervals keep a patient's rows together.
        time: until the event or the end of observation, shape (n,), not negative.
        event: whether the event came, shape (n,).
        features: names of the columns.
        values: shape (n, features), finite.
        notes: what was left out, one sentence each.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    time: NDArray[np.float64]
    event: NDArray[np.bool_]
    features: tuple[str, ...]
    values: NDArray[np.float64]
    notes: tuple[str, ...] = ()


def read_cohort(
    tables: Sequence[Path],
    *,
    time: str,
    event: str,
    features: Sequence[str] = (),
    label: str | None = None,
    key: str | None = None,
) -> Cohort:
    """Read one table, or several joined by case or patient.

    Args:
        tables: CSV with headings; with several, each row of the first is completed by the others': a filled cell of an
            earlier table stands, an empty one is filled from a later table.
        time: column of the time.
        event: column that says whether the event came: 1 or 0, true or false, yes or no.
        features: columns, or patterns ("glcm_*"), of any table; () is every column of numbers of the first table that
            does not describe the row: what stands beside an outcome (another time, a follow-up) is not known before it.
        label: the structure whose rows count, where the tables have several of a case.
        key: the column that joins the tables; None is the first of `KEYS` that all have.
    Returns:
        Rows without a partner in another table, without a time, an event or one of the features are left out, and
        columns that do not vary; notes say so, and which columns of numbers were not taken.
    Raises:
        MedsegError: E_MISSING for a table or a column that is not there, E_DUPLICATE_ID for two rows of one case,
            E_CONFIG for what is no time, no event or no number, E_NO_CASES where nothing is left.
    """
    names = _names(tables)
    read = [(name, _read(path)) for name, path in zip(names, tables, strict=True)]
    records, key, notes = _joined(read, label, key)
    for column in (time, event):
        if not any(column in record for record in records):
            raise MedsegError(
                Code.MISSING, f"there is no column {column!r}", where=tables[0].name,
                remedy=nearest(column, records[0]),
            )  # fmt: skip
    known = {time, event, LABEL, key or "", *ABOUT}
    if features:
        chosen = _matching(records, features, names[0])
    else:
        of_first = {column for record in read[0][1] for column in record}
        numbers = _numeric(records, known)
        chosen = [c for c in numbers if c in of_first]
        others = [c for c in numbers if c not in of_first]
        if others:
            notes.append(
                f"{len(others)} columns of numbers that are not of {names[0]} are not taken as features: "
                f"{_some(others)}; --features takes the columns that it names"
            )
    return _cohort(records, time, event, chosen, key, notes, by_name=bool(features))


def _names(tables: Sequence[Path]) -> list[str]:
    """What messages call tables: with the folder where files are of one name."""
    names = [path.name for path in tables]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, tables, strict=True)
    ]


def _read(path: Path) -> Records:
    if not path.is_file():
        raise MedsegError(Code.MISSING, "there is no such table", where=path.name)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records: Records = [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MedsegError(
            Code.CONFIG, "the table cannot be read", where=path.name, expected="CSV in UTF-8", got=error
        ) from error
    if not records:
        raise MedsegError(Code.NO_CASES, "the table has no rows", where=path.name)
    return records


def _joined(
    tables: list[tuple[str, Records]], label: str | None, key: str | None
) -> tuple[Records, str | None, list[str]]:
    """The rows of the first table with what the others say of the same case or patient; the key; what was left out."""
    kept = []
    for name, records in tables:
        if label is not None and LABEL in records[0]:
            found = sorted({r[LABEL] for r in records})
            records = [r for r in records if r[LABEL] == label]
            if not records:
                raise MedsegError(
                    Code.NAME, f"no row is of {label!r}", where=name, remedy=nearest(label, found)
                )  # fmt: skip
        kept.append((name, records))
    first_name, first = kept[0]
    key = key or next((k for k in KEYS if all(k in records[0] for _, records in kept)), None)
    if len(kept) > 1 and key is None:
        raise MedsegError(
            Code.CONFIG, "nothing tells which rows of the tables belong together", where=first_name,
            expected=" or ".join(KEYS), got=", ".join(list(first[0])[:8]),
            remedy="add a column case or patient to each, or name one that both have: --by COLUMN",
        )  # fmt: skip
    for number, (name, records) in enumerate(kept):
        if len(kept) > 1 and key is not None and key not in records[0]:
            raise MedsegError(
                Code.MISSING, f"there is no column {key!r} to join the tables by", where=name,
                remedy=nearest(key, records[0]),
            )  # fmt: skip
        # A patient may have several rows in the first table, which the others complete
        if key is not None and key in records[0] and (key == KEYS[0] or number > 0):
            _refuse_twice(name, records, key)
    if key is None or len(kept) == 1:
        return first, key, []
    rows, notes = first, []
    for name, records in kept[1:]:
        others = {r[key]: r for r in records if not _is_blank(r[key])}
        ours = {r[key] for r in rows}
        joined = [_completed(r, others[r[key]]) for r in rows if r[key] in others]
        alone = sum(r[key] not in ours or _is_blank(r[key]) for r in records)
        if not joined:
            raise MedsegError(
                Code.NO_CASES, f"no {key} stands in both tables", where=f"{first_name} and {name}",
                expected=f"as {first[0][key]!r}", got=f"as {records[0][key]!r}",
            )  # fmt: skip
        if len(joined) < len(rows):
            notes.append(
                f"{len(rows) - len(joined)} of {len(rows)} rows of {first_name} have no {key} in {name} and are left "
                "out"
            )
        if alone:
            notes.append(f"{alone} of {len(records)} rows of {name} have no {key} in {first_name} and are left out")
        rows = joined
    return rows, key, notes


def _completed(record: dict[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """A row with another table's cells where its own are blank or not there."""
    return {**record, **{column: text for column, text in other.items() if _is_blank(record.get(column, ""))}}


def _is_blank(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "na")


def _refuse_twice(name: str, records: Records, key: str) -> None:
    seen: set[str] = set()
    for record in records:
        if _is_blank(record[key]):
            continue
        if record[key] in seen:
            labels = sorted({r.get(LABEL, "") for r in records})
            raise MedsegError(
                Code.DUPLICATE_ID,
                f"several rows are of one {key}",
                where=f"{name}: {record[key]}",
                remedy=f"choose a structure: --label {labels[0]} (or {', '.join(labels[1:5])})"
                if len(labels) > 1
                else "keep one row of each",
            )
        seen.add(record[key])


def _numeric(records: Records, known: set[str]) -> list[str]:
    """The columns that can be features: what describes a row is none, and neither is a column of words."""
    return [c for c in _columns(records) if c not in known and any(_number(r.get(c)) is not None for r in records)
            and not any(r.get(c) and _number(r[c]) is None for r in records)]  # fmt: skip


def _columns(records: Records) -> list[str]:
    return list(dict.fromkeys(column for record in records for column in record))


def _matching(records: Records, patterns: Sequence[str], where: str) -> list[str]:
    """The columns that names and patterns mean."""
    columns = _columns(records)
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [c for c in columns if fnmatchcase(c, pattern)]
        if not matching:
            raise MedsegError(
                Code.MISSING, f"no column is called {pattern!r}", where=where, remedy=nearest(pattern, columns)
            )
        found |= dict.fromkeys(matching)
    return list(found)


def _cohort(
    records: Records, time: str, event: str, features: list[str], key: str | None, notes: list[str], *, by_name: bool
) -> Cohort:
    notes = [*notes]
    names = [_name(record, number, key) for number, record in enumerate(records, start=1)]
    empty = [f for f in features if not any(_number(r.get(f)) is not None for r in records)]
    if empty and not by_name:
        features = [f for f in features if f not in empty]
        notes.append(f"{len(empty)} features are empty in every row and left out: {_some(empty)}")
    kept, rows, times, events = [], [], [], []
    missing = 0
    for name, record in zip(names, records, strict=True):
        numbers = [_required(record, feature, name) for feature in features]
        lasted, came = _time(record.get(time, ""), time, name), _event(record.get(event, ""), event, name)
        if lasted is None or came is None or any(number is None for number in numbers):
            missing += 1
            continue
        kept.append((name, record))
        rows.append(numbers)
        times.append(lasted)
        events.append(came)
    if missing:
        notes.append(f"{missing} of {len(records)} rows lack a time, an event or a feature and are left out")
    if not kept or not features:
        raise MedsegError(
            Code.NO_CASES, "no row has a time, an event and features", where=", ".join([time, event, *features[:4]]),
            got="; ".join(notes) or None, remedy="name columns that are filled: --features NAME",
        )  # fmt: skip
    values = np.asarray(rows, dtype=np.float64)
    varies = np.ptp(values, axis=0) > 0
    if not varies.all():
        constant = [f for f, v in zip(features, varies, strict=True) if not v]
        notes.append(f"{len(constant)} features are the same in every row and left out: {_some(constant)}")
    if not varies.any():
        raise MedsegError(Code.NO_CASES, "no feature varies", where=_some(features))
    return Cohort(
        tuple(name for name, _ in kept),
        tuple(record.get("patient") or name for name, record in kept),
        np.asarray(times),
        np.asarray(events, dtype=bool),
        tuple(f for f, v in zip(features, varies, strict=True) if v),
        values[:, varies],
        tuple(notes),
    )


def _name(record: Mapping[str, str], number: int, key: str | None) -> str:
    return (record.get(key) if key is not None else None) or f"row {number}"


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _required(record: Mapping[str, str], feature: str, name: str) -> float | None:
    """A feature's value; None for an empty cell."""
    text = record.get(feature, "").strip()
    if _is_blank(text):
        return None
    number = _number(text)
    if number is None:
        raise MedsegError(
            Code.CONFIG, "a feature is no finite number", where=f"{name}, column {feature}", got=text,
            remedy="write categories as numbers, 0 and 1 for each",
        )  # fmt: skip
    return number


def _time(text: str, column: str, name: str) -> float | None:
    if not text.strip():
        return None
    number = _number(text)
    if number is None or number < 0:
        raise MedsegError(
            Code.CONFIG, "a time is a number from 0 on", where=f"{name}, column {column}", got=text,
            remedy="give days or months since the beginning of observation",
        )  # fmt: skip
    return number


def _event(text: str, column: str, name: str) -> bool | None:
    folded = text.strip().lower()
    if not folded:
        return None
    if folded not in (*TRUE, *FALSE):
        raise MedsegError(
            Code.CONFIG, "whether the event came is 1 or 0", where=f"{name}, column {column}",
            expected="1 (event) or 0 (censored)", got=text,
        )  # fmt: skip
    return folded in TRUE


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
