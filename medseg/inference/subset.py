"""Some of a model's classes: the others become background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError, nearest
from medseg.inference.components import Indices
from medseg.labels import IGNORE, ORDER_KEY, REST, Labels


@dataclass(frozen=True, eq=False)
class Subset:
    """The classes that are written.

    Args:
        labels: their table. Values that mean one of the other classes mean the background in it, so that references
            that hold all classes can be compared with.
        codes: uint8, class index of the model → class index in `labels`.
    """

    labels: Labels
    codes: NDArray[np.uint8]

    def apply(self, indices: Indices) -> Indices:
        """Class indices of the model as those of the table."""
        return self.codes[indices]


def whole(labels: Labels) -> Subset:
    """All classes."""
    return Subset(labels, np.arange(256, dtype=np.uint8))


def choose(labels: Labels, text: str) -> Subset:
    """The classes or regions of a list with commas ("liver,spleen").

    Args:
        labels: of the model.
        text: names of `Labels.foreground`.
    Raises:
        MedsegError: E_NAME for a name that the model does not know.
    """
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in labels.foreground:
            raise MedsegError(
                Code.NAME,
                "the model knows no such class",
                where="--classes",
                expected=", ".join(labels.foreground),
                got=repr(name),
                remedy=nearest(name, labels.foreground),
            )
    kept = [name for name in labels.foreground if name in wanted]
    table = labels.to_json()
    claims = {name: _values(value) for name, value in table.items() if name not in (ORDER_KEY, IGNORE)}
    background = labels.names[0]
    inside = {value for name in kept for value in claims[name]}
    values = labels.written_values()
    dropped = {v for name, of in claims.items() if name not in kept for v in of} - inside
    if not any(not labels.values[index] and name in kept for index, name in enumerate(labels.names)):
        dropped |= {value for value, of in zip(values, labels.values, strict=True) if not of}  # written for "rest"
    chosen: dict[str, Any] = {background: list(dict.fromkeys([*claims[background], *sorted(dropped)]))}
    chosen |= {name: table[name] for name in kept}
    if IGNORE in table:
        chosen[IGNORE] = table[IGNORE]
    overlap = len(inside) < sum(len(claims[name]) for name in kept)
    order = [name for name in labels.region_names if name in kept] if overlap else None
    some = Labels.from_mapping(chosen, regions_order=order)
    codes = np.arange(256, dtype=np.uint8)  # what is ignored stays so
    codes[: labels.num_classes] = some.to_index(np.array(values))
    return Subset(some, codes)


def _values(value: Any) -> list[int]:
    if value == REST:
        return []
    return list(value) if isinstance(value, list) else [value]
