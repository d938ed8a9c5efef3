"""The layers of a network as a table: sizes, weights, receptive fields, work, memory; per layer, stage and in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from medseg.explain.network import Network, answer_size
from medseg.explain.rules import Axes, Window
from medseg.explain.tracing import Call, trace

FILTERING = ("convolution", "transposed convolution")
"""Kinds of layers that share their weights between all places of a map."""
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number of a feature map."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        name: path of the module in the network.
        stage: the stage it belongs to, a path too.
        kind: what it is: "convolution", "transposed convolution", "pooling", "interpolation", "merge" (concatenation,
            sum, product of maps), "normalisation", "activation" or "product" (linear layers and attention).
        function: torch's name of what it does.
        inputs: (C, *spatial) of what it takes.
        output: (C, *spatial) of what it gives.
        window: filter size F, stride S and padding P, of layers that have them.
        weights: numbers that it learns, each counted once however often it is used.
        weights_unshared: weights, if each place of the map had filters of its own (a locally connected layer).
        weights_dense: weights, if each number of the output were connected to each of the input (a fully connected
            layer).
        macs: multiply-adds for one image.
        elements: numbers of its result that take memory of their own; 0 where it works in place.
        field: receptive field, voxels of the image along each axis; None: the whole image, or not known.
        jump: voxels of the image from one voxel of the result to the next; None as for the field.
        sources: for each input the number of the layer that made it; -1 is the image.
    """

    name: str
    stage: str
    kind: str
    function: str
    inputs: tuple[Axes, ...]
    output: Axes
    window: Window | None
    weights: int
    weights_unshared: int
    weights_dense: int
    macs: int
    elements: int
    field: tuple[int | None, ...]
    jump: tuple[float | None, ...]
    sources: Axes

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """The length along each axis as (N − F + 2P) / S + 1, or for a transposed convolution its inverse."""
        if self.window is None:
            return ()
        lengths = zip(self.inputs[0][1:], self.output[1:], strict=True)
        of_axes = zip(lengths, self.window.extent, self.window.stride, self.window.padding, strict=True)
        if self.kind == "transposed convolution":
            return tuple(_transposed(n, m, f, s, p) for (n, m), f, s, p in of_axes)
        return tuple(_convolved(n, m, f, s, p) for (n, m), f, s, p in of_axes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        window = self.window
        return {
            "name": self.name,
            "stage": self.stage,
            "kind": self.kind,
            "function": self.function,
            "inputs": [list(shape) for shape in self.inputs],
            "output": list(self.output),
            "filter_size": window and list(window.kernel),
            "stride": window and list(window.stride),
            "padding": window and list(window.padding),
            "dilation": window and list(window.dilation),
            "output_size": list(self.arithmetic),
            "weights": self.weights,
            "weights_unshared": self.weights_unshared,
            "weights_fully_connected": self.weights_dense,
            "multiply_adds": self.macs,
            "activation_elements": self.elements,
            "receptive_field": list(self.field),
            "jump": list(self.jump),
        }


@dataclass(frozen=True)
class LayerTable:
    """The layers that predict one image, in the order in which they run.

    Args:
        size: of the image, voxels along each axis.
        output_size: of the result; () of a classifier.
        in_channels: of the image.
        layers: without what does nothing (identities, drop-out while predicting).
        weights: all weights of the network; some may only be used while training (heads of deep supervision).
    """

    size: Axes
    output_size: Axes
    in_channels: int
    layers: tuple[Layer, ...]
    weights: int

    @property
    def stages(self) -> list[str]:
        """Names of the stages in the order in which they begin."""
        return list(dict.fromkeys(layer.stage for layer in self.layers))

    def of_stage(self, stage: str) -> list[Layer]:
        """The layers of a stage."""
        return [layer for layer in self.layers if layer.stage == stage]

    @property
    def field(self) -> tuple[int | None, ...]:
        """Receptive field of the result."""
        return self.layers[-1].field

    @property
    def weights_elsewhere(self) -> int:
        """Weights in no layer: of heads that only training uses, or numbers that are looked up or added (attention)."""
        return self.weights - sum(layer.weights for layer in self.layers)

    def to_json(self, precision: str = "fp32") -> dict[str, Any]:
        """Plain values.

        Args:
            precision: of the feature maps, for their memory.
        """
        element = ELEMENT_BYTES[precision]
        total = _sums(self.layers, element)
        return {
            "input": [self.in_channels, *self.size],
            "output": list(self.layers[-1].output),
            "precision": precision,
            "total": {**total, "weights": self.weights, "weights_elsewhere": self.weights_elsewhere},
            "stages": [{"stage": stage, **_sums(self.of_stage(stage), element)} for stage in self.stages],
            "layers": [{**layer.to_json(), "activation_bytes": layer.elements * element} for layer in self.layers],
        }


def layer_table(model: Network, size: Sequence[int]) -> LayerTable:
    """Count a network layer by layer; nothing is computed.

    Args:
        model: any registered one, on any device; it is not changed.
        size: voxels of the image along each axis.
    Raises:
        MedsegError: E_MODEL if the size does not fit the model; names the nearest that do.
    """
    size = tuple(size)
    output_size = answer_size(model, size)
    stage_of = stages_of(model)
    seen: set[str] = set()
    layers = []
    for call in trace(model, size):
        layers.append(_layer(call, stage_of(call.module), seen))
        seen.update(call.weights)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return LayerTable(size, output_size, model.in_channels, tuple(layers), weights)


def stages_of(model: nn.Module) -> Callable[[str], str]:
    """Path of a module → path of the stage that it belongs to.

    A stage is a child of the network, or of a list among its children, however deep: "encoder.0", "heads.0",
    "nested.0.1", "backbone.stages.2". Wrappers around a single child are passed through.
    """
    root, prefix = model, ""
    while len(children := dict(root.named_children())) == 1:
        (name, root) = next(iter(children.items()))
        prefix += f"{name}."
    found = {path for name, child in children.items() for path in _stages_in(child, prefix + name, is_top=True)}

    def stage_of(path: str) -> str:
        if not path.startswith(prefix):
            return prefix.rstrip(".")
        parts = path.split(".")
        above = (".".join(parts[:number]) for number in range(len(parts), 0, -1))
        return next((name for name in above if name in found), prefix.rstrip("."))

    return stage_of


def _stages_in(module: nn.Module, path: str, *, is_top: bool = False) -> Iterator[str]:
    children = dict(module.named_children())
    is_list = isinstance(module, nn.ModuleList) or (is_top and isinstance(module, nn.Sequential))
    if is_list or (is_top and [type(child) for child in children.values()] == [nn.ModuleList]):
        for name, child in children.items():
            yield from _stages_in(child, f"{path}.{name}")
    else:
        yield path


def _layer(call: Call, stage: str, seen: Iterable[str]) -> Layer:
    weights = {name: shape for name, shape in call.weights.items() if name not in seen}
    count = sum(math.prod(shape) for shape in weights.values())
    unshared = dense = count
    if call.kind in FILTERING and call.weights:
        # Each number of the result (of the input, transposed) has its own filter, each number of the result its bias
        filters = call.output if call.kind == "convolution" else call.inputs[0]
        weight, *bias = call.weights.values()
        per_place = math.prod(weight[1:])
        unshared = math.prod(filters) * per_place + (math.prod(call.output) if bias else 0)
        dense = math.prod(call.inputs[0]) * math.prod(call.output) + (math.prod(call.output) if bias else 0)
    return Layer(
        name=call.module,
        stage=stage,
        kind=call.kind,
        function=call.function,
        inputs=tuple(shape[1:] for shape in call.inputs),
        output=call.output[1:],
        window=call.window,
        weights=count,
        weights_unshared=unshared,
        weights_dense=dense,
        macs=call.macs,
        elements=call.new_elements,
        field=tuple(reach.size if reach else None for reach in call.reaches),
        jump=tuple(float(reach.jump) if reach else None for reach in call.reaches),
        sources=call.sources,
    )


def _convolved(n: int, m: int, f: int, s: int, p: int) -> str:
    quotient = f"({n} − {f} + 2·{p}) / {s}"
    return f"⌊{quotient}⌋ + 1 = {m}" if (n - f + 2 * p) % s else f"{quotient} + 1 = {m}"


def _transposed(n: int, m: int, f: int, s: int, p: int) -> str:
    added = m - ((n - 1) * s + f - 2 * p)
    return f"({n} − 1)·{s} + {f} − 2·{p}{f' + {added}' if added else ''} = {m}"


def _sums(layers: Sequence[Layer], element_bytes: int) -> dict[str, Any]:
    """What adds up, and the receptive field and the size at the end."""
    last = layers[-1]
    return {
        "output": list(last.output),
        "receptive_field": list(last.field),
        "jump": list(last.jump),
        "weights": sum(layer.weights for layer in layers),
        "weights_unshared": sum(layer.weights_unshared for layer in layers),
        "weights_fully_connected": sum(layer.weights_dense for layer in layers),
        "multiply_adds": sum(layer.macs for layer in layers),
        "activation_bytes": element_bytes * sum(layer.elements for layer in layers),
    }
