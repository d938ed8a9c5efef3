"""A batch of cuts in, a batch of varied patches out."""

from __future__ import annotations

import math

import torch

from medseg.data.augment.config import AugmentConfig
from medseg.data.augment.draws import Draws
from medseg.data.augment.intensity import upload, vary
from medseg.data.augment.sides import Mirroring
from medseg.data.augment.spatial import Mover, cut_size, place

THICK = 3.0
"""Slices are thick where they are more than this many times as far apart as the voxels within them."""
LONG = 1.5
"""Pictures are turned by small angles only where the patch is longer than this many times its width (as nnU-Net)."""


class Augmenter:
    """Applies `AugmentConfig` to batches.

    Args:
        config: what is varied.
        patch_size: P.
        spacing_mm: voxel size along the patch's axes: rotations are rigid in mm, not in voxels.
        is_picture: 2D pictures without orientation. Patches of one slice of a volume are turned like them.
        mirroring: which axes are mirrored, and which classes change places.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        patch_size: tuple[int, ...],
        spacing_mm: tuple[float, ...],
        is_picture: bool,
        mirroring: Mirroring,
        seed: int,
    ) -> None:
        self.config, self.patch_size, self.mirroring, self.seed = config, patch_size, mirroring, seed
        self.is_picture = is_picture
        is_slice = len(patch_size) == 3 and patch_size[0] == 1
        is_thick = len(spacing_mm) == 3 and max(spacing_mm) > THICK * min(spacing_mm)
        self.thick_axis = 0 if is_slice else spacing_mm.index(max(spacing_mm)) if is_thick else None
        degrees = config.rotation_degrees
        if degrees is None:
            height, width = sorted(patch_size[-2:])
            degrees = 30.0 if not (is_picture or is_slice) else 15.0 if width > LONG * height else 180.0
        self.angle = math.radians(degrees)
        self.mover = Mover(config, spacing_mm, self.angle, self.thick_axis, mirroring.axes)
        self._swapped = torch.tensor([*mirroring.classes, *range(len(mirroring.classes), 256)], dtype=torch.uint8)

    def cut_size(self, step: int, batch_size: int) -> tuple[int, ...]:
        """How large the patches of a step should be cut, so that turned ones have no empty corners.

        Returns:
            P where no sample of the step is turned or scaled; else an even number of voxels more along an axis.
        """
        return cut_size(self.mover.moves(Draws(self.seed, step), batch_size), self.patch_size)

    def __call__(
        self, image: torch.Tensor, label: torch.Tensor, step: int, indices: range | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch. Mirroring comes first, in the same copy: what follows does not care for directions.

        Args:
            image: float32 (N, C, *L), on the device; L is `cut_size` or P.
            label: class indices below 256 (N, *L), on the same device.
            step: which batch this is.
            indices: which samples of the batch these are (`PatchSampler.indices`): they get what they would get within
                the whole batch, but for the voxels of noise; None: all.
        Returns:
            New tensors (N, C, *P) and (N, *P).
        """
        draws = Draws(self.seed, step)
        indices = range(image.shape[0]) if indices is None else indices
        moves = self.mover.moves(draws, indices.stop)[indices.start :: indices.step]
        image, label = place(image, label, moves, self.patch_size, reflect=self.is_picture)
        for index, move in enumerate(moves):
            if self.mirroring.swaps(move.flips):
                self._swap(label[index])
        vary(image, self.config, draws, self.thick_axis, indices)
        return image, label

    def _swap(self, label: torch.Tensor) -> None:
        if self._swapped.device != label.device:
            self._swapped = upload(self._swapped, label.device)
        swapped = self._swapped.index_select(0, label.view(-1).int())
        label.view(-1).copy_(swapped)
