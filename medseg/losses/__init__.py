"""Losses, one per file. Each takes logits (N, C, *S) and class indices (N, *S) and returns a scalar in float32.

`medseg.losses.choice.build_loss` makes the one that fits the labels. Ratios of sums over the batch take these
through `medseg.losses.processes.summed`: a batch may be shared by several processes.
"""

from torch import nn

from medseg.registry import Registry

LOSSES: Registry[nn.Module] = Registry("loss", "medseg.losses")
"""Losses by name. Constructor: `Loss(config)`, or `Loss(config, *, labels)` of one that knows
voxels that are ignored (`medseg.labels.Labels`); one for regions has an attribute `takes_regions`."""
