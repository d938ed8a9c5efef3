"""What is varied, how often, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg.errors import Code, MedsegError

Range = tuple[float, float]


@dataclass(frozen=True)
class AugmentConfig:
    """What is varied, how often, and how far. The defaults are nnU-Net's, but for turning and mirroring of bodies."""

    rotation_probability: float = 0.2
    """Share of samples that are rotated."""
    rotation_degrees: float | None = None
    """Largest angle about each axis; null: 30 in volumes (in-plane only where slices are thick), 180 in pictures (15
    where the patch is longer than 1.5 times its width)."""
    scale_probability: float = 0.2
    """Share of samples that are scaled."""
    scale: Range = (0.7, 1.4)
    """Range of the field of view: at 1.4 the patch shows 1.4 times as much, and everything in it is smaller."""
    noise_probability: float = 0.1
    """Share of samples that get Gaussian noise."""
    noise: Range = (0.0, 0.1)
    """Range of the noise's standard deviation, in the units of the normalised image."""
    blur_probability: float = 0.2
    """Share of samples that are blurred, in some of their channels."""
    blur: Range = (0.5, 1.0)
    """Range of the Gaussian's standard deviation along each axis, in voxels."""
    brightness_probability: float = 0.15
    """Share of samples whose intensities are multiplied."""
    brightness: Range = (0.75, 1.25)
    """Range of the factor."""
    contrast_probability: float = 0.15
    """Share of samples whose contrast about the mean is changed."""
    contrast: Range = (0.75, 1.25)
    """Range of the factor."""
    low_resolution_probability: float = 0.25
    """Share of samples that are made coarser and interpolated back, in some of their channels."""
    low_resolution: Range = (0.5, 1.0)
    """Range of the size of the coarser grid, as a share of the patch (in-plane only where slices are thick)."""
    channel_probability: float = 0.5
    """Share of the channels of a sample that blur and low resolution act on."""
    gamma_inverted_probability: float = 0.1
    """Share of samples that get a gamma curve on the inverted image, mean and deviation kept."""
    gamma_probability: float = 0.3
    """Share of samples that get a gamma curve, mean and deviation kept."""
    gamma: Range = (0.7, 1.5)
    """Range of the exponent."""
    mirror_axes: tuple[int, ...] | None = None
    """Axes that are mirrored with probability ½ each; null: all in pictures whose classes have no sides, else none."""
    swap: dict[str, str] | Literal["auto"] | None = None
    """Classes that change places when left and right are mirrored, {kidney_left: kidney_right}; {}: none; auto: those
    that their names tell; null: these too, but a training that begins at a terminal asks first."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("probability") and not 0 <= value <= 1:
                raise MedsegError(Code.CONFIG, "a probability lies between 0 and 1", where=f"augment.{name}", got=value)
            if isinstance(value, tuple) and name != "mirror_axes":
                _check_range(name, value)


def _check_range(name: str, span: Range) -> None:
    where = f"augment.{name}"
    if span[0] > span[1]:
        raise MedsegError(Code.CONFIG, "a range is (low, high)", where=where, got=span)
    if span[0] < 0 or (span[0] == 0 and name not in ("noise", "brightness", "contrast")):
        raise MedsegError(Code.CONFIG, "the range must be positive", where=where, got=span)
    if name == "low_resolution" and span[1] > 1:
        raise MedsegError(Code.CONFIG, "a coarser grid is smaller than the patch", where=where, got=span)
