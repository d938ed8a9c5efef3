"""Feature maps and filters: what the layers of a network say of an image, and what the first filters look for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import Code, MedsegError, nearest
from medseg.explain.layers import FILTERING, LayerTable
from medseg.explain.network import Network
from medseg.explain.tracing import evaluating, map_shapes
from medseg.models.classifiers import ClassificationModel


def module_named(model: nn.Module, name: str) -> nn.Module:
    """A part of a network by its path, as `medseg inspect MODEL` prints it ("encoder.2.block"); "" is all of it.

    Raises:
        MedsegError: E_NAME with the nearest paths.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise MedsegError(
            Code.NAME, f"the network has no layer {name!r}", where="layer", remedy=nearest(name, modules.keys() - {""})
        )
    return modules[name]


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the maps that layers make while the block lasts: path → (N, K, *spatial), the last that it made.

    They are copies, because activations work in place on what stands before them. What follows is computed from them,
    so that it has a gradient with respect to them.

    Raises:
        MedsegError: E_NAME for a path that does not exist; E_MODEL, while running, for a module that makes no map.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() < 4:
            raise MedsegError(
                Code.MODEL, "this layer makes no feature maps", where=name, expected="(N, K, *spatial)",
                got=tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__,
            )  # fmt: skip
        maps[name] = output.clone()
        return maps[name].clone()

    modules = {name: module_named(model, name) for name in layers}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class MapPlaces:
    """Where in a network there are maps to look at.

    Args:
        stages: those that end with a map over the image's axes, in the order in which they begin.
        before_scores: the stage whose map the scores are made of: the last one to end before the last convolution, or
            the last module where no stage has a map; None where there is none.
        coarsest: path of the module that ends with the coarsest map; the last of several.
    """

    stages: tuple[str, ...]
    before_scores: str | None
    coarsest: str


def map_places(model: Network, table: LayerTable) -> MapPlaces:
    """Find the maps of a network, also of one whose receptive fields are not known (transformers).

    Args:
        model: the network.
        table: its layers.
    """
    shapes = map_shapes(model, table.size)
    stages, last = table.stages, [layer.name for layer in table.layers if layer.kind in FILTERING][-1:]
    inner = {stage for stage in stages if stage and not any(other.startswith(f"{stage}.") for other in stages)}
    with_maps = tuple(stage for stage in stages if stage in inner and stage in shapes)
    # The scores come from the last convolution, which an activation may follow
    ended = list(itertools.takewhile(lambda name: name not in last, shapes))
    before = [name for name in ended if name in with_maps] or ended
    if isinstance(model, ClassificationModel):  # its head has no places any more
        before = [name for name, module in model.named_modules() if module is model.last_maps]
    # Not the first layer, which in a transformer cuts the image into pieces
    placed = {
        layer.name for layer in table.layers[1:] if None not in layer.jump and layer.output == shapes.get(layer.name)
    }
    voxels = {
        name: math.prod(shape[1:]) for name, shape in shapes.items() if name and (name in placed or name in with_maps)
    }
    # Nor what a block squeezes to one number for each map: it has no place in the image
    several = {name: number for name, number in voxels.items() if number > 1} or voxels
    coarsest = min(reversed(several), key=lambda name: several[name], default="")
    return MapPlaces(with_maps, before[-1] if before else None, coarsest)


class _Enough(Exception):
    """The map that was wanted is there."""


def map_of(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """The map that a layer makes of images, (N, K, *spatial); what follows it in the network is not run.

    Args:
        model: the network.
        images: shape (N, C, *spatial).
        layer: path of the module.
    Raises:
        MedsegError: E_NAME, E_MODEL.
    """

    def stop(*_: object) -> None:
        raise _Enough

    with watching(model, (layer,)) as maps:
        handle = module_named(model, layer).register_forward_hook(stop)
        try:
            with suppress(_Enough):
                model(images)
        finally:
            handle.remove()
    return maps[layer]


@torch.no_grad()
def feature_maps(model: Network, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What layers say of an image: path → (K, *spatial).

    Args:
        model: on the device of the image; its mode stays what it was.
        image: shape (C, *spatial), as the network sees it.
        layers: paths of modules.
    Raises:
        MedsegError: E_NAME, E_MODEL.
    """
    with evaluating(model), watching(model, layers) as maps:
        model(image[None])
    return {name: answer[0] for name, answer in maps.items()}


def first_filters(model: Network) -> tuple[str, Tensor]:
    """The filters that look at the image itself: path of their convolution, and weights (K, C, *F).

    Raises:
        MedsegError: E_MODEL for a network without a convolution over the image's channels.
    """
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and not module.transposed and module.in_channels == model.in_channels:
            return name, module.weight.detach()
    raise MedsegError(Code.MODEL, "the network has no filters that look at the image", where=type(model).__name__)


def middle(maps: Tensor) -> Tensor:
    """What maps (N, K, *spatial) say of the voxel in the middle: (N, K)."""
    for _ in range(maps.dim() - 2):
        maps = maps.select(2, maps.shape[2] // 2)
    return maps


def around_middle(images: Tensor, field: Sequence[int | None]) -> Tensor:
    """What the voxel in the middle of a map sees of images, and one voxel more on each side.

    Args:
        images: shape (K, *spatial).
        field: receptive field along each axis; None leaves the axis whole.
    """
    for axis, length in enumerate(field, start=1):
        if length is not None:
            centre, reach = images.shape[axis] // 2, length // 2 + 1
            first, last = max(0, centre - reach), min(images.shape[axis], centre + reach + 1)
            images = images.narrow(axis, first, last - first)
    return images


def plane(maps: Tensor, share: float | None = None) -> Tensor:
    """One plane of each map: (K, D, H, W) → (K, H, W) at a share of the first axis; planes stay as they are.

    Args:
        maps: shape (K, *spatial).
        share: 0 is the first plane, 1 the last; None is the middle.
    """
    if maps.dim() == 3:
        return maps
    depth = maps.shape[1]
    index = depth // 2 if share is None else min(depth - 1, max(0, int(share * depth)))
    return maps[:, index]
