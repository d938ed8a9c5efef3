"""Augmentation, batched on the device in pure torch. One sampling grid serves image and label.

nnU-Net's list, order, probabilities and ranges. What is chosen, how far and where is drawn on the CPU from one
generator seeded by (seed, step): a resumed run draws the same, and the device is never waited for.
"""

from medseg.data.augment.augmenter import Augmenter
from medseg.data.augment.config import AugmentConfig
from medseg.data.augment.sides import Mirroring, mirrored_axes, side_lines, swapped_classes

__all__ = ["AugmentConfig", "Augmenter", "Mirroring", "mirrored_axes", "side_lines", "swapped_classes"]
