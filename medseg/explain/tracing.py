"""One pass of a network in which nothing is computed: which layers run, on what, and what each of them sees.

The pass runs on torch's meta device, so that sizes are known and neither memory nor time is spent, on any network that
torch can run: of this toolkit, of MONAI, or a plug-in's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from medseg.explain.network import Network, answer_size
from medseg.explain.reach import Reach
from medseg.explain.rules import (
    ACTIVATIONS,
    ADAPTIVE_POOLS,
    CONVOLUTIONS,
    MERGES,
    NORMALISATIONS,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    TRANSPOSED,
    UNPOOLS,
    Axes,
    Reaches,
    Window,
    plain_name,
    reaches_after,
    window_of,
)

KINDS: dict[str, frozenset[str]] = {
    "convolution": CONVOLUTIONS,
    "transposed convolution": TRANSPOSED,
    "pooling": POOLS | ADAPTIVE_POOLS,
    "unpooling": UNPOOLS,
    "normalisation": NORMALISATIONS,
    "activation": ACTIVATIONS,
    "product": PRODUCTS,
    "interpolation": frozenset({"interpolate", "repeat_interleave"}),
    "merge": MERGES,
}
"""What counts as a layer, and the functions that are it."""


@dataclass(frozen=True)
class Call:
    """One layer at work.

    Args:
        module: path of the module in the network that ran it; "" is the network itself.
        kind: one of `KINDS`.
        function: torch's name of it ("conv3d", "max_pool2d", "cat").
        inputs: shapes (N, C, *spatial) of what depends on the image.
        output: shape of its result.
        window: F, S and P, of layers that have them.
        weights: names of its weights with their shapes.
        groups: of a convolution.
        macs: multiply-adds.
        new_elements: numbers of its result that take memory of their own; 0 where it works in place.
        reaches: the receptive field of its result, for each axis.
        sources: for each input the number of the layer that made it, in the order in which they run; -1 is the image.
    """

    module: str
    kind: str
    function: str
    inputs: tuple[Axes, ...]
    output: Axes
    window: Window | None
    weights: dict[str, Axes]
    groups: int
    macs: int
    new_elements: int
    reaches: Reaches
    sources: Axes


def trace(model: Network, size: Sequence[int]) -> list[Call]:
    """The layers that predict one image, in the order in which they run.

    Args:
        model: on any device, in any mode; neither it nor its weights are touched.
        size: of the image; must fit the model.
    Raises:
        MedsegError: E_MODEL if the size does not fit; names the nearest that do.
    """
    tensors, image = _stand_ins(model, size)
    with _module_names(model) as running, evaluating(model), torch.no_grad():
        tracer = _Tracer(image, {name: tensors[name] for name, _ in model.named_parameters()}, running)
        with tracer:
            # tie_weights=True would leave the stand-ins in modules that are registered twice (MONAI's DynUNet)
            torch.func.functional_call(model, tensors, (image,), tie_weights=False)
    return tracer.calls


def map_shapes(model: Network, size: Sequence[int]) -> dict[str, Axes]:
    """The modules that answer with one map over the image's axes, as `watching` can keep it.

    Args:
        model: as for `trace`.
        size: of the image; must fit the model.
    Returns:
        Path of the module → shape (K, *spatial) of its map, in the order in which they end: a block after its parts.
    Raises:
        MedsegError: E_MODEL if the size does not fit; names the nearest that do.
    """
    tensors, image = _stand_ins(model, size)
    shapes: dict[str, Axes] = {}

    def note(name: str, output: object) -> None:
        shapes.pop(name, None)  # a module may run twice
        if isinstance(output, Tensor) and output.dim() == image.dim():
            shapes[name] = tuple(output.shape[1:])

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            torch.func.functional_call(model, tensors, (image,), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _stand_ins(model: Network, size: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """What a network holds, by name, and an image (1, C, *size), both without numbers in them."""
    answer_size(model, size)
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor.detach().to("meta") for name, tensor in held}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return tensors, torch.empty((1, model.in_channels, *size), device="meta", dtype=dtype)


class _Tracer(TorchFunctionMode):
    """Sees every function of torch that a network calls.

    Args:
        image: what the network is given.
        weights: what it learns, by name; not what it keeps otherwise, such as running means.
        running: names of the modules at work, the innermost last.
    """

    def __init__(self, image: Tensor, weights: dict[str, Tensor], running: Sequence[str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._running = running
        self._weights = {id(tensor): name for name, tensor in weights.items()}
        self._reaches: dict[int, Reaches] = {id(image): (Reach(),) * (image.dim() - 2)}
        self._makers: dict[int, int] = {id(image): -1}
        self._stacked: dict[int, tuple[tuple[Axes, ...], Axes]] = {}  # maps put on each other: shapes and makers
        self._alive: list[Tensor] = [image]  # an id is that of one tensor only while the tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _tensors((args, kwargs)) if id(t) in self._reaches]
        if not inputs:
            return func(*args, **kwargs)
        shapes = tuple(tuple(t.shape) for t in inputs)
        storages = {t.untyped_storage()._cdata for t in inputs}
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        if not outputs:
            return result
        name = plain_name(func)
        known = [(t, self._reaches[id(t)]) for t in inputs]
        kind = next((kind for kind, names in KINDS.items() if name in names), None)
        if kind == "merge" and len({id(t) for t in inputs}) < 2:
            kind = None  # a number added to a map
        if name in REDUCTIONS and known[0][0].dim() > len(known[0][1]) and None not in known[0][1]:
            kind = "pooling" if None in reaches_after(name, args, kwargs, known, outputs[0]) else None
        sources = tuple(self._makers[id(t)] for t in inputs)
        if name == "stack":
            self._stacked[id(outputs[0])] = shapes, sources
        if name in REDUCTIONS and outputs[0].shape[1:] == inputs[0].shape[2:] and id(inputs[0]) in self._stacked:
            kind, (shapes, sources) = "merge", self._stacked[id(inputs[0])]  # the mean of several maps
        for output in outputs:
            self._reaches[id(output)] = reaches_after(name, args, kwargs, known, output)
            self._makers[id(output)] = len(self.calls) if kind is not None else max(sources)
            self._alive.append(output)
        if kind is not None:
            output = outputs[0]
            weights = {self._weights[id(t)]: tuple(t.shape) for t in _tensors((args, kwargs)) if id(t) in self._weights}
            self.calls.append(
                Call(
                    module=self._running[-1],
                    kind=kind,
                    function=name,
                    inputs=shapes,
                    output=tuple(output.shape),
                    window=window_of(name, args, kwargs, len(known[0][1])),
                    weights=weights,
                    groups=shapes[0][1] // next(iter(weights.values()))[1] if name in CONVOLUTIONS and weights else 1,
                    macs=counter.get_total_flops() // 2,
                    new_elements=0 if output.untyped_storage()._cdata in storages else output.numel(),
                    reaches=self._reaches[id(output)],
                    sources=sources,
                )
            )
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and tables."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules at work, the outermost first, kept while the block lasts."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode while the block lasts, then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
