"""Intensities: noise, blur, brightness, contrast, low resolution and gamma, only where they are chosen.

Shapes: R rows, one per channel of a sample; P the patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medseg.data.augment.config import AugmentConfig
from medseg.data.augment.draws import Draws

Change = Callable[[torch.Tensor, torch.Tensor], None]
"""Changes rows (R, *P) in place; the second tensor (R, …) holds one set of parameters for each."""
TINY = 1e-7
"""Smallest range or deviation that is divided by."""


def vary(
    image: torch.Tensor, config: AugmentConfig, draws: Draws, thick_axis: int | None, indices: range | None = None
) -> None:
    """Vary the intensities of a batch, in nnU-Net's order.

    Args:
        image: float32 (N, C, *P), contiguous; is changed in place.
        config: how often and how far.
        draws: of the step, after the moves.
        thick_axis: the axis along which slices are thick: low resolution leaves it alone.
        indices: which samples of the whole batch these are; None: all.
    """
    indices = range(image.shape[0]) if indices is None else indices
    size = (indices.stop, image.shape[1])  # all are drawn, whoever has them
    batch, dims = (size[0],), image.ndim - 2

    def rows(per_sample: torch.Tensor) -> torch.Tensor:
        return per_sample[:, None].expand(size)

    noisy = rows(draws.chosen(batch, config.noise_probability))
    noise = rows(draws.uniform(batch, config.noise))
    noise_seed = draws.seed()
    blurred = rows(draws.chosen(batch, config.blur_probability)) & draws.chosen(size, config.channel_probability)
    sigma = draws.uniform((*size, dims), config.blur)
    brighter = rows(draws.chosen(batch, config.brightness_probability))
    brightness = draws.factor(size, config.brightness)
    stretched = rows(draws.chosen(batch, config.contrast_probability))
    contrast = draws.factor(size, config.contrast)
    coarse = rows(draws.chosen(batch, config.low_resolution_probability))
    coarse = coarse & draws.chosen(size, config.channel_probability)
    resolution = draws.uniform(size, config.low_resolution)
    inverted = rows(draws.chosen(batch, config.gamma_inverted_probability))
    inverted_gamma = draws.factor(size, config.gamma)
    curved = rows(draws.chosen(batch, config.gamma_probability))
    gamma = draws.factor(size, config.gamma)

    single = torch.stack([noise, brightness, contrast, inverted_gamma, gamma], dim=2)
    own = slice(indices.start, None, indices.step)
    table = upload(torch.cat([single, sigma], dim=2)[own].flatten(0, 1), image.device)
    x, resolution = image.flatten(0, 1), resolution[own]
    choices = (noisy, blurred, brighter, stretched, coarse, inverted, curved)
    noisy, blurred, brighter, stretched, coarse, inverted, curved = (chosen[own] for chosen in choices)
    _change(x, noisy, table[:, 0], lambda r, p: add_noise(r, p, noise_seed + indices.start))
    radius = max(1, math.ceil(3 * config.blur[1]))
    _change(x, blurred, table[:, 5:], lambda r, p: blur(r, p, radius))
    _change(x, brighter, table[:, 1], brighten)
    _change(x, stretched, table[:, 2], stretch)
    for row, is_coarse, share in zip(x, coarse.flatten().tolist(), resolution.flatten().tolist(), strict=True):
        if is_coarse:
            make_coarse(row, share, thick_axis)
    _change(x, inverted, table[:, 3], lambda r, p: curve(r, p, inverted=True))
    _change(x, curved, table[:, 4], lambda r, p: curve(r, p, inverted=False))


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small table on the device, without waiting for it."""
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def add_noise(rows: torch.Tensor, sigma: torch.Tensor, seed: int) -> None:
    """Gaussian noise. Its voxels are drawn on the device: on the CPU they would take longer than all the rest."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device)
    rows.addcmul_(noise, _beside(sigma, rows))


def blur(rows: torch.Tensor, sigma: torch.Tensor, radius: int) -> None:
    """A Gaussian along each axis, its kernel cut off at `radius` voxels; reflected at the border.

    Args:
        rows: (R, *P).
        sigma: (R, n), in voxels.
        radius: voxels to either side.
    """
    # Shifted copies, weighted and added: a convolution with one channel took ten times as long on a CPU.
    steps = torch.arange(radius + 1, device=rows.device)
    kernels = torch.exp(-0.5 * (steps / sigma[..., None]) ** 2)
    kernels = kernels / (2 * kernels.sum(-1, keepdim=True) - kernels[..., :1])
    result = rows
    for axis in range(1, rows.ndim):
        length = rows.shape[axis]
        source = result.index_select(axis, _reflected(length, radius, rows.device))
        result = source.narrow(axis, radius, length) * _beside(kernels[:, axis - 1, 0], rows)
        for step in range(1, radius + 1):
            weight = _beside(kernels[:, axis - 1, step], rows)
            result.addcmul_(source.narrow(axis, radius - step, length), weight)
            result.addcmul_(source.narrow(axis, radius + step, length), weight)
    rows.copy_(result)


def brighten(rows: torch.Tensor, factor: torch.Tensor) -> None:
    """All intensities times a factor."""
    rows.mul_(_beside(factor, rows))


def stretch(rows: torch.Tensor, factor: torch.Tensor) -> None:
    """Contrast about each row's mean; its range of values is kept."""
    axes = tuple(range(1, rows.ndim))
    low, high = rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    factor, mean = _beside(factor, rows), rows.mean(axes, keepdim=True)
    rows.mul_(factor).add_(mean * (1 - factor)).clamp_(low, high)


def make_coarse(row: torch.Tensor, share: float, thick_axis: int | None) -> None:
    """A scan of lower resolution: the nearest voxels of a coarser grid, interpolated linearly to the old one.

    Args:
        row: (*P).
        share: size of the coarser grid.
        thick_axis: stays as it is.
    """
    shape = tuple(row.shape)
    size = tuple(n if axis == thick_axis else max(1, round(n * share)) for axis, n in enumerate(shape))
    coarse = F.interpolate(row[None, None], size, mode="nearest-exact")
    row.copy_(F.interpolate(coarse, shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0, 0])


def curve(rows: torch.Tensor, exponent: torch.Tensor, *, inverted: bool) -> None:
    """A gamma curve over each row's range, or over the range of its negative; mean and deviation are kept."""
    axes = tuple(range(1, rows.ndim))
    mean = rows.mean(axes, keepdim=True)
    rows.sub_(mean)
    if inverted:
        rows.neg_()
    low, high = rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    deviation = _root_mean_square(rows)
    rows.sub_(low).div_((high - low).clamp_(min=TINY)).pow_(_beside(exponent, rows))
    rows.sub_(rows.mean(axes, keepdim=True))
    scale = deviation / _root_mean_square(rows).clamp_(min=TINY)
    rows.mul_(-scale if inverted else scale).add_(mean)


def _change(x: torch.Tensor, chosen: torch.Tensor, parameters: torch.Tensor, change: Change) -> None:
    """Change the chosen rows of x (R, *P) in place; neighbours are a view, others are gathered and put back."""
    index = torch.nonzero(chosen.flatten()).flatten().tolist()
    if not index:
        return
    first, last = index[0], index[-1] + 1
    if last - first == len(index):
        change(x[first:last], parameters[first:last])
        return
    part = torch.stack([x[i] for i in index])
    change(part, torch.stack([parameters[i] for i in index]))
    for i, row in zip(index, part, strict=True):
        x[i].copy_(row)


def _beside(per_row: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Values (R,) in the shape that broadcasts over rows (R, *P)."""
    return per_row.view(-1, *(1,) * (rows.ndim - 1))


def _root_mean_square(rows: torch.Tensor) -> torch.Tensor:
    """Of each row. Norms of parts, then of these: quicker than `std`, and as exact once the mean is taken off."""
    norms = torch.linalg.vector_norm(rows.flatten(2) if rows.ndim > 2 else rows[..., None], dim=2)
    norm = torch.linalg.vector_norm(norms, dim=1)
    return _beside(norm / math.sqrt(rows[0].numel()), rows)


def _reflected(length: int, radius: int, device: torch.device) -> torch.Tensor:
    """Indices -radius … length + radius - 1, folded at the border voxels."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(-radius, length + radius, device=device).abs_() % period
    return torch.where(index >= length, period - index, index)
