"""A network as boxes and the maps that go from one to another: what a drawing of it shows.

What is drawn is what ran: an edge is a map that one stage made and another took. So every network can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from medseg.explain.layers import Layer, LayerTable
from medseg.explain.text import FOLLOWING, short_name, times

IMAGE = "image"
"""Name of the box that everything begins with."""
RESULT = "result"
"""Name of the box for what the network itself ends with."""
RESIZING = ("convolution", "transposed convolution", "unpooling", "pooling", "interpolation")
"""Kinds of layers that change the size of a map; of several in a stage the first named here says how it does."""
_UP = ("transposed convolution", "unpooling", "interpolation")
_PASSED_ON = ("pooling", "unpooling", "interpolation", *FOLLOWING)
_MERGED_BY = {
    "cat": "concat",
    "concat": "concat",
    "concatenate": "concat",
    "sub": "subtract",
    "mul": "multiply",
    "iadd": "add",
}


@dataclass(frozen=True)
class Box:
    """A stage of the network.

    Args:
        name: of the stage, without what all of them begin with.
        layers: what it does, in the order in which it runs.
        level: how often it has halved the image, rounded; of what has no place in the image that of what it is made of.
        column: steps from the image, along the longest way.
    """

    name: str
    layers: tuple[Layer, ...]
    level: int
    column: int

    @property
    def has_places(self) -> bool:
        """Whether what it gives is a map, and not one number for each channel or class."""
        return math.prod(self.layers[-1].output[1:]) > 1


@dataclass(frozen=True)
class Edge:
    """A map on its way.

    Args:
        source: name of the box that made it.
        target: name of the box that takes it.
        skip: how it is merged there with another one; "" for the way that the network takes from stage to stage.
        step: what the target does to its size, if anything.
    """

    source: str
    target: str
    skip: str
    step: str


@dataclass(frozen=True)
class _Arrival:
    """A map of another stage that a layer takes.

    Args:
        maker: number of the layer that made it; -1 is the image.
        layer: number of the layer that takes it.
        place: which of its inputs it is.
        how: what the network itself did to it on the way: "add", "concat", …
    """

    maker: int
    layer: int
    place: int
    how: str


def graph_of(table: LayerTable) -> tuple[dict[str, Box], list[Edge]]:
    """The boxes of a network by name, in the order in which they begin, and the edges between them.

    What the network itself does between its stages is no box, nor are normalisations, activations and poolings that
    are stages by themselves: they count to the stage before or behind them.
    """
    owners = _owners(table)
    arrivals: dict[tuple[str, str], list[_Arrival]] = {}
    for number, layer in enumerate(table.layers):
        target = owners[number]
        if target is None:
            continue
        for place, source in enumerate(layer.sources):
            if layer.kind == "unpooling" and place and table.layers[source].kind == "pooling":
                source = table.layers[source].sources[0]  # places in the map that was pooled
            for maker, how in _makers(table, owners, source):
                origin = owners[maker] if maker >= 0 else IMAGE
                if origin is not None and origin != target:
                    arrivals.setdefault((origin, target), []).append(_Arrival(maker, number, place, how))
    inside: dict[str, list[Layer]] = {}
    for number, owner in enumerate(owners):
        if owner is not None:
            inside.setdefault(owner, []).append(table.layers[number])
    drawn = {name: tuple(layers) for name, layers in inside.items() if any(name in ends for ends in arrivals)}
    boxes = _placed(table, drawn, arrivals)
    edges = []
    column = {IMAGE: 0, **{name: box.column for name, box in boxes.items()}}
    short = {**_without_beginning(boxes), IMAGE: IMAGE}
    for (origin, target), found in arrivals.items():
        ways = [(column[other], found[-1].maker, other) for (other, at), found in arrivals.items() if at == target]
        comes_first = origin == max(ways)[-1]  # the longest way to it
        step = _step(boxes.get(origin), boxes[target]) if comes_first else ""
        skip = "" if comes_first else _skip(table, owners, found)
        edges.append(Edge(short[origin], short[target], skip, step))
    return {short[name]: replace(box, name=short[name]) for name, box in boxes.items()}, edges


def step_words(layer: Layer) -> str:
    """What changes the size of a map, in words."""
    name = "up-conv" if layer.kind == "transposed convolution" else short_name(layer)
    if layer.window is None:
        return name
    return f"{name} {times(layer.window.kernel)}, stride {times(layer.window.stride)}"


def _owners(table: LayerTable) -> list[str | None]:
    """The box of each layer; None of what the network itself does between its stages."""
    stages = table.stages
    between = {stage for stage in stages if any(other.startswith(f"{stage}.") or not stage for other in stages)}
    between -= {stage for stage in between if len(stages) == 1}
    owners: list[str | None] = [None if layer.stage in between else layer.stage for layer in table.layers]
    consumers = _consumers(table)
    if owners[-1] is None:  # what it ends with, and what makes maps for that alone
        for number in range(len(owners)):
            stage = table.layers[number].stage
            of_stage = [n for n, layer in enumerate(table.layers) if layer.stage == stage]
            if set().union(*(consumers[n] for n in of_stage)) - set(of_stage) == {len(owners) - 1}:
                owners[number] = RESULT
        owners[-1] = RESULT
    for number, layer in enumerate(table.layers):  # what has come up is merged there, if it goes up again behind that
        up = [n for n in layer.sources if n >= 0 and owners[n] is not None and table.layers[n].kind in _UP]
        same = all(size[1:] == layer.output[1:] for size in layer.inputs)
        is_last = bool(consumers[number]) and all(table.layers[n].kind in _UP for n in consumers[number])
        if owners[number] is None and layer.kind == "merge" and len(up) == 1 and same and is_last:
            owners[number] = owners[up[0]]
    for stage in stages:
        numbers = [number for number, layer in enumerate(table.layers) if layer.stage == stage]
        if stage in between or not all(table.layers[number].kind in _PASSED_ON for number in numbers):
            continue
        if all(table.layers[number].kind in FOLLOWING for number in numbers):
            maker = table.layers[numbers[0]].sources[0]
            heirs = {owners[maker] if maker >= 0 else None}
        else:
            heirs = {owners[n] for number in numbers for n in consumers[number] if n not in numbers}
        heir = heirs.pop() if len(heirs) == 1 else None
        if heir is not None and not any(layer.kind in _UP for layer in table.of_stage(heir)):
            for number in numbers:
                owners[number] = heir
    return owners


def _consumers(table: LayerTable) -> list[set[int]]:
    """For each layer the numbers of those that take its map."""
    found: list[set[int]] = [set() for _ in table.layers]
    for number, layer in enumerate(table.layers):
        for source in layer.sources:
            if source >= 0:
                found[source].add(number)
    return found


def _makers(table: LayerTable, owners: list[str | None], number: int) -> list[tuple[int, str]]:
    """Layers in stages that made a map, the last one first, and how each was merged into it between stages."""
    if number < 0 or owners[number] is not None:
        return [(number, "")]
    found = [maker for source in table.layers[number].sources for maker in _makers(table, owners, source)]
    name = _merge_name(table, table.layers[number])
    return [(maker, how or name) for maker, how in sorted(dict(found).items(), reverse=True)]


def _skip(table: LayerTable, owners: list[str | None], found: list[_Arrival]) -> str:
    """How a map that comes across is merged with what comes the usual way."""
    how = next((arrival.how for arrival in found if arrival.how), "")
    if how:
        return how
    for arrival in found:
        if table.layers[arrival.layer].kind == "unpooling":
            return "pool indices"
    merging = [arrival for arrival in found if table.layers[arrival.layer].kind == "merge"]
    if not merging:  # first it is turned into scores, for example
        owner = owners[found[0].layer]
        first = next(
            (n for n in range(found[0].layer, len(owners)) if owners[n] == owner and table.layers[n].kind == "merge"),
            None,
        )
        return "" if first is None else _merge_name(table, table.layers[first])
    arrival = merging[0]
    names = [_merge_name(table, table.layers[arrival.layer])]
    number: int | None = arrival.layer
    while number is not None and names[-1] in ("gate", "multiply"):  # and what passes it is merged in turn
        number = next(
            (
                n
                for n, layer in enumerate(table.layers)
                if number in layer.sources and layer.kind == "merge" and owners[n] == owners[number]
            ),
            None,
        )
        names += [] if number is None else [_merge_name(table, table.layers[number])]
    size = table.layers[arrival.layer].inputs[arrival.place][1:]
    made = table.layers[arrival.maker].output[1:] if arrival.maker >= 0 else table.size
    words = " → ".join(dict.fromkeys(names))
    return f"{words}, cut to {times(size)}" if size != tuple(made) and math.prod(size) > 1 else words


def _merge_name(table: LayerTable, layer: Layer) -> str:
    if layer.function in ("mul", "imul", "rmul"):
        for source in layer.sources:
            while source >= 0 and table.layers[source].kind in ("interpolation", "normalisation"):
                source = table.layers[source].sources[0]
            if source >= 0 and table.layers[source].function == "sigmoid":
                return "gate"
    return _MERGED_BY.get(layer.function, short_name(layer) if layer.kind == "merge" else "")


def _step(source: Box | None, target: Box) -> str:
    if source is not None and source.level == target.level and source.has_places == target.has_places:
        return ""
    found: dict[str, str] = {}
    goes_up = source is not None and target.level < source.level
    for layer in target.layers:
        changes = layer.window is None or max(layer.window.stride) > 1
        if layer.kind in RESIZING and (layer.kind in _UP) == goes_up and changes:
            found.setdefault(layer.kind, step_words(layer))
    if not found and not goes_up and target.has_places:  # cut out with a step, as before a pathway of low resolution
        every = {jump for jump in target.layers[-1].jump if jump is not None}
        return f"1 of {max(every):g} voxels" if every and target.level else ""
    return next((found[kind] for kind in RESIZING if kind in found), "")


def _placed(
    table: LayerTable, drawn: dict[str, tuple[Layer, ...]], arrivals: Iterable[tuple[str, str]]
) -> dict[str, Box]:
    """Levels and columns."""
    before: dict[str, list[str]] = {name: [] for name in drawn}
    for source, target in arrivals:
        before[target].append(source)
    boxes: dict[str, Box] = {}
    for name, layers in drawn.items():
        earlier = [boxes[other] for other in before[name] if other in boxes]
        last = layers[-1]
        if None not in last.jump:
            level = round(max(math.log2(max(1.0, jump or 1.0)) for jump in last.jump) - 0.2)
        elif math.prod(last.output[1:]) > 1 or not earlier:  # where jumps are not known, sizes tell
            shrinking = (n / max(m, 1) for n, m in zip(table.size, last.output[1:], strict=False))
            level = round(math.log2(max(1.0, *shrinking)) - 0.2)
        else:
            level = max(box.level for box in earlier)
        boxes[name] = Box(name, layers, level, 1 + max((box.column for box in earlier), default=0))
    return boxes


def _without_beginning(names: Iterable[str]) -> dict[str, str]:
    """Names without the parts that all of them begin with."""
    parts = {name: name.split(".") for name in names}
    while parts and len({tuple(p[:1]) for p in parts.values()}) == 1 and all(len(p) > 1 for p in parts.values()):
        parts = {name: p[1:] for name, p in parts.items()}
    return {name: ".".join(p) for name, p in parts.items()}
