"""The effective receptive field: which voxels of the image a voxel of the result really listens to, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.explain.maps import middle, watching
from medseg.explain.network import Network
from medseg.explain.tracing import evaluating

NEGLIGIBLE = 1 - 0.9545
"""Share of the strongest influence below which a voxel is not counted (Luo et al.: two standard deviations)."""


@dataclass(frozen=True, eq=False)
class EffectiveField:
    """What the voxel in the middle of a map listens to.

    Args:
        influence: mean size of the gradient, shape (*spatial) of the image, 1 at most.
        size: side of a square or cube with as many voxels as have more than `NEGLIGIBLE` influence.
        extent: voxels along each axis from the first to the last of them.
    """

    influence: Tensor
    size: float
    extent: tuple[int, ...]


def effective_field(model: Network, images: Tensor, *, layers: Sequence[str] = ("",)) -> dict[str, EffectiveField]:
    """Measure the influence of each voxel of the image on the middle of maps.

    The gradient that goes back is random over the channels of the map, so that none of them is left out. It is averaged
    over the images in size, not in sign.

    Args:
        model: on the device of the images; its mode stays what it was.
        images: shape (N, C, *spatial), as the network sees them: noise for fresh weights, scans for trained ones.
        layers: paths of the modules that make the maps; "" is the result.
    Raises:
        MedsegError: E_NAME for a module that is not there, E_MODEL for a size that does not fit.

    Source:
        Luo, Li, Urtasun, Zemel: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks,
        NeurIPS 2016, section 2 and 4.1 (what counts is above 1 − 95.45 %; there of the middle, here of the strongest).
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), torch.enable_grad():
        for image in torch.split(images, 1):
            source = image.clone().requires_grad_()
            with watching(model, layers) as maps:
                model(source)
            for name in layers:
                answer = middle(maps[name])
                weights = torch.randn(answer.shape, generator=generator).to(answer)
                (gradient,) = torch.autograd.grad(answer, source, weights, retain_graph=True)
                influence = gradient[0].abs().sum(dim=0)
                sums[name] = sums[name] + influence if name in sums else influence
    return {name: _field(total) for name, total in sums.items()}


def _field(total: Tensor) -> EffectiveField:
    strongest = float(total.max())
    influence = total / strongest if strongest > 0 else total
    listened = influence > NEGLIGIBLE
    extent = []
    for axis in range(total.dim()):
        others = [a for a in range(total.dim()) if a != axis]
        places = listened.any(dim=others).nonzero().flatten() if others else listened.nonzero().flatten()
        extent.append(int(places[-1] - places[0]) + 1 if len(places) else 0)
    return EffectiveField(influence.detach().cpu(), float(listened.sum()) ** (1 / total.dim()), tuple(extent))
