"""What most excites a filter: an image that is changed, step by step, so that the filter answers more strongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.explain.maps import map_of, middle
from medseg.explain.network import Network
from medseg.explain.tracing import evaluating

STEPS = 32
STEP_SIZE = 0.1
"""Change of a voxel in a step, root mean square, in the units of the network's input (standard deviations)."""
LARGEST = 3.0
"""Values stay within this: beyond it scans have next to no voxels."""
START = 0.1
"""Standard deviation of the noise that it begins with."""


@dataclass(frozen=True, eq=False)
class Excitation:
    """Images that excite filters.

    Args:
        images: shape (filters, C, *spatial), one for each filter.
        before: answers of the filters to the noise at the beginning.
        after: answers to the images.
    """

    images: Tensor
    before: tuple[float, ...]
    after: tuple[float, ...]


def most_exciting(
    model: Network,
    layer: str,
    channels: Sequence[int],
    size: Sequence[int],
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Excitation:
    """Find, for filters of a layer, an image to which their voxel in the middle answers strongly (gradient ascent).

    Args:
        model: its mode stays what it was.
        layer: path of the module.
        channels: numbers of its maps.
        size: of the images; somewhat larger than the layer's receptive field, and one that fits the model.
        steps: changes of the images.
        seed: of the noise at the beginning.
        progress: called after each step.
    Raises:
        MedsegError: E_NAME, E_MODEL.

    Source:
        Erhan, Bengio, Courville, Vincent: Visualizing Higher-Layer Features of a Deep Network, University of Montreal
        TR 1341, 2009, section 4. Gradients are divided by their root mean square, so that all filters take equal steps.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((1, model.in_channels, *size), generator=generator) * START
    images = start.to(device).repeat(len(channels), *[1] * (start.dim() - 1))
    numbers = torch.tensor(list(channels), device=device)
    answers: list[Tensor] = []
    with evaluating(model), torch.enable_grad():
        for step in range(steps + 1):
            images.requires_grad_()
            answer = middle(map_of(model, images, layer))[torch.arange(len(numbers), device=device), numbers]
            answers = [answers[0] if answers else answer.detach(), answer.detach()]
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(answer.sum(), images)
            axes = tuple(range(1, gradient.dim()))
            strength = gradient.square().mean(dim=axes, keepdim=True).sqrt().clamp_min(1e-12)
            images = (images.detach() + STEP_SIZE * gradient / strength).clamp(-LARGEST, LARGEST)
            if progress is not None:
                progress()
    return Excitation(images.detach().cpu(), tuple(answers[0].tolist()), tuple(answers[1].tolist()))
