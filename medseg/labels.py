"""Which classes a model knows, and the values that stand for them in files.

Inside medseg a label map holds class indices 0, 1, 2, … with 0 the background. Files hold whatever their makers
chose (0 and 255, 1/2/4, …). `Labels` is the table between the two, so that a prediction is written with the values
of the reference it will be compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError

TABLE_FILE = "predictions.json"
"""Beside label files: {"labels": {name: value}}, which value means which class."""
REST = "rest"
"""In a label table: every value of the file that no other class claims (all nuclei of an instance map, say)."""
INTEGER_TOLERANCE = 1e-3
"""Label values within this of an integer are rounded (float32 files); others are refused."""


@dataclass(frozen=True)
class Labels:
    """The classes of a task in the order of their indices.

    Args:
        names: class names; the first is the background.
        values: for each class the file values that mean it; the first of them is written. () means `REST`:
            all values that no other class claims (written as the smallest positive value that none claims).
    Raises:
        MedsegError: E_LABEL if names or values repeat, or there is no foreground class.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        flat = [v for values in self.values for v in values]
        if len(set(self.names)) != len(self.names) or len(set(flat)) != len(flat):
            raise MedsegError(Code.LABEL, "a label name or value stands twice", got=self.to_json())
        if len(self.names) < 2 or len(self.names) != len(self.values):
            raise MedsegError(
                Code.LABEL,
                "a segmentation needs a background and at least one other class",
                where="data.labels",
                got=self.to_json(),
                remedy="check that the label files are not all zero, or declare the classes with data.labels",
            )
        if sum(not values for values in self.values) > 1:
            raise MedsegError(Code.LABEL, f"only one class can take the {REST!r}", got=self.to_json())

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> Labels:
        """From `{name: value}` as users write it; a value is an int, a list of ints, or "rest".

        A class named "background" comes first (it is added with value 0 if 0 is free); otherwise the class with
        value 0 is the background.
        """
        parsed: dict[str, tuple[int, ...]] = {}
        for name, value in table.items():
            if value == REST:
                parsed[str(name)] = ()
            else:
                values = value if isinstance(value, (list, tuple)) else [value]
                if not values or not all(isinstance(v, (int, np.integer)) for v in values):
                    raise MedsegError(
                        Code.LABEL,
                        "label values must be integers",
                        where=f"data.labels.{name}",
                        got=value,
                        remedy="names of structures mean something where the data are a tree of DICOM series with SEG "
                        "or RTSTRUCT files, and no label files"
                        if any(isinstance(v, str) for v in values)
                        else None,
                    )
                parsed[str(name)] = tuple(int(v) for v in values)
        first = next((n for n in parsed if n.lower() == "background"), None)
        if first is None:
            first = next((n for n, values in parsed.items() if 0 in values), None)
        if first is None:
            parsed = {"background": (0,), **parsed}
            first = "background"
        order = [first, *[n for n in parsed if n != first]]
        return cls(tuple(order), tuple(parsed[n] for n in order))

    @classmethod
    def from_text(cls, text: str) -> Labels:
        """From `{name: value, ...}` on a command line, in YAML.

        Raises:
            MedsegError: E_LABEL if it is no such table.
        """
        try:
            table = yaml.safe_load(text)
        except yaml.YAMLError:
            table = None
        if not isinstance(table, dict):
            raise MedsegError(Code.LABEL, "the label table cannot be read", expected="{liver: 1, spleen: 2}", got=text)
        return cls.from_mapping(table)

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names without the background."""
        return self.names[1:]

    def written_values(self) -> tuple[int, ...]:
        """The value that stands for each class in files that we write."""
        claimed = {v for values in self.values for v in values}
        free = next(v for v in itertools.count(1) if v not in claimed)
        return tuple(values[0] if values else free for values in self.values)

    def to_index(self, array: NDArray[Any], *, where: object = None) -> NDArray[np.uint8]:
        """File values → class indices.

        Raises:
            MedsegError: E_LABEL for values that are not integers or that no class claims, with the ids.
        """
        array = integer_values(array, where=where)
        found = np.unique(array)
        lookup = {v: index for index, values in enumerate(self.values) for v in values}
        rest = next((index for index, values in enumerate(self.values) if not values), None)
        unknown = [int(v) for v in found if int(v) not in lookup]
        if unknown and rest is None:
            raise MedsegError(
                Code.LABEL,
                "the label file holds ids that no class claims",
                where=where,
                expected=self.to_json(),
                got=f"ids {unknown[:10]}",
                remedy="add the ids to data.labels, or correct the file",
            )
        codes = np.array([lookup.get(int(v), rest if rest is not None else 0) for v in found], dtype=np.uint8)
        return codes[np.searchsorted(found, array)]

    def to_values(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Class indices → file values, in the smallest integer type that holds them."""
        values = np.array(self.written_values(), dtype=np.int64)
        written: NDArray[np.integer[Any]] = values.astype(smallest_integer_type(values))[indices]
        return written

    def to_json(self) -> dict[str, Any]:
        """`{name: value | [values] | "rest"}`, the form of `from_mapping`."""
        return {
            name: REST if not values else values[0] if len(values) == 1 else list(values)
            for name, values in zip(self.names, self.values, strict=True)
        }


def integer_values(array: NDArray[Any], *, where: object = None) -> NDArray[np.integer[Any]]:
    """A label array as integers.

    Raises:
        MedsegError: E_LABEL if a value is further than `INTEGER_TOLERANCE` from an integer, or not finite.
    """
    if np.issubdtype(array.dtype, np.integer):
        integers: NDArray[np.integer[Any]] = array
        return integers
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    rounded = np.rint(array)
    wrong = ~(np.abs(array - rounded) <= INTEGER_TOLERANCE)
    if wrong.any():
        raise MedsegError(
            Code.LABEL,
            "label values are not integers",
            where=where,
            expected="whole numbers, one per class",
            got=f"{int(wrong.sum())} voxels such as {float(array[wrong][0]):.6g}",
            remedy="is this an image or a probability map? resample labels with nearest neighbour",
        )
    whole: NDArray[np.integer[Any]] = rounded.astype(np.int64)
    return whole


def smallest_integer_type(values: NDArray[np.integer[Any]]) -> np.dtype[Any]:
    """The smallest of uint8, int8, uint16, int16, … that holds all values."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32"):
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max:
            return np.dtype(name)
    return np.dtype("int64")
