"""Names → metrics. A new metric is one file in this package:

    @metric("fdr", title="FDR", better="lower", dimension="ratio")
    def false_discovery_rate(masks: ClassMasks) -> float:
        '''What it is, its unit, its source.'''
        return masks.fp / masks.num_predicted if masks.num_predicted else 1.0

The function is called where the reference or the prediction has the class; it answers for missed and spurious
structures as `medseg.metrics` says.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from medseg.errors import Code, MedsegError, nearest
from medseg.metrics.masks import ClassMasks, State
from medseg.registry import PLUGIN_GROUP
from medseg.volume import PIXEL_FRAME, PLANE_FRAME, WORLD_FRAME

Dimension = Literal["ratio", "length", "volume", "count"]
MetricFunction = Callable[[ClassMasks], float]

_UNITS: dict[tuple[Dimension, str], str] = {
    ("length", WORLD_FRAME): "mm",
    ("length", PLANE_FRAME): "mm",
    ("length", PIXEL_FRAME): "px",
    ("volume", WORLD_FRAME): "ml",
    ("volume", PLANE_FRAME): "mm2",
    ("volume", PIXEL_FRAME): "px",
}
"""(dimension, frame) → unit; the "volume" of a picture is its area."""


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Args:
        name: as in tables' columns, without the unit.
        title: short heading for people.
        better: which direction ranks predictions; None for values that do not rank (see `medseg.metrics`).
        dimension: what the unit is derived from.
        function: one class of one case → value.
        default: computed unless names are given; those that are costly or mean something only for some structures
            are computed by name.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] | None
    dimension: Dimension
    function: MetricFunction
    default: bool = True

    def measure(self, masks: ClassMasks) -> float:
        """The value for one class of one case; NaN where the class is absent from both."""
        return math.nan if masks.state is State.ABSENT else float(self.function(masks))

    def unit(self, frame: str) -> str:
        """ "mm", "ml", "mm2", "px" or "" for a grid of this frame."""
        return _UNITS.get((self.dimension, frame), "")

    def column(self, frame: str) -> str:
        """The name with its unit, as in tables ("hd95_mm")."""
        unit = self.unit(frame)
        return f"{self.name}_{unit}" if unit else self.name


_metrics: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    title: str,
    better: Literal["higher", "lower"] | None,
    dimension: Dimension,
    default: bool = True,
) -> Callable[[MetricFunction], MetricFunction]:
    """Function decorator: make a metric known under `name`. See `Metric` for the arguments."""

    def add(function: MetricFunction) -> MetricFunction:
        if name in _metrics:
            raise MedsegError(Code.NAME, f"the metric {name!r} is registered twice", where=function)
        _metrics[name] = Metric(name, title, better, dimension, function, default)
        return function

    return add


def metrics(names: Sequence[str] | None = None) -> tuple[Metric, ...]:
    """The metrics of these names, or those that are computed by default: first this package's, then plugins'.

    Raises:
        MedsegError: E_NAME with the nearest names.
    """
    if names is None:
        return tuple(m for m in known_metrics() if m.default)
    known = {m.name: m for m in known_metrics()}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise MedsegError(Code.NAME, f"there is no metric named {unknown!r}", remedy=nearest(unknown, known))
    return tuple(known[name] for name in names)


def known_metrics() -> tuple[Metric, ...]:
    """All metrics, also those that are computed by name only."""
    _load()
    return tuple(_metrics.values())


def metric_names(text: str) -> tuple[str, ...]:
    """The names that a user wrote: "dice,hd95", "default,cldice", "all".

    Args:
        text: names between commas; "default" stands for what is computed without a choice, "all" for everything.
    Returns:
        Each name once, in the order of writing.
    Raises:
        MedsegError: E_NAME with the nearest names, E_CONFIG if there is none.
    """
    names: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        groups = {"default": lambda: metrics(), "all": known_metrics}
        chosen = groups[word]() if word in groups else metrics((word,))
        names += [m.name for m in chosen]
    if not names:
        raise MedsegError(Code.CONFIG, "no metric is named", where="metrics", got=repr(text), remedy="dice,hd95")
    return tuple(dict.fromkeys(names))


@cache
def _load() -> None:
    package = importlib.import_module("medseg.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for plugin in entry_points(group=PLUGIN_GROUP):
        plugin.load()
