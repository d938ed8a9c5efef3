"""Why a network sees a class where it does: gradient, occlusion and Grad-CAM, for segmentation and classification.

What is explained is one number: the mean score (logit) of a class over the voxels that the network gives to it. The
scores of a classifier stand for the whole image: they are taken as a map of one place (`network.scores_of`), and the
voxels to explain are `torch.ones(1, dtype=torch.bool)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.explain.maps import watching
from medseg.explain.network import Network, scores_of
from medseg.explain.tracing import evaluating


def answered(logits: Tensor, output: int, *, overlapping: bool = False) -> Tensor:
    """The voxels that a network gives to a class.

    Args:
        logits: shape (K, *spatial).
        output: number of the class.
        overlapping: the outputs are regions, each with a probability of its own.
    Returns:
        bool, shape (*spatial).
    """
    return logits[output] > 0 if overlapping else logits.argmax(dim=0) == output


def gradient_saliency(model: Network, image: Tensor, output: int, voxels: Tensor) -> Tensor:
    """How much the class's score changes with each voxel of the image: the largest size of the gradient over channels.

    Args:
        model: on the device of the image; its mode stays what it was.
        image: shape (C, *spatial).
        output: number of the class.
        voxels: bool, shape (*spatial) of the result: where the class is explained.
    Returns:
        Shape (*spatial) of the image.
    Raises:
        MedsegError: E_MODEL where there is nothing to explain.

    Source:
        Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, ICLR workshop 2014, section 3.
    """
    with evaluating(model), torch.enable_grad():
        source = image[None].clone().requires_grad_()
        score = _score(scores_of(model, source), output, voxels).sum()
        (gradient,) = torch.autograd.grad(score, source)
    return gradient[0].abs().amax(dim=0)


@torch.no_grad()
def occlusion_saliency(
    model: Network,
    image: Tensor,
    output: int,
    voxels: Tensor,
    *,
    window: Sequence[int],
    step: Sequence[int],
    within: Sequence[slice] | None = None,
    fill: float | None = None,
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """How much the class's score falls when a window of the image is covered, for each voxel the mean over windows.

    Args:
        model: on the device of the image; its mode stays what it was.
        image: shape (C, *spatial).
        output: number of the class.
        voxels: bool, shape (*spatial) of the result: where the class is explained.
        window: size of what is covered.
        step: distance of the windows.
        within: the part of the image that windows begin in; None is all of it.
        fill: value that covers; None is the mean of each channel.
        batch_size: windows at a time.
        progress: called with the number of windows that are done.
    Returns:
        Shape (*spatial) of the image; NaN where no window lay.
    Raises:
        MedsegError: E_MODEL where there is nothing to explain.

    Source:
        Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014, section 4.2.
    """
    shape = image.shape[1:]
    parts = within or [slice(0, n) for n in shape]
    starts = list(
        itertools.product(*(range(*part.indices(n)[:2], s) for part, n, s in zip(parts, shape, step, strict=True)))
    )
    cover = image.flatten(1).mean(dim=1) if fill is None else image.new_full((len(image),), fill)
    total, count = torch.zeros(shape, device=image.device), torch.zeros(shape, device=image.device)
    with evaluating(model):
        before = _score(scores_of(model, image[None]), output, voxels)
        for begin in range(0, len(starts), batch_size):
            boxes = [
                tuple(slice(a, a + w) for a, w in zip(start, window, strict=True))
                for start in starts[begin : begin + batch_size]
            ]
            covered = image.expand(len(boxes), *image.shape).clone()
            for one, box in zip(covered, boxes, strict=True):
                one[(slice(None), *box)] = cover.view(-1, *[1] * len(shape))
            falls = before - _score(scores_of(model, covered), output, voxels)
            for fall, box in zip(falls, boxes, strict=True):
                total[box] += fall
                count[box] += 1
            if progress is not None:
                progress(len(boxes))
    return torch.where(count > 0, total / count, torch.nan)


def grad_cam(model: Network, image: Tensor, output: int, voxels: Tensor, layer: str) -> Tensor:
    """Where the maps of a layer speak for the class: their sum, weighted with the mean of the score's gradient.

    Instance normalisation takes the mean out of the gradient, so that in networks with it the weights of deeper layers
    are next to nothing but noise: look at the last stage before the scores there, or use occlusion.

    Args:
        model: on the device of the image; its mode stays what it was.
        image: shape (C, *spatial).
        output: number of the class.
        voxels: bool, shape (*spatial) of the result: where the class is explained.
        layer: path of the module whose maps are weighted; `map_places` finds the one before the scores.
    Returns:
        Shape (*spatial) of the image, at least 0. The maps are stretched over it: exact where the network pads.
    Raises:
        MedsegError: E_MODEL where there is nothing to explain; E_NAME for the layer.

    Source:
        Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2; the score of a set of voxels as in Vinogradova,
        Dibrov, Myers: Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation Mapping,
        AAAI 2020, equation 1.
    """
    with evaluating(model), torch.enable_grad():
        source = image[None].clone().requires_grad_()  # so that layers without weights have a gradient too
        with watching(model, (layer,)) as maps:
            logits = scores_of(model, source)
        score = _score(logits, output, voxels).sum()
        (gradient,) = torch.autograd.grad(score, maps[layer])
    weights = gradient.mean(dim=tuple(range(2, gradient.dim())), keepdim=True)
    cam = (weights * maps[layer].detach()).sum(dim=1, keepdim=True).relu()
    mode = "bilinear" if image.dim() == 3 else "trilinear"
    return F.interpolate(cam, size=image.shape[1:], mode=mode)[0, 0]


def _score(logits: Tensor, output: int, voxels: Tensor) -> Tensor:
    """The mean score of a class over some voxels, shape (N,)."""
    if not bool(voxels.any()):
        raise MedsegError(
            Code.MODEL,
            "the network gives no voxel to this class here: there is nothing to explain",
            where="class",
            remedy="take another class, or another place of the image",
        )
    return logits[:, output][:, voxels].mean(dim=1)
