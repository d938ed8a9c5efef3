"""torchvision's classifiers, in 2D and inflated to 3D: `model=resnet18 model.weights=imagenet`."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.backbones import DEPTH_STRIDES, TORCHVISION, Network, make_torchvision_backbone
from medseg.models.classifiers.backbone_classifier import BackboneClassifier
from medseg.models.classifiers.contract import CLASSIFIERS
from medseg.models.classifiers.head import ClassificationHead


@dataclass(frozen=True)
class TorchvisionConfig:
    """Settings of a network of torchvision."""

    network: Network = "resnet18"
    """resnet18, resnet34, resnet50, densenet121, efficientnet_b0."""
    weights: str | None = None
    """Where training begins: imagenet (torchvision's weights, from its cache), a safetensors or .pth file, a run of
    medseg with the same network, or its bundle; null: fresh weights. Nothing is downloaded."""
    frozen_stages: int = 0
    """How many of the five stages, from the image on, keep their weights and the statistics of their normalisations."""
    keep_statistics: bool = False
    """Whether all batch normalisations keep the statistics that come with the weights, for batches of a few images."""
    dropout: float = 0.2
    """Probability of dropping a number before the scores."""
    depth_strides: tuple[int, int, int, int, int] = DEPTH_STRIDES
    """In 3D, the factor along the depth at each of the five steps down: 2, or 1 for volumes of few slices."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise MedsegError(
                Code.CONFIG, "not a probability", where="model.dropout", expected="0 <= p < 1", got=self.dropout
            )


@CLASSIFIERS.register("torchvision", TorchvisionConfig)
class TorchvisionClassifier(BackboneClassifier):
    """ResNet, DenseNet or EfficientNet with a head for other classes, for any number of channels, in 2D and 3D.

    The head is the mean of each of the last maps, dropout, and a fully connected layer.

    Args:
        config: the network and its settings.
        in_channels: channels of the images.
        num_classes: classes; each image has one.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG if the settings do not fit each other.

    Source:
        See `medseg.models.backbones`.
    """

    def __init__(self, config: TorchvisionConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        backbone = make_torchvision_backbone(
            config.network, in_channels=in_channels, spatial_dims=spatial_dims, depth_strides=config.depth_strides
        )
        backbone.keeps_statistics = config.keep_statistics
        super().__init__(
            backbone,
            ClassificationHead(TORCHVISION[config.network].widths[-1], num_classes, dropout=config.dropout),
            in_channels=in_channels,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
            frozen_stages=config.frozen_stages,
        )
