"""Networks for segmentation: one file per architecture, built by name.

`MODELS.build({"name": "unet", ...}, in_channels=1, num_classes=3, spatial_dims=3)`
"""

from medseg.models.contract import MODELS, SegmentationModel

__all__ = ["MODELS", "SegmentationModel"]
