"""Augmentation, batched on the device in pure torch. One sampling grid serves image and label.

Probabilities and ranges follow nnU-Net where it has the transform. All random numbers come from one generator on the
CPU, seeded by (seed, step), so that a resumed run and a run on another device draw the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medseg.errors import Code, MedsegError

Range = tuple[float, float]


@dataclass(frozen=True)
class AugmentConfig:
    """What is varied, how often, and how far."""

    rotation_probability: float = 0.2
    """Share of samples that are rotated."""
    rotation_degrees: float | None = None
    """Largest angle about each axis; null: 30 in volumes (15 in-plane only where slices are thick), 180 in pictures."""
    scale_probability: float = 0.2
    """Share of samples that are scaled."""
    scale: Range = (0.7, 1.4)
    """Range of the zoom."""
    mirror_axes: tuple[int, ...] | None = None
    """Axes that are mirrored with probability ½ each; null: all in pictures, none in volumes (bodies have sides)."""
    noise_probability: float = 0.1
    """Share of samples that get Gaussian noise."""
    noise_variance: Range = (0.0, 0.1)
    """Range of the noise's variance, in units of the image's own."""
    brightness_probability: float = 0.15
    """Share of samples whose intensities are multiplied."""
    brightness: Range = (0.75, 1.25)
    """Range of the factor."""
    contrast_probability: float = 0.15
    """Share of samples whose contrast about the mean is changed."""
    contrast: Range = (0.75, 1.25)
    """Range of the factor."""
    gamma_probability: float = 0.3
    """Share of samples that get a gamma curve, mean and deviation kept."""
    gamma_inverted_probability: float = 0.1
    """Share of samples that get a gamma curve on the inverted image."""
    gamma: Range = (0.7, 1.5)
    """Range of the exponent."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("probability") and not 0 <= value <= 1:
                raise MedsegError(Code.CONFIG, "a probability lies between 0 and 1", where=f"augment.{name}", got=value)
            if isinstance(value, tuple) and name != "mirror_axes" and value[0] > value[1]:
                raise MedsegError(Code.CONFIG, "a range is (low, high)", where=f"augment.{name}", got=value)


class Augmenter:
    """Applies `AugmentConfig` to batches.

    Args:
        config: what is varied.
        spacing_mm: voxel size along the patch's axes: rotations are rigid in mm, not in voxels.
        is_picture: 2D pictures without orientation.
        seed: of everything that is drawn.
    """

    def __init__(self, config: AugmentConfig, *, spacing_mm: tuple[float, ...], is_picture: bool, seed: int) -> None:
        self.config = config
        self.spacing = torch.tensor(spacing_mm)
        self.seed = seed
        self.is_picture = is_picture
        dims = len(spacing_mm)
        self.in_plane_only = dims == 3 and max(spacing_mm) > 3 * min(spacing_mm)
        default_angle = 180.0 if is_picture else 15.0 if self.in_plane_only else 30.0
        self.angle = math.radians(config.rotation_degrees if config.rotation_degrees is not None else default_angle)
        self.mirror_axes = mirrored_axes(config, spatial_dims=dims, is_picture=is_picture)

    def __call__(self, image: torch.Tensor, label: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            image: float32 (N, C, *P), on the device.
            label: class indices (N, *P), on the same device.
            step: which batch this is.
        Returns:
            New tensors of the same shapes.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        image, label = self._spatial(image, label, generator)
        image = self._intensity(image, generator)
        return self._mirror(image, label, generator)

    def _spatial(
        self, image: torch.Tensor, label: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, dims = image.shape[0], image.ndim - 2
        rotate = _chosen(batch, self.config.rotation_probability, generator)
        scale = _chosen(batch, self.config.scale_probability, generator)
        angles = _uniform((batch, 3), (-self.angle, self.angle), generator) * rotate[:, None]
        if self.in_plane_only:
            thick = int(self.spacing.argmax())
            angles *= torch.arange(3) == thick  # angle i turns about axis i: nothing leaves its slice
        zoom = torch.where(scale, _uniform((batch,), self.config.scale, generator), 1.0)
        index = torch.nonzero(rotate | scale).flatten()
        if len(index) == 0:
            return image, label
        matrix = rotation_matrix(angles, dims)[index] / zoom[index, None, None]
        # grid_sample counts in half sizes of the patch and names axes last first: voxels -> mm -> rotate -> voxels.
        half_mm = torch.tensor(image.shape[2:]) * self.spacing / 2
        matrix = (matrix * half_mm / half_mm[:, None]).flip(1, 2)
        theta = torch.cat([matrix, torch.zeros(len(index), dims, 1)], dim=2).to(image.device)
        index = index.to(image.device)
        chosen = image[index]
        grid = F.affine_grid(theta, list(chosen.shape), align_corners=False)
        fill = "reflection" if self.is_picture else "zeros"
        image, label = image.clone(), label.clone()
        image[index] = F.grid_sample(chosen, grid, mode="bilinear", padding_mode=fill, align_corners=False)
        moved = F.grid_sample(
            label[index].unsqueeze(1).float(), grid, mode="nearest", padding_mode=fill, align_corners=False
        )
        label[index] = moved.squeeze(1).to(label.dtype)
        return image, label

    def _intensity(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        config, batch = self.config, image.shape[0]

        def factors(probability: float, span: Range) -> torch.Tensor:
            chosen = _chosen(batch, probability, generator)
            drawn = torch.where(chosen, _uniform((batch,), span, generator), 1.0)
            return drawn.view(batch, *(1,) * (image.ndim - 1)).to(image.device)

        noisy = _chosen(batch, config.noise_probability, generator)
        variance = _uniform((batch,), config.noise_variance, generator)
        for index in torch.nonzero(noisy).flatten().tolist():
            noise = torch.randn(image.shape[1:], generator=generator).to(image.device)
            image = image.index_add(
                0, torch.tensor([index], device=image.device), (noise * float(variance[index].sqrt()))[None]
            )
        image = image * factors(config.brightness_probability, config.brightness)
        image = _contrast(image, factors(config.contrast_probability, config.contrast))
        image = -_gamma(-image, factors(config.gamma_inverted_probability, config.gamma))
        return _gamma(image, factors(config.gamma_probability, config.gamma))

    def _mirror(
        self, image: torch.Tensor, label: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for axis in self.mirror_axes:
            chosen = _chosen(image.shape[0], 0.5, generator).to(image.device)
            wide = chosen.view(-1, *(1,) * (label.ndim - 1))
            image = torch.where(wide.unsqueeze(1), image.flip(axis + 2), image)
            label = torch.where(wide, label.flip(axis + 1), label)
        return image, label


def mirrored_axes(config: AugmentConfig, *, spatial_dims: int, is_picture: bool) -> tuple[int, ...]:
    """The axes that training mirrors: those that prediction may average over.

    Raises:
        MedsegError: E_CONFIG if the data have no such axis.
    """
    if config.mirror_axes is None:
        return tuple(range(spatial_dims)) if is_picture else ()
    if any(not 0 <= axis < spatial_dims for axis in config.mirror_axes):
        raise MedsegError(
            Code.CONFIG,
            f"the data have axes 0 to {spatial_dims - 1}",
            where="augment.mirror_axes",
            got=config.mirror_axes,
        )
    return config.mirror_axes


def rotation_matrix(angles: torch.Tensor, dims: int) -> torch.Tensor:
    """Rotations about the axes in turn: angles (N, 3) in radians → (N, dims, dims). In 2D the first angle counts."""
    cos, sin = angles.cos(), angles.sin()
    one, zero = torch.ones_like(cos[:, 0]), torch.zeros_like(cos[:, 0])

    def rows(*values: torch.Tensor) -> torch.Tensor:
        size = math.isqrt(len(values))
        return torch.stack(values, dim=1).view(-1, size, size)

    if dims == 2:
        return rows(cos[:, 0], -sin[:, 0], sin[:, 0], cos[:, 0])
    first = rows(one, zero, zero, zero, cos[:, 0], -sin[:, 0], zero, sin[:, 0], cos[:, 0])
    second = rows(cos[:, 1], zero, sin[:, 1], zero, one, zero, -sin[:, 1], zero, cos[:, 1])
    third = rows(cos[:, 2], -sin[:, 2], zero, sin[:, 2], cos[:, 2], zero, zero, zero, one)
    return first @ second @ third


def _chosen(batch: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(batch, generator=generator) < probability


def _uniform(shape: tuple[int, ...], span: Range, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (span[1] - span[0]) + span[0]


def _spatial_axes(image: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, image.ndim))


def _contrast(image: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Stretch about each channel's mean; the range of values is kept."""
    axes = _spatial_axes(image)
    mean = image.mean(axes, keepdim=True)
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    stretched = ((image - mean) * factor + mean).clamp(low, high)
    return torch.where(factor == 1, image, stretched)


def _gamma(image: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """A gamma curve over each channel's range; its mean and deviation are kept."""
    if bool((exponent == 1).all()):
        return image
    axes = _spatial_axes(image)
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    span = (high - low).clamp(min=1e-7)
    curved = ((image - low) / span).pow(exponent) * span + low
    std, mean = torch.std_mean(image, axes, keepdim=True)
    new_std, new_mean = torch.std_mean(curved, axes, keepdim=True)
    kept = (curved - new_mean) / new_std.clamp(min=1e-7) * std + mean
    return torch.where(exponent == 1, image, kept)
