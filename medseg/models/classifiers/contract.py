"""What every classifier promises, and the registry of classifiers.

Their YAML files stand beside those of the segmenters, `configs/model/NAME.yaml`; the defaults that a file starts from
say which it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medseg.models.freezing import Freezable
from medseg.registry import Registry


class ClassificationModel(Freezable):
    """A network from images to class scores. Built as `Model(config, *, in_channels, num_classes, spatial_dims)`.

    A field `image_size` of its configuration that is null is filled in with the size of the images before it is built
    (fully connected layers over places need it); a field `weights` says where training begins, and is null in a
    bundle (`medseg.training.pretrained`).
    """

    in_channels: int
    """Channels of the images."""
    num_classes: int
    """Classes; each image has one."""
    spatial_dims: int
    """2 or 3."""

    @property
    def stages(self) -> Sequence[tuple[str, nn.Module]]:
        """Its parts by name, from the image to the scores; the last is the head. Freezing and fine-tuning count in
        them."""
        raise NotImplementedError

    @property
    def last_maps(self) -> nn.Module:
        """The part whose feature maps stand for places of the image for the last time: what Grad-CAM looks at."""
        raise NotImplementedError

    @property
    def smallest_size(self) -> tuple[int, ...]:
        """The fewest voxels along each axis that it takes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (logits).

        Args:
            x: shape (N, in_channels, *spatial).
        Returns:
            Shape (N, num_classes).
        """
        raise NotImplementedError


CLASSIFIERS: Registry[ClassificationModel] = Registry("model", "medseg.models.classifiers")
"""All classifiers by name."""
