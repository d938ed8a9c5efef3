"""A classifier turned into a segmenter: `model=fcn model.classifier=RUN model.output_stride=8`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.models.blocks.dimensions import layers
from medseg.models.blocks.resample import Interpolation
from medseg.models.classifiers import CLASSIFIERS
from medseg.models.classifiers.backbone_classifier import BackboneClassifier
from medseg.models.classifiers.head import ClassificationHead
from medseg.models.contract import MODELS, SegmentationModel
from medseg.models.freezing import Freezable
from medseg.models.sizes import check_multiples

DEFAULT_CLASSIFIER: Mapping[str, Any] = {
    "name": "cnn",
    "widths": [32, 64, 128, 256, 256],
    "head": "flatten",
    "hidden": [256, 256],
    "image_size": 96,
}
"""A small VGG of five poolings, whose first fully connected layer sees 3 places along each axis."""


@dataclass(frozen=True)
class FCNConfig:
    """Settings of the fully convolutional network."""

    classifier: str | dict[str, Any] | None = None
    """The classifier that it is made of: a run of medseg train task=classification or its bundle, whose weights it
    begins with; or its settings, such as {name: torchvision, network: resnet50}; null: a small VGG, fresh."""
    output_stride: int = 8
    """Voxels between the places that are scored, a power of 2: FCN-32s, FCN-16s, FCN-8s. Below the classifier's own,
    scores of its earlier maps are added."""
    weights: str | None = None
    """Where the convolutions of a classifier that is given by its settings begin: imagenet, a file, or a run; null:
    fresh weights."""
    frozen_stages: int = 0
    """How many of the classifier's stages, from the image on, keep their weights and the statistics of their
    normalisations."""

    def __post_init__(self) -> None:
        inside = self.classifier if isinstance(self.classifier, dict) else {}
        for key in (key for key in ("weights", "frozen_stages") if inside.get(key)):
            raise MedsegError(
                Code.CONFIG,
                "this belongs to the whole network",
                where=f"model.classifier.{key}",
                got=inside[key],
                remedy=f"state it as model.{key}",
            )


class WindowConvolution(nn.Module):
    """A convolution with filters of any size, also even ones, that keeps the size of the map.

    The first place whose window lies inside the map wholly is (F − 1) // 2 along each axis.

    Args:
        in_channels: C.
        out_channels: K.
        window: F per axis.
    """

    def __init__(self, in_channels: int, out_channels: int, window: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution = layers(len(window)).convolution(in_channels, out_channels, window)
        self.padding = [p for f in reversed(window) for p in ((f - 1) // 2, f // 2)]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial)."""
        result: Tensor = self.convolution(F.pad(x, self.padding) if any(self.padding) else x)
        return result


@MODELS.register("fcn", FCNConfig)
class FCN(Freezable, SegmentationModel):
    """A classifier whose fully connected layers are convolutions, so that it gives scores at every place.

    A fully connected layer over the places of a map is a convolution with filters of the map's size, and further ones
    are convolutions with filters of size 1: at the place whose window is the map, the scores are the classifier's.
    Where the classifier takes the mean of each map (ResNet), each place is scored by itself, and the mean of the scores
    is the classifier's. Earlier maps are scored as well (`output_stride`), and scores of different resolutions are
    added; the coarser ones are up-sampled by transposed convolutions that begin as linear interpolation. Up to the
    image's resolution the interpolation is fixed.

    Args:
        config: the settings, with a classifier that is no run any more (`medseg.training.pretrained`).
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, sections 3.1 to
        3.3 and 4.1 to 4.2: scores of earlier maps begin with weights of zero. They pad the image by 100 pixels and crop
        the scores; here the convolutions are padded, as the rest of the classifier is. Their up-sampling filters go
        from any class to any other; here each class has its own.
    """

    def __init__(self, config: FCNConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
        if isinstance(config.classifier, str):
            raise MedsegError(
                Code.CONFIG,
                "the settings of the network name a run",
                where="model.classifier",
                expected="the settings of a classifier",
                got=config.classifier,
            )
        classifier = CLASSIFIERS.build(
            config.classifier or DEFAULT_CLASSIFIER,
            in_channels=in_channels,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
        )
        if not isinstance(classifier, BackboneClassifier):
            raise MedsegError(
                Code.MODEL,
                "this classifier is no backbone with a head, and cannot be made fully convolutional",
                where="model.classifier",
                got=type(classifier).__name__,
            )
        self.backbone = classifier.backbone
        factors = self.backbone.factors
        self.scored = _scored_stages(factors, config.output_stride)
        head = classifier.head
        windows = [head.window or (1,) * spatial_dims] + [(1,) * spatial_dims] * len(head.hidden)
        widths = [head.in_channels] + [cast(nn.Linear, layer).out_features for layer in head.hidden]
        convolutions = [
            WindowConvolution(c, k, f) for c, k, f in zip(widths, (*widths[1:], num_classes), windows, strict=True)
        ]
        self.layers = nn.ModuleList(convolutions[:-1])
        self.dropout = nn.Dropout(head.dropout.p)
        earlier = [
            WindowConvolution(self.backbone.widths[i], num_classes, (1,) * spatial_dims) for i in self.scored[1:]
        ]
        for layer in earlier:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.heads = nn.ModuleList([convolutions[-1], *earlier])
        self.up = nn.ModuleList(
            LinearUp(num_classes, tuple(a // b for a, b in zip(factors[i], factors[j], strict=True)))
            for i, j in zip(self.scored, self.scored[1:], strict=False)
        )
        self.interpolation = Interpolation(num_classes, factors[self.scored[-1]])
        self._load_head(head)
        if config.frozen_stages:
            self.freeze(config.frozen_stages)

    @property
    def stages(self) -> Sequence[tuple[str, nn.Module]]:
        """stage_0, stage_1, … of the classifier, then what stands for its fully connected layers, and the scores."""
        stages = [(f"stage_{i}", stage) for i, stage in enumerate(self.backbone.stages)]
        return [*stages, ("layers", self.layers), ("heads", nn.ModuleList([self.heads, self.up]))]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores; see `SegmentationModel.forward`."""
        if not torch.compiler.is_compiling():
            self.output_size(tuple(x.shape[2:]))
        maps = self.backbone(x)
        scores = self._coarse(maps[-1])
        for i, head, up in zip(self.scored[1:], list(self.heads)[1:], self.up, strict=True):
            scores = up(scores) + head(maps[i])
        result: Tensor = self.interpolation(scores)
        return result

    def coarse_scores(self, x: Tensor) -> Tensor:
        """The scores of the last map's places, before anything is up-sampled.

        Args:
            x: shape (N, in_channels, *spatial), of a size that fits.
        Returns:
            Shape (N, num_classes, *spatial / stride of the classifier).
        """
        return self._coarse(self.backbone(x)[-1])

    def _coarse(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        if not self.layers:
            x = self.dropout(x)
        scores: Tensor = self.heads[0](x)
        return scores

    @property
    def divisor(self) -> tuple[int, ...]:
        """The product of the classifier's strides, per axis."""
        return self.backbone.factors[-1]

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the input; see `SegmentationModel.output_size`."""
        check_multiples(input_size, self.divisor, fewest_voxels=2)
        return tuple(input_size)

    def load_classifier(self, tensors: Mapping[str, Tensor], *, with_scores: bool = True) -> None:
        """Put the fully connected layers of a trained classifier into the convolutions that stand for them; those
        before them are the backbone's (`load_backbone`).

        Args:
            tensors: a classifier's state dict; of it what begins with "head.".
            with_scores: also its last layer, which must have as many classes.
        Raises:
            MedsegError: E_MODEL if a layer is missing or has another size.
        """
        names = [f"head.hidden.{i}" for i in range(len(self.layers))] + ["head.scores"] * with_scores
        for layer, name in zip([*self.layers, self.heads[0]], names, strict=False):
            convolution = cast(nn.Module, layer.convolution)
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            own = cast(Tensor, convolution.weight)
            if weight is None or bias is None or weight.numel() != own.numel() or len(weight) != len(own):
                raise MedsegError(
                    Code.MODEL,
                    "the weights of the classifier do not fit the network made of it",
                    where="model.classifier",
                    expected=f"{name} with {own.numel()} weights",
                    got="none" if weight is None else f"shape {tuple(weight.shape)}",
                )
            with torch.no_grad():
                own.copy_(weight.reshape(own.shape))
                cast(Tensor, convolution.bias).copy_(bias)

    def _load_head(self, head: ClassificationHead) -> None:
        """The fresh layers of the classifier, drawn as it does."""
        self.load_classifier({f"head.{name}": tensor for name, tensor in head.state_dict().items()})


class LinearUp(nn.Module):
    """A transposed convolution of each channel that begins as linear interpolation.

    Args:
        channels: C = K.
        stride: S per axis.

    Source:
        Long et al. 2015, section 3.3; filters of 2S − S mod 2 voxels.
    """

    def __init__(self, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        kernel = tuple(2 * s - s % 2 for s in stride)
        padding = tuple(math.ceil((s - 1) / 2) for s in stride)
        self.convolution = layers(len(stride)).transposed_convolution(
            channels, channels, kernel, stride, padding, groups=channels, bias=False
        )
        weight = torch.ones(())
        for s, k in zip(stride, kernel, strict=True):
            places = torch.arange(k, dtype=torch.float32)
            weight = weight.unsqueeze(-1) * (1 - (places - (k - 1) / 2).abs() / s)
        with torch.no_grad():
            cast(Tensor, self.convolution.weight).copy_(weight.expand_as(cast(Tensor, self.convolution.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, C, *spatial · S)."""
        result: Tensor = self.convolution(x)
        return result


def _scored_stages(factors: Sequence[tuple[int, ...]], output_stride: int) -> list[int]:
    """The stages whose maps are scored, the last one first.

    Args:
        factors: voxels of the image to one of each stage's map, per axis.
        output_stride: of the earliest map that is scored, along the axes that are halved most.
    Raises:
        MedsegError: E_CONFIG if no map has it.
    """
    strides = [max(factor) for factor in factors]
    if output_stride not in strides:
        raise MedsegError(
            Code.CONFIG,
            "the classifier has no map of this stride",
            where="model.output_stride",
            expected=" or ".join(str(s) for s in strides),
            got=output_stride,
        )
    return list(reversed(range(strides.index(output_stride), len(strides))))
