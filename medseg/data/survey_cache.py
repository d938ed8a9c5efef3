"""What the survey read of a case, kept in the store: a second look at unchanged files decodes nothing."""

from __future__ import annotations

import base64
import dataclasses
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from medseg.data.layouts import Case
from medseg.data.store import Store, basis_of
from medseg.errors import MedsegError
from medseg.formats import Reading
from medseg.registry import make_config, type_hints

T = TypeVar("T")


def survey_basis(cls: type, settings: Mapping[str, Any], reading: Reading) -> str:
    """What is remembered under, beside the files of a case.

    Args:
        cls: the dataclass that is remembered: another form is another key.
        settings: what it follows from beside the files and how they are read.
        reading: how the files are read.
    """
    return basis_of("survey", {"fields": _fields(cls), **settings}, reading)


def remembered(cls: type[T], read: Callable[[], T], store: Store, case: Case, basis: str) -> T:
    """What `read` gives, from the store if it is there, else kept there.

    Args:
        cls: the dataclass that `read` returns. Its fields are dataclasses, float32 arrays, mappings of whole numbers,
            or tuples of plain values.
        read: reads the case.
        basis: by `survey_basis`.
    Raises:
        MedsegError: as `read`. That nothing can be kept is no error here: preparing the case will say so.
    """
    if store.folder is None:
        return read()
    try:
        key = store.key(case, basis)
    except OSError:  # the reader of the file has better words for it
        return read()
    entry = store.read(key, case.case_id)
    if entry is not None:
        return unpacked(cls, entry.values)
    found = read()
    if store.is_unchanged(case):
        with suppress(MedsegError):
            store.write(key, packed(found), {})
    return found


def packed(record: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it; arrays of float32 as base64, bit for bit."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            data = np.ascontiguousarray(value, dtype=np.float32)
            values[field.name] = {"shape": data.shape, "base64": base64.b64encode(data.tobytes()).decode("ascii")}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            values[field.name] = dataclasses.asdict(value)
        elif isinstance(value, Mapping):
            values[field.name] = [[int(k), int(v)] for k, v in value.items()]
        else:
            values[field.name] = value
    return values


def unpacked(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass that `packed` was given."""
    hints = type_hints(cls)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(value, dict) and "base64" in value:
            array = np.frombuffer(base64.b64decode(value["base64"]), dtype=np.float32)
            fields[name] = array.reshape(value["shape"]).copy()
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            fields[name] = make_config(hint, value, where=name)
        elif isinstance(value, list) and typing.get_origin(hint) is not tuple:
            fields[name] = dict(value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


def _fields(cls: type) -> list[str]:
    """Names and types, so that another form is another key."""
    return [f"{name}: {hint}" for name, hint in sorted(type_hints(cls).items())]
