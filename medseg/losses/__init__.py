"""Losses, one per file. Each takes logits (N, C, *S) and class indices (N, *S) and returns a scalar in float32."""

from torch import nn

from medseg.registry import Registry

LOSSES: Registry[nn.Module] = Registry("loss", "medseg.losses")
"""Losses by name. Constructor: `Loss(config)`."""
