"""A backbone with a head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medseg.models.backbones import Backbone
from medseg.models.classifiers.contract import ClassificationModel
from medseg.models.classifiers.head import ClassificationHead


class BackboneClassifier(ClassificationModel):
    """A classifier of a backbone's last map.

    Args:
        backbone: image → maps.
        head: last map → scores.
        in_channels: channels of the images.
        num_classes: classes; each image has one.
        spatial_dims: 2 or 3.
        frozen_stages: stages of the backbone that keep what they are.
    Raises:
        MedsegError: E_CONFIG for more frozen stages than there are.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ClassificationHead,
        *,
        in_channels: int,
        num_classes: int,
        spatial_dims: int,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
        self.backbone = backbone
        self.head = head
        if frozen_stages:
            self.freeze(frozen_stages)

    @property
    def stages(self) -> Sequence[tuple[str, nn.Module]]:
        """stage_0, stage_1, … of the backbone, and the head."""
        return [(f"stage_{i}", stage) for i, stage in enumerate(self.backbone.stages)] + [("head", self.head)]

    @property
    def last_maps(self) -> nn.Module:
        """The backbone's last stage."""
        return self.backbone.stages[-1]

    @property
    def smallest_size(self) -> tuple[int, ...]:
        """One voxel of the last map."""
        return self.backbone.factors[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores; see `ClassificationModel.forward`."""
        scores: Tensor = self.head(self.backbone(x)[-1])
        return scores
