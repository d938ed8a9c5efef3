"""Networks that turn an image into feature maps of falling resolution: torchvision's, in 2D and inflated to 3D.

Classifiers put a head on the last map, segmenters a decoder on all of them. The weights of both have the same names
("backbone.stages.…"), so that the one can begin with the weights of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.torchvision_compat import prepare_torchvision

ResNet = Literal["resnet18", "resnet34", "resnet50"]
Network = Literal["resnet18", "resnet34", "resnet50", "densenet121", "efficientnet_b0"]
NUM_STEPS = 5
"""Steps down of each of torchvision's networks; each halves the axes of a picture."""
DEPTH_STRIDES: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)

_Names = tuple[tuple[str, ...], ...]
_RESNET: _Names = (("conv1", "bn1", "relu"), ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))
_DENSENET: _Names = (
    ("conv0", "norm0", "relu0"),
    ("pool0", "denseblock1"),
    ("transition1", "denseblock2"),
    ("transition2", "denseblock3"),
    ("transition3", "denseblock4", "norm5"),
)
_EFFICIENTNET: _Names = (("0", "1"), ("2",), ("3",), ("4", "5"), ("6", "7", "8"))


@dataclass(frozen=True)
class Torchvision:
    """One of torchvision's networks as a backbone.

    Args:
        weights: name of torchvision's class that lists its weights.
        parts: torchvision's names of the modules of each stage; a stage begins with a step down.
        widths: K, the channels of each stage's map.
        prefix: what stands before these names in torchvision's state dict.
    """

    weights: str
    parts: _Names
    widths: tuple[int, ...]
    prefix: str = ""


TORCHVISION: dict[str, Torchvision] = {
    "resnet18": Torchvision("ResNet18_Weights", _RESNET, (64, 64, 128, 256, 512)),
    "resnet34": Torchvision("ResNet34_Weights", _RESNET, (64, 64, 128, 256, 512)),
    "resnet50": Torchvision("ResNet50_Weights", _RESNET, (64, 256, 512, 1024, 2048)),
    "densenet121": Torchvision("DenseNet121_Weights", _DENSENET, (64, 256, 512, 1024, 1024), "features."),
    "efficientnet_b0": Torchvision("EfficientNet_B0_Weights", _EFFICIENTNET, (16, 24, 40, 112, 1280), "features."),
}
"""Sources: He et al., Deep Residual Learning, CVPR 2016; Huang et al., Densely Connected Convolutional Networks, CVPR
2017; Tan and Le, EfficientNet, ICML 2019. The stride of ResNet-50's bottlenecks is in their 3×3 convolution, as
torchvision has it ("ResNet v1.5"), not in the first 1×1 as in the paper."""


class Backbone(nn.Module):
    """Stages in a row, of which each gives a feature map.

    Args:
        stages: the parts, from the image down.
        widths: K of each stage's map.
        strides: S of each stage, one number per axis.
        network: the one of torchvision that it is; None of others.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        widths: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        network: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.stages = nn.ModuleList(stages)
        self.widths = tuple(widths)
        self.strides = tuple(strides)
        self.keeps_statistics = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, *spatial) → the map of each stage, the highest resolution first."""
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    @property
    def factors(self) -> list[tuple[int, ...]]:
        """Voxels of the image to one of each stage's map, per axis."""
        factors = [(1,) * len(self.strides[0])]
        for stride in self.strides:
            factors.append(tuple(f * s for f, s in zip(factors[-1], stride, strict=True)))
        return factors[1:]

    def train(self, mode: bool = True) -> Self:
        """As torch's; with `keeps_statistics` batch normalisations use the statistics that they have."""
        super().train(mode)
        for module in self.modules() if self.keeps_statistics else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def make_torchvision_backbone(
    network: str, *, in_channels: int, spatial_dims: int, depth_strides: Sequence[int] = DEPTH_STRIDES
) -> Backbone:
    """One of torchvision's networks without its head, with fresh weights.

    In 3D it is inflated: each filter gets as many slices as it has rows, each pooling the same window along the depth
    (none where it does not halve it). The depth is the first axis, which is that through the slices of most scans
    (`medseg.volume.MODEL_ORIENTATION`).

    Args:
        network: one of `TORCHVISION`.
        in_channels: C; the first convolution is made for so many.
        spatial_dims: 2 or 3.
        depth_strides: in 3D, the factor along the depth of each of the five steps: 2, or 1 for volumes of few slices.
    Raises:
        MedsegError: E_CONFIG for other strides.

    Source:
        Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017, section 2.4. They pad the time with zeros;
        here the first and the last slice are repeated, so that a volume that is constant along the depth is seen as
        the picture it consists of, also at the ends and in maps of one or two slices.
    """
    if len(depth_strides) != NUM_STEPS or not set(depth_strides) <= {1, 2}:
        raise MedsegError(
            Code.CONFIG,
            "the depth is halved or kept at each of the steps down",
            where="model.depth_strides",
            expected=f"{NUM_STEPS} numbers, 1 or 2",
            got=tuple(depth_strides),
        )
    prepare_torchvision()
    import torchvision  # here, because it takes a second and other models do not need it

    about = TORCHVISION[network]
    whole = torchvision.models.get_model(network, weights=None, num_classes=1)
    modules = dict((whole.features if about.prefix else whole).named_children())
    stages = [nn.Sequential(OrderedDict((name, modules[name]) for name in names)) for names in about.parts]
    if network.startswith("densenet"):
        stages[-1].add_module("relu5", nn.ReLU(inplace=True))  # torchvision has it in its head
    if in_channels != 3:
        _take_channels(stages[0], in_channels)
    strides: list[tuple[int, ...]] = [(2,) * 2] * NUM_STEPS
    if spatial_dims == 3:
        for stage, depth_stride in zip(stages, depth_strides, strict=True):
            inflate(stage, depth_stride)
        strides = [(depth_stride, 2, 2) for depth_stride in depth_strides]
    return Backbone(stages, about.widths, strides, network)


def torchvision_name(network: str, name: str) -> str:
    """torchvision's name of a tensor of a backbone ("stages.2.layer2.0.conv1.weight")."""
    return TORCHVISION[network].prefix + name.split(".", 2)[2]


def _take_channels(stem: nn.Module, in_channels: int) -> None:
    """Put a convolution for other channels in the place of the first one."""
    path, first = next((path, m) for path, m in stem.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, name = path.rpartition(".")
    new = nn.Conv2d(
        in_channels, first.out_channels, cast(Any, first.kernel_size), cast(Any, first.stride),
        cast(Any, first.padding), bias=first.bias is not None,
    )  # fmt: skip
    _draw(new)
    setattr(stem.get_submodule(parent), name, new)


def _draw(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Fresh weights as torchvision's ResNet and EfficientNet draw them (He et al. 2015, by the outputs)."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


class InflatedConvolution(nn.Conv3d):
    """A convolution of pictures made one of volumes; the slices at both ends are repeated instead of padded.

    Args:
        flat: the convolution of pictures.
        depth_stride: S along the depth, where `flat` has a stride.
    """

    def __init__(self, flat: nn.Conv2d, depth_stride: int) -> None:
        kernel, stride, padding = flat.kernel_size, flat.stride, cast(tuple[int, int], flat.padding)
        super().__init__(
            flat.in_channels,
            flat.out_channels,
            (kernel[0], kernel[0], kernel[1]),
            (depth_stride if stride[0] > 1 else 1, stride[0], stride[1]),
            (0, padding[0], padding[1]),
            groups=flat.groups,
            bias=flat.bias is not None,
        )
        self.repeated = padding[0]
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, K, D', H', W')."""
        if self.repeated:
            x = F.pad(x, (0, 0, 0, 0, self.repeated, self.repeated), mode="replicate")
        return super().forward(x)


def inflate(module: nn.Module, depth_stride: int) -> None:
    """Turn the layers of a network for pictures into layers for volumes, in place, with fresh weights.

    Args:
        module: of convolutions, batch normalisations, poolings, and what works on any number of axes.
        depth_stride: factor along the depth of all that has a stride.
    """
    for name, child in module.named_children():
        layer = _inflated(child, depth_stride)
        if layer is None:
            inflate(child, depth_stride)
        else:
            setattr(module, name, layer)


def _inflated(layer: nn.Module, depth_stride: int) -> nn.Module | None:
    """The layer for volumes; None for what is no layer of pictures."""
    match layer:
        case nn.Conv2d():
            return InflatedConvolution(layer, depth_stride)
        case nn.BatchNorm2d():
            return nn.BatchNorm3d(layer.num_features, eps=layer.eps, momentum=layer.momentum)
        case nn.MaxPool2d():
            if depth_stride == 1:
                return nn.MaxPool3d(_window(1, layer.kernel_size), _window(1, layer.stride), _window(0, layer.padding))
            return nn.MaxPool3d(cast(int, layer.kernel_size), cast(int, layer.stride), cast(int, layer.padding))
        case nn.AvgPool2d():
            return nn.AvgPool3d(_window(depth_stride, layer.kernel_size), _window(depth_stride, layer.stride))
        case nn.AdaptiveAvgPool2d():
            return nn.AdaptiveAvgPool3d(cast(int, layer.output_size))
        case _:
            return None


def _window(depth: int, flat: Any) -> tuple[int, int, int]:
    """A number for each axis of a volume; torchvision's pools have one for both axes of a picture."""
    return depth, int(flat), int(flat)


@torch.no_grad()
def load_backbone(backbone: Backbone, given: dict[str, Tensor]) -> list[str]:
    """Put weights into a backbone: as they are, inflated along the depth, and spread over other channels.

    A filter for pictures becomes one for volumes by repeating it along the depth, divided by the number of its slices.
    A first convolution over other channels gets, for each, the mean of the given channels' filters, times their number
    and divided by the new one: the sum of red, green and blue for one channel. So images with equal channels give the
    answers that they gave before.

    Args:
        backbone: changed in place.
        given: tensors under its own names.
    Returns:
        What was done to them, in words; empty if they fit as they are.
    Raises:
        MedsegError: E_MODEL if one is missing or does not fit.
    """
    notes: list[str] = []
    wrong: list[str] = []
    fitting: dict[str, Tensor] = {}
    for name, tensor in backbone.state_dict().items():
        value = given.get(name)
        if value is None:
            if not name.endswith("num_batches_tracked"):  # old files have none
                wrong.append(name)
            continue
        if value.ndim == 4 and tensor.ndim == 5:
            value = value.unsqueeze(2).expand(-1, -1, tensor.shape[2], -1, -1) / tensor.shape[2]
            if not any(note.startswith("inflated") for note in notes):
                notes.append("inflated along the depth")
        if value.ndim > 1 and value.shape[1] != tensor.shape[1] and not fitting:
            old, new = value.shape[1], tensor.shape[1]
            value = (value.float().mean(dim=1, keepdim=True) * (old / new)).expand(-1, new, *value.shape[2:])
            notes.append(f"the first convolution from {old} channels to {new}")
        if value.shape != tensor.shape:
            wrong.append(name)
        fitting[name] = value
    if wrong:
        raise MedsegError(
            Code.MODEL,
            "the weights do not fit the network",
            where="model.weights",
            expected=f"tensors for all of its {len(backbone.state_dict())}",
            got=f"missing, or of another shape: {', '.join(wrong[:4])}" + (" …" if len(wrong) > 4 else ""),
            remedy="give weights of this very network, or choose the network that they are of",
        )
    backbone.load_state_dict(fitting, strict=False)
    return notes
