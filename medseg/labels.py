"""Which classes a model knows, and the values that stand for them in files.

Inside medseg a label map holds class indices 0, 1, 2, … with 0 the background, and `IGNORE_INDEX` where nobody knows.
Files hold whatever their makers chose (0 and 255, 1/2/4, …). `Labels` is the table between the two, so that a
prediction is written with the values of the reference it will be compared with.

**Regions** are unions of classes, and they overlap: the whole tumour holds its core. Label maps cannot hold what
overlaps, so they keep the classes beneath, of which each lies in other regions than the rest; the network has one
output for each region, and what is trained, scored and reported are the regions.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.label_values import integer_values, smallest_integer_type

if TYPE_CHECKING:
    import torch

TABLE_FILE = "predictions.json"
"""Beside label files: {"labels": {name: value}}, which value means which class."""
REST = "rest"
"""In a label table: every value of the file that no other class claims (all nuclei of an instance map, say)."""
IGNORE = "ignore"
"""In a label table: the values of voxels that neither training nor scores count (nnU-Net's name for it)."""
IGNORE_INDEX = 255
"""Stands for such voxels in maps of class indices."""
ORDER_KEY = "regions_class_order"
"""In a label table with regions: for each of them, in their order, the value that decoding paints (as nnU-Net)."""
MAX_CLASSES = IGNORE_INDEX
"""With the background: label maps are uint8, and one number of it is taken."""


@dataclass(frozen=True)
class Labels:
    """The classes of a task in the order of their indices.

    Args:
        names: class names; the first is the background.
        values: for each class the file values that mean it; the first of them is written. () means `REST`:
            all values that no other class claims (written as the smallest positive value that none claims).
        regions: for each region the classes that make it up; () where every voxel has one class. Decoding paints
            the regions in this order, each with the first of its classes.
        region_names: of the regions.
        ignore: file values of voxels that do not count.
    Raises:
        MedsegError: E_LABEL if names or values repeat, or there is no foreground class, or too many.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: tuple[tuple[int, ...], ...] = ()
    region_names: tuple[str, ...] = ()
    ignore: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        flat = [v for values in self.values for v in values]
        if len(set(self.names)) != len(self.names) or len(set(flat)) != len(flat):
            raise MedsegError(Code.LABEL, "a label name or value stands twice", got=self.to_json())
        both = sorted({*self.ignore} & {*flat})
        if both:
            raise MedsegError(
                Code.LABEL,
                "a value cannot both mean a class and be ignored",
                where=f"data.labels.{IGNORE}",
                got=f"{both} of {self.to_json()}",
            )
        if len(self.names) < 2 or len(self.names) != len(self.values):
            raise MedsegError(
                Code.LABEL,
                "a segmentation needs a background and at least one other class",
                where="data.labels",
                got=self.to_json(),
                remedy="check that the label files are not all zero, or declare the classes with data.labels",
            )
        if len(self.names) > MAX_CLASSES:
            raise MedsegError(
                Code.LABEL,
                "too many classes",
                where="data.labels",
                expected=f"at most {MAX_CLASSES}, with the background",
                got=len(self.names),
            )
        if sum(not values for values in self.values) > 1:
            raise MedsegError(Code.LABEL, f"only one class can take the {REST!r}", got=self.to_json())

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any], *, regions_order: Sequence[str | int] | None = None) -> Labels:
        """From `{name: value}` as users write it; a value is an int, a list of ints, or "rest".

        A class named "background" comes first (it is added with value 0 if 0 is free); otherwise the class with
        value 0 is the background. `IGNORE` names the values of voxels that do not count.

        Names are regions where a value stands under several of them, or where an order says so.
        Args:
            table: the names and their values; it may hold `ORDER_KEY`.
            regions_order: in which order decoding paints the regions: their names, or for each of them, as they stand
                in the table, the value that is painted (nnU-Net's regions_class_order). None takes the one of the
                table, else the larger ones come first.
        Raises:
            MedsegError: E_LABEL, and what the class refuses.
        """
        order = table.get(ORDER_KEY) if regions_order is None else regions_order
        parsed = {str(name): _parsed(str(name), value) for name, value in table.items() if name != ORDER_KEY}
        ignore = parsed.pop(IGNORE, None)
        if ignore == ():
            raise MedsegError(Code.LABEL, "what is ignored needs a value", where=f"data.labels.{IGNORE}", got=REST)
        first = next((n for n in parsed if n.lower() == "background"), None)
        if first is None:
            first = next((n for n, values in parsed.items() if 0 in values), None)
        if first is None:
            parsed = {"background": (0,), **parsed}
            first = "background"
        background = parsed.pop(first)
        claims = [v for values in parsed.values() for v in {*values}]
        if order is None and len({*claims}) == len(claims):
            return cls((first, *parsed), (background, *parsed.values()), ignore=ignore or ())
        return _with_regions((first, background), parsed, ignore or (), order)

    @property
    def num_classes(self) -> int:
        """Number of classes of label maps, with the background."""
        return len(self.names)

    @property
    def num_outputs(self) -> int:
        """Channels of a network's logits: one for each class, or for each region where there are regions."""
        return len(self.regions) or len(self.names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of what is scored and reported: the regions, or the classes without the background."""
        return self.region_names or self.names[1:]

    @property
    def declared(self) -> tuple[str, ...]:
        """The background and `foreground`."""
        return (self.names[0], *self.foreground)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """For each name of `foreground` the classes that make it up."""
        return self.regions or tuple((index,) for index in range(1, self.num_classes))

    def membership(self) -> NDArray[np.bool_]:
        """Which regions a class lies in: bool (256, number of regions), by class index; none at `IGNORE_INDEX`."""
        table = np.zeros((IGNORE_INDEX + 1, len(self.regions)), dtype=bool)
        for region, classes in enumerate(self.regions):
            table[list(classes), region] = True
        return table

    def decode(self, scores: torch.Tensor, *, threshold: float = 0.0) -> torch.Tensor:
        """The class indices that a network's outputs stand for.

        Without regions the class with the highest score. Regions whose score is above the threshold are painted one
        over the other in their order, as nnU-Net does. Where exactly the regions of a class are above it, and painting
        would leave another one (regions that overlap and of which none holds the other), it is that class.

        Args:
            scores: logits (num_outputs, *S); or probabilities, with the threshold 0.5.
            threshold: of regions.
        Returns:
            uint8 (*S).
        """
        if not self.regions:
            return scores.argmax(0).byte()
        above = scores > threshold
        indices = above[0].byte().zero_()
        for region, classes in enumerate(self.regions):
            indices.masked_fill_(above[region], classes[0])
        for index, inside in self._not_painted:
            match = above[0] == inside[0]
            for region, is_in in enumerate(inside[1:], start=1):
                match &= above[region] == is_in
            indices.masked_fill_(match, index)
        return indices

    @cached_property
    def _not_painted(self) -> list[tuple[int, list[bool]]]:
        """Classes that painting their own regions does not give, with their membership."""
        memberships = [(index, row.tolist()) for index, row in enumerate(self.membership()[: self.num_classes])]
        return [
            (index, inside)
            for index, inside in memberships[1:]
            if [classes[0] for classes, is_in in zip(self.regions, inside, strict=True) if is_in][-1] != index
        ]

    def written_values(self) -> tuple[int, ...]:
        """The value that stands for each class in files that we write."""
        claimed = {*self.ignore, *(v for values in self.values for v in values)}
        free = next(v for v in itertools.count(1) if v not in claimed)
        return tuple(values[0] if values else free for values in self.values)

    def to_index(self, array: NDArray[Any], *, where: object = None) -> NDArray[np.uint8]:
        """File values → class indices; those that are ignored → `IGNORE_INDEX`.

        Raises:
            MedsegError: E_LABEL for values that are not integers or that no class claims, with the ids.
        """
        array = integer_values(array, where=where)
        found = _values_in(array)
        lookup = {v: index for index, values in enumerate(self.values) for v in values}
        lookup |= dict.fromkeys(self.ignore, IGNORE_INDEX)
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
        if array.dtype == np.uint8:
            table = np.zeros(256, dtype=np.uint8)
            table[found] = codes
            indices: NDArray[np.uint8] = table[array]
            return indices
        return codes[np.searchsorted(found, array)]

    def to_values(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Class indices → file values, in the smallest integer type that holds them. The first of the values that are
        ignored stands for `IGNORE_INDEX`."""
        values = np.array(self.written_values(), dtype=np.int64)
        if self.ignore and (indices == IGNORE_INDEX).any():
            values = np.append(values, np.zeros(IGNORE_INDEX + 1 - len(values), dtype=np.int64))
            values[IGNORE_INDEX] = self.ignore[0]
        written: NDArray[np.integer[Any]] = values.astype(smallest_integer_type(values))[indices]
        return written

    def to_json(self) -> dict[str, Any]:
        """`{name: value | [values] | "rest"}`, the form of `from_mapping`."""
        table = dict(zip(self.names, self.values, strict=False))
        if self.regions:
            table = {self.names[0]: self.values[0]}
            for name, classes in zip(self.region_names, self.regions, strict=True):
                table[name] = tuple(sorted(v for index in classes for v in self.values[index]))
        if self.ignore:
            table[IGNORE] = self.ignore
        plain: dict[str, Any] = {
            name: REST if not values else values[0] if len(values) == 1 else list(values)
            for name, values in table.items()
        }
        if self.regions:
            plain[ORDER_KEY] = [self.values[classes[0]][0] for classes in self.regions]
        return plain


def _values_in(array: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The values that occur, in ascending order; of 8 bits without sorting them."""
    if array.dtype == np.uint8 and array.size < 1 << 24:  # counting takes a copy in 64 bits
        return np.flatnonzero(np.bincount(array.ravel(order="K"), minlength=256))
    return np.unique(array)


def _parsed(name: str, value: Any) -> tuple[int, ...]:
    """The values of a name; () for `REST`."""
    if value == REST:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    whole = [v for v in values if isinstance(v, int | np.integer) and not isinstance(v, bool) and abs(int(v)) < 2**63]
    if not values or len(whole) < len(values):
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
    return tuple(int(v) for v in values)


def _with_regions(
    background: tuple[str, tuple[int, ...]],
    table: Mapping[str, tuple[int, ...]],
    ignore: tuple[int, ...],
    order: Any,
) -> Labels:
    """Labels with regions; the arguments are those of `from_mapping`, taken apart."""
    regions = {name: frozenset(values) for name, values in table.items()}
    if not background[1] or not all(regions.values()):
        raise MedsegError(Code.LABEL, f"{REST!r} cannot stand beside regions", where="data.labels", got=dict(table))
    for name, values in regions.items():
        twin = next((other for other in regions if other != name and regions[other] == values), None)
        if twin is not None or values & {*background[1]}:
            raise MedsegError(
                Code.LABEL,
                f"no value of the files tells {name!r} and {twin!r} apart"
                if twin is not None
                else f"the region {name!r} holds the background",
                where="data.labels",
                got={n: sorted(v) for n, v in regions.items()},
                remedy="give each region a value of its own, or leave one out"
                if twin is not None
                else "the background is what lies in no region",
            )
    inside = {
        v: frozenset(n for n, values in regions.items() if v in values) for v in frozenset().union(*regions.values())
    }
    painted = _painted(regions, inside, order)
    groups: dict[frozenset[str], list[int]] = {}
    for value in [*painted.values(), *sorted(inside)]:
        group = groups.setdefault(inside[value], [])
        if value not in group:
            group.append(value)
    classes = list(groups)
    return Labels(
        (background[0], *(_class_name(of, regions) for of in classes)),
        (background[1], *((first, *sorted(rest)) for first, *rest in groups.values())),
        tuple(
            tuple(dict.fromkeys(classes.index(of) + 1 for of in (inside[value], *classes) if name in of))
            for name, value in painted.items()
        ),
        tuple(painted),
        ignore,
    )


def _painted(regions: Mapping[str, frozenset[int]], inside: Mapping[int, frozenset[str]], order: Any) -> dict[str, int]:
    """The regions in the order in which they are painted, each with the value that it leaves."""
    own = {name: min(values, key=lambda v: (len(inside[v]), v)) for name, values in regions.items()}
    if order is None:
        return {name: own[name] for name in sorted(regions, key=lambda n: -len(regions[n]))}
    given = list(order) if isinstance(order, (list, tuple)) else [order]
    if len(given) == len(regions):
        if sorted(map(str, given)) == sorted(regions):
            return {str(name): own[str(name)] for name in given}
        if all(isinstance(v, Hashable) and v in values for v, values in zip(given, regions.values(), strict=True)):
            return {name: int(v) for name, v in zip(regions, given, strict=True)}
    unnamed = [name for name in regions if name not in given]
    raise MedsegError(
        Code.LABEL,
        "the order of the regions must name each of them once",
        where="data.regions_order",
        expected=f"{list(own)}, the larger ones first; or one of its own values for each",
        got=given,
        remedy=f"add {', '.join(unnamed)}" if unnamed and {*map(str, given)} < {*regions} else None,
    )


def _class_name(of: frozenset[str], regions: Mapping[str, frozenset[int]]) -> str:
    """What to call the class of these regions: the innermost of them, without what lies in it besides."""
    inner = [n for n in regions if n in of and not any(regions[m] < regions[n] for m in of)]
    other = [n for n in regions if n not in of and any(regions[n] & regions[m] for m in inner)]
    outer = [n for n in other if not any(regions[n] < regions[m] for m in other)]
    return " and ".join(inner) + (" without " + " or ".join(outer) if outer else "")


UNLABELLED = Labels(("background", "unknown"), ((0,), (1,)))
"""Of cases that are learnt from without labels: planned for as for one class, and no voxel has it."""
