"""MONAI's segmentation networks, by name: `model=monai model.network=SegResNet model.arguments={init_filters: 8}`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import Code, MedsegError, nearest
from medseg.models.blocks.dimensions import per_axis
from medseg.models.contract import MODELS, SegmentationModel
from medseg.torchvision_compat import prepare_torchvision

NETWORKS = (
    "AttentionUnet",
    "BasicUNet",
    "DynUNet",
    "FlexibleUNet",
    "HighResNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "SwinUNETR",
    "UNet",
    "UNETR",
    "VNet",
)
"""Networks that map an image to class scores of its size. Others of MONAI return something else, or need objects as
arguments that a configuration cannot hold."""

_FILLED_IN = {
    "spatial_dims": ("spatial_dims", "dimensions"),
    "in_channels": ("in_channels", "num_channels"),
    "out_channels": ("out_channels", "num_classes"),
}
"""What is filled in by us → the names that MONAI's networks give it."""

_DOWNLOADING = "pretrained"
"""The argument that makes MONAI's networks (FlexibleUNet) download weights."""

_REFUSALS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)
"""What MONAI's networks raise for an image size that they cannot take."""

_LARGEST_DIVISOR = 64
"""Sizes are tried up to multiples of this; deeper networks than six halvings are not in use."""


@dataclass(frozen=True)
class MonaiConfig:
    """Settings of a network of MONAI."""

    network: str = "SegResNet"
    """Class name in monai.networks.nets, such as DynUNet, SegResNet, SwinUNETR, UNETR, AttentionUnet, VNet."""
    arguments: dict[str, Any] | None = None
    """Its arguments by MONAI's names, without the numbers of axes, channels and classes, which are filled in."""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise MedsegError(
                Code.NAME,
                f"there is no MONAI network named {self.network!r} here",
                where="model.network",
                remedy=nearest(self.network, NETWORKS),
            )


@MODELS.register("monai", MonaiConfig)
class MonaiNetwork(SegmentationModel):
    """A network of MONAI as a model of this toolkit.

    Several scores while training (`deep_supervision` of DynUNet and MedNeXt, `dsdepth` of SegResNetDS) come as a list,
    the highest resolution first; DynUNet's, which MONAI stacks, all have the full resolution. Weights that a network
    registers under two names (DynUNet) stand once in the state dict.

    Sizes are found by running the network on shapes without data, because MONAI's networks do not state what they
    take.

    Args:
        config: the network and its arguments.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG for an argument that the network does not have or needs; E_MODEL if it refuses them.

    Source:
        Cardoso et al., MONAI: An open-source framework for deep learning in healthcare, 2022, arXiv:2211.02701.
    """

    def __init__(self, config: MonaiConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
        self.name = config.network
        context = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": num_classes}
        self.network = _build(config, context)
        self._known_sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._twins = _names_of_twins(self)
        self.register_state_dict_post_hook(_drop_twins)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_restore_twins)  # type: ignore[no-untyped-call]
        self._divisor = self._find_divisor((config.arguments or {}).get("img_size"))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores; see `SegmentationModel.forward`."""
        scores = _as_list(self.network(x), self.spatial_dims)
        return scores if self.training and len(scores) > 1 else scores[0]

    @property
    def divisor(self) -> tuple[int, ...]:
        """Per axis, the smallest power of two whose multiples fit; `img_size` for networks that take only that."""
        return self._divisor

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result; see `SegmentationModel.output_size`."""
        size = tuple(input_size)
        if size not in self._known_sizes:
            try:
                self._known_sizes[size] = self._run_on_shape(size)
            except _REFUSALS as reason:
                raise self._refusal(size, reason) from reason
        return self._known_sizes[size]

    def _run_on_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result, from a run of the network on tensors without data."""
        x = torch.empty((1, self.in_channels, *size), device="meta")
        held = itertools.chain(self.network.named_parameters(), self.network.named_buffers())
        tensors = {name: tensor.to("meta") for name, tensor in held}
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            with torch.no_grad():
                # tie_weights=True would leave the stand-ins in modules that are registered twice (DynUNet)
                output = torch.func.functional_call(self.network, tensors, (x,), tie_weights=False)
        finally:
            for module, training in modes:
                module.training = training
        return tuple(_as_list(output, self.spatial_dims)[0].shape[2:])

    def _find_divisor(self, fixed_size: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """The divisor; shows at the same time that the network runs at all.

        Args:
            fixed_size: the only size that the network takes, if it has one.
        """
        if fixed_size is None:
            return tuple(self._axis_divisor(axis) for axis in range(self.spatial_dims))
        if not isinstance(fixed_size, int):
            fixed_size = tuple(fixed_size)
        size = per_axis(fixed_size, self.spatial_dims, where="model.arguments.img_size")
        self._attempt(size)
        return size

    def _axis_divisor(self, axis: int) -> int:
        """The smallest power of two whose odd multiples fit along an axis, the other axes being generous."""
        powers = [1 << i for i in range(_LARGEST_DIVISOR.bit_length())]
        for divisor in powers:
            size = [2 * _LARGEST_DIVISOR] * self.spatial_dims
            size[axis] += divisor
            try:
                self._attempt(tuple(size))
            except MedsegError as refusal:
                reason = refusal
            else:
                return divisor
        raise reason

    def _attempt(self, size: tuple[int, ...]) -> None:
        """Run on a size while the divisor is not known.

        Raises:
            MedsegError: E_MODEL if the network cannot take the size, or returns another.
        """
        try:
            result = self._run_on_shape(size)
        except (*_REFUSALS, ImportError) as reason:
            raise _refused_to_build(self.name, reason, size) from reason
        if result != size:
            raise _refused_to_build(self.name, f"an image of size {size} gives scores of size {result}", size)

    def _fits(self, size: tuple[int, ...]) -> bool:
        try:
            self._attempt(size)
        except MedsegError:
            return False
        return True

    def _refusal(self, size: tuple[int, ...], reason: Exception) -> MedsegError:
        nearest_sizes = "see the network's documentation"
        if len(size) == self.spatial_dims:
            below = tuple(max(1, n // d) * d for n, d in zip(size, self.divisor, strict=True))
            above = tuple(-(-n // d) * d for n, d in zip(size, self.divisor, strict=True))
            larger = tuple(n + d for n, d in zip(above, self.divisor, strict=True))
            candidates = [s for s in dict.fromkeys((below, above, larger)) if s != size and self._fits(s)]
            nearest_sizes = "the nearest that fit: " + " or ".join(str(s) for s in candidates)
            if not candidates:
                nearest_sizes = f"use a larger multiple of {self.divisor}"
        return MedsegError(
            Code.MODEL,
            f"MONAI's {self.name} cannot take images of this size: {_first_line(reason)}",
            expected=f"{self.spatial_dims} axes, multiples of {self.divisor}",
            got=size,
            remedy=nearest_sizes,
        )


def _build(config: MonaiConfig, context: Mapping[str, int]) -> nn.Module:
    """Import MONAI and build the network."""
    prepare_torchvision()
    import monai.networks.nets as nets  # here, because it takes seconds and other models do not need it

    network = getattr(nets, config.network)
    parameters = inspect.signature(network).parameters
    filled_in = {
        next(name for name in names if name in parameters): context[ours] for ours, names in _FILLED_IN.items()
    }
    arguments = config.arguments or {}
    _check_arguments(config.network, arguments, parameters, filled_in)
    try:
        built: nn.Module = network(**filled_in, **arguments)
    except Exception as reason:  # MONAI's networks check their arguments with every kind of exception
        raise _refused_to_build(config.network, reason, {**filled_in, **arguments}) from reason
    return built


def _refused_to_build(name: str, reason: Exception | str, got: object) -> MedsegError:
    remedy = "install the package that MONAI asks for" if isinstance(reason, ImportError) else None
    return MedsegError(
        Code.MODEL,
        f"MONAI's {name} does not work with these arguments: {_first_line(reason)}",
        where="model.arguments",
        got=got,
        remedy=remedy,
    )


def _check_arguments(
    network: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    filled_in: Mapping[str, int],
) -> None:
    """Refuse arguments that the network does not have, that are filled in, that download, or that it still needs."""
    free = [name for name in parameters if name not in filled_in]
    for name in arguments:
        if name in filled_in:
            raise MedsegError(
                Code.CONFIG,
                f"{name} is known from the data and filled in",
                where=f"model.arguments.{name}",
                remedy="leave it out",
            )
        if name not in free:
            raise MedsegError(
                Code.CONFIG,
                f"MONAI's {network} has no argument {name!r}",
                where=f"model.arguments.{name}",
                remedy=nearest(name, free),
            )
    if arguments.get(_DOWNLOADING):
        raise MedsegError(
            Code.CONFIG,
            f"MONAI's {network} would download its weights, and medseg opens no connection",
            where=f"model.arguments.{_DOWNLOADING}",
            expected="false",
            got=arguments[_DOWNLOADING],
            remedy="leave it out; to begin with the weights of a run of medseg, give trainer.initial=RUN",
        )
    needed = [n for n in free if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if needed:
        raise MedsegError(
            Code.CONFIG,
            f"MONAI's {network} needs more arguments",
            where="model.arguments",
            expected=", ".join(needed),
            got=sorted(arguments),
            remedy="for instance model.arguments={" + ", ".join(f"{n}: …" for n in needed) + "}",
        )


def _as_list(output: Any, spatial_dims: int) -> list[Tensor]:
    """The scores of a network, the result first: one tensor, several, or several stacked along axis 1 (DynUNet)."""
    if not isinstance(output, Tensor):
        return list(output)
    if output.ndim == spatial_dims + 3:
        return list(output.unbind(dim=1))
    return [output]


def _names_of_twins(module: nn.Module) -> dict[str, str]:
    """Name → first name, for tensors that a module holds under several names."""
    first: dict[int, str] = {}
    twins = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            twins[name] = kept
    return twins


def _drop_twins(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave each weight in the state dict once."""
    for name in getattr(module, "_twins", ()):
        state.pop(prefix + name, None)


def _restore_twins(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the other names back before loading."""
    for name, kept in module._twins.items():  # type: ignore[union-attr, operator]
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])


def _first_line(reason: Exception | str) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0]
