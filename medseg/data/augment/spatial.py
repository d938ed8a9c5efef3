"""Where the voxels of a patch come from: rotation, scale, mirroring, and the cut that holds them all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medseg.data.augment.config import AugmentConfig
from medseg.data.augment.draws import Draws

MAX_CUT = 4.0
"""Largest volume of a cut as a multiple of the patch's. nnU-Net cuts 206³ for 128³ (4.2 times), always; what a cut of
this size does not hold is filled."""


SLAB = 2**15
"""Voxels that a CPU interpolates at a time. What is held of them stays in its cache, and torch gives so few to one
thread (but `floor` and `round`, which are therefore not used): two threads that wait for each other at every step
took ten times as long beside other programs."""


@dataclass(frozen=True)
class Move:
    """How one sample is moved.

    Args:
        matrix: (n, n) float64, voxels of the patch → voxels of the cut, both counted from their middle; with the
            mirroring. None where nothing is interpolated.
        flips: axes that are mirrored.
    """

    matrix: torch.Tensor | None
    flips: tuple[int, ...]


@dataclass(frozen=True)
class Mover:
    """Draws moves.

    Args:
        config: how often and how far.
        spacing_mm: voxel size along the patch's axes: rotations are rigid in mm, not in voxels.
        angle: largest angle about each axis, in radians.
        thick_axis: the axis that slices are stacked along, where they are thick: nothing leaves its slice.
        mirror_axes: axes that are mirrored.
    """

    config: AugmentConfig
    spacing_mm: tuple[float, ...]
    angle: float
    thick_axis: int | None
    mirror_axes: tuple[int, ...]

    def moves(self, draws: Draws, batch_size: int) -> list[Move]:
        """One for each sample of a batch; the first that is drawn for a step."""
        config, dims = self.config, len(self.spacing_mm)
        rotate = draws.chosen((batch_size,), config.rotation_probability)
        angles = draws.uniform((batch_size, 3), (-self.angle, self.angle)).double() * rotate[:, None]
        if self.thick_axis is not None:
            angles *= torch.arange(3) == self.thick_axis  # angle i turns about axis i
        scale = draws.chosen((batch_size,), config.scale_probability)
        view = torch.where(scale, draws.uniform((batch_size,), config.scale), 1.0).double()
        mirror = draws.chosen((batch_size, dims), 0.5)
        spacing = torch.tensor(self.spacing_mm, dtype=torch.float64)
        matrices = rotation_matrix(angles, dims) * view[:, None, None] * spacing / spacing[:, None]
        moves = []
        for matrix, moved, mirrored in zip(matrices, (rotate | scale).tolist(), mirror.tolist(), strict=True):
            flips = tuple(axis for axis in self.mirror_axes if mirrored[axis])
            sign = torch.tensor([-1.0 if axis in flips else 1.0 for axis in range(dims)], dtype=torch.float64)
            moves.append(Move(matrix * sign if moved else None, flips))
        return moves


def cut_size(moves: Sequence[Move], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest cut about the patch's middle that holds all that the moves bring into it, within `MAX_CUT`.

    Returns:
        Voxels along each axis: at least the patch's, and an even number more, so that both middles coincide.
    """
    patch = torch.tensor(patch_size, dtype=torch.float64)
    need = patch
    for move in moves:
        if move.matrix is not None:
            need = torch.maximum(need, move.matrix.abs() @ (patch - 1) + 1)
    sizes = patch_size
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0):
        margins = torch.ceil((need - patch) / 2 * share - 1e-6)
        sizes = tuple(p + 2 * int(m) for p, m in zip(patch_size, margins, strict=True))
        if math.prod(sizes) <= MAX_CUT * math.prod(patch_size):
            break
    return sizes


def place(
    image: torch.Tensor, label: torch.Tensor, moves: Sequence[Move], patch_size: tuple[int, ...], *, reflect: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches of a batch out of its cuts: the middle of a cut, mirrored or moved. One copy of each sample.

    Samples are taken one by one: they are copied anyway, each with its own flips, and few are interpolated.

    Args:
        image: float32 (N, C, *L), with L the patch or an even number of voxels more.
        label: class indices (N, *L).
        moves: N of them.
        patch_size: P.
        reflect: fill what lies outside the cut by reflection, otherwise with zeros.
    Returns:
        New tensors (N, C, *P) and (N, *P).
    """
    new_image = image.new_empty((*image.shape[:2], *patch_size))
    new_label = label.new_empty((label.shape[0], *patch_size))
    middle = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(label.shape[1:], patch_size, strict=True))
    for index, move in enumerate(moves):
        if move.matrix is not None:
            resample(image[index], label[index], move.matrix, new_image[index], new_label[index], reflect=reflect)
            continue
        cut, cut_label = image[index][(slice(None), *middle)], label[index][middle]
        if move.flips:
            cut, cut_label = cut.flip([a + 1 for a in move.flips]), cut_label.flip(move.flips)
        new_image[index], new_label[index] = cut, cut_label
    return new_image, new_label


def resample(
    image: torch.Tensor,
    label: torch.Tensor,
    matrix: torch.Tensor,
    new_image: torch.Tensor,
    new_label: torch.Tensor,
    *,
    reflect: bool,
) -> None:
    """Interpolate an image linearly and its label to the nearest voxel, at the same points.

    Gathers and blends on slabs that stay in the cache take less than half the time of `grid_sample` on a CPU (which is
    neither vectorised in 3D nor parallel within a sample), and the label costs one gather more.

    Args:
        image: (C, *L).
        label: (*L).
        matrix: (n, n), as `Move.matrix`.
        new_image: (C, *P), is written.
        new_label: (*P), is written.
        reflect: fill what lies outside by reflection, otherwise with zeros.
    """
    size, lengths = new_label.shape, label.shape
    wide = tuple(n + 2 for n in lengths)  # a border of zeros, so that no point needs to be asked where it lies
    border = (1, 1) * len(size)
    channels, labels = F.pad(image, border).flatten(1), F.pad(label, border).view(-1)
    strides = [math.prod(wide[axis + 1 :]) for axis in range(len(wide))]
    corners = [sum(steps) for steps in itertools.product(*((0, stride) for stride in strides))]
    offsets = [torch.arange(n, device=label.device, dtype=torch.float32) - (n - 1) / 2 for n in size]
    thickness = size[0] if label.device.type != "cpu" else max(1, SLAB // math.prod(size[1:]))
    for slab in (slice(first, first + thickness) for first in range(0, size[0], thickness)):
        points = _points(matrix, lengths, [offsets[0][slab], *offsets[1:]], reflect=reflect)
        nearest = low = torch.zeros((), dtype=torch.int32, device=label.device)
        weights = []
        for point, length, stride in zip(points, lengths, strides, strict=True):
            nearest = nearest + (point + 0.5).int() * stride  # points are positive: int() is the floor
            floor = point.int().clamp_(max=length)
            low = low + floor * stride
            weights.append(point.sub_(floor).view(-1))
        new_label[slab].view(-1).copy_(labels.index_select(0, nearest.view(-1)))
        for channel, target in zip(channels, new_image, strict=True):
            values = [channel[corner:].index_select(0, low.view(-1)) for corner in corners]
            for weight in reversed(weights):
                values = [torch.lerp(a, b, weight) for a, b in zip(values[::2], values[1::2], strict=True)]
            target[slab].view(-1).copy_(values[0])


def _points(
    matrix: torch.Tensor, lengths: Sequence[int], offsets: Sequence[torch.Tensor], *, reflect: bool
) -> list[torch.Tensor]:
    """Where voxels come from: for each axis of the cut its indices + 1, from 0 to length + 1, over the whole slab."""
    dims, points = len(lengths), []
    for row, length in zip(matrix.tolist(), lengths, strict=True):
        point = torch.full((1,) * dims, (length + 1) / 2, device=offsets[0].device)
        for axis, (share, offset) in enumerate(zip(row, offsets, strict=True)):
            point = point + (share * offset).view([-1 if a == axis else 1 for a in range(dims)])
        if reflect:  # at the middle of the outermost voxels
            point = length - (length - 1 - (point - 1).abs_()).abs_()
        points.append(point.clamp_(0, length + 1))
    return points


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
