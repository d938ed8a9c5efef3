"""Masked images: blocks of a patch are hidden, and the network reconstructs them from what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.data.augment.intensity import upload
from medseg.errors import Code, MedsegError
from medseg.pretraining.methods.method import METHODS, Hidden, Method
from medseg.pretraining.reconstruction import Error

MASKING = 0x4D41534B
"""Ends the key of what is drawn here: whatever else follows from (seed, step) draws other numbers."""
LEAST_BLOCKS = 8
"""A patch is cut into so many blocks at least: of few large ones chance would hide a structure always or never."""


@dataclass(frozen=True)
class MaskedConfig:
    """Settings of `Masked`."""

    ratio: float = 0.6
    """Share of the blocks of a patch that are hidden."""
    block_size: tuple[int, ...] | None = None
    """Voxels of a block along each axis; null: what one voxel of the network's coarsest maps stands for, halved until
    a patch has eight."""
    fill: Literal["zero", "noise"] = "zero"
    """What stands in hidden voxels: zero (of a z-score the mean), noise (Gaussian, as the patch is)."""
    loss: Error = "l1"
    """What the error of a hidden voxel costs: l1 (its size), l2 (its square)."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise MedsegError(
                Code.CONFIG,
                "a share lies between 0 and 1",
                where="method.ratio",
                expected="such as 0.6",
                got=self.ratio,
            )
        if self.block_size is not None and min(self.block_size, default=0) < 1:
            raise MedsegError(Code.CONFIG, "must be positive", where="method.block_size", got=self.block_size)


@METHODS.register("masked", MaskedConfig)
class Masked(Method):
    """Hides random blocks; the error of what was hidden counts, and nothing else.

    The network is the segmenter itself with one result for each channel, skips included, so that encoder and decoder
    both learn. Which blocks are hidden is a function of (seed, step).

    Args:
        config: the settings.
        coarsest: the default of `block_size`.
    Raises:
        MedsegError: E_CONFIG for blocks with another number of axes than the data.

    Source:
        He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, and Xie et al., SimMIM, CVPR 2022 (its
        ratio of 0.6 and its L1 on hidden voxels), both of transformers. As convolutions Zhou et al., Models Genesis,
        MedIA 2021 (in- and out-painting of 3D patches by a U-Net), and Tian et al., SparK, ICLR 2023: blocks of one
        voxel of the coarsest maps. SparK computes hidden voxels of its encoder away (sparse convolutions); here they
        are filled, as in SimMIM and Models Genesis.
    """

    def __init__(self, config: MaskedConfig, *, coarsest: tuple[int, ...]) -> None:
        self.config = config
        self.loss = config.loss
        self.coarsest = coarsest
        if config.block_size is not None and len(config.block_size) != len(coarsest):
            raise MedsegError(
                Code.CONFIG,
                f"the data have {len(coarsest)} axes",
                where="method.block_size",
                expected=f"{len(coarsest)} numbers",
                got=config.block_size,
            )

    def block_size(self, patch_size: tuple[int, ...]) -> tuple[int, ...]:
        """Voxels of a block of such a patch along each axis."""
        if self.config.block_size is not None:
            return self.config.block_size
        block = [min(b, p) for b, p in zip(self.coarsest, patch_size, strict=True)]
        while math.prod(_counts(patch_size, block)) < LEAST_BLOCKS and max(block) > 1:
            block = [max(1, b // 2) for b in block]
        return tuple(block)

    def in_words(self, patch_size: tuple[int, ...]) -> str:
        """See `Method.in_words`."""
        blocks = "×".join(map(str, self.block_size(patch_size)))
        share = f"{self.config.ratio:.0%} of the blocks of {blocks} voxels"
        return f"masked: {share} are hidden ({self.config.fill}) and reconstructed, {self.loss}"

    def hide(self, image: torch.Tensor, key: tuple[int, ...], indices: Iterable[int]) -> Hidden:
        """See `Method.hide`."""
        size = tuple(image.shape[2:])
        block = self.block_size(size)
        draws = [np.random.default_rng([*key, index, MASKING]) for index in indices]
        masks = np.stack([random_blocks(size, block, self.config.ratio, draw) for draw in draws])
        asked = upload(torch.from_numpy(masks)[:, None], image.device)
        return Hidden(torch.where(asked, self._filling(image, draws), image), asked.to(image.dtype))

    def _filling(self, image: torch.Tensor, draws: list[np.random.Generator]) -> torch.Tensor:
        if self.config.fill == "zero":
            return image.new_zeros(())
        axes = tuple(range(2, image.ndim))
        noise = np.stack([draw.standard_normal(image.shape[1:], dtype=np.float32) for draw in draws])
        filling = upload(torch.from_numpy(noise), image.device).to(image.dtype)
        return filling * image.std(axes, correction=0, keepdim=True) + image.mean(axes, keepdim=True)


def random_blocks(
    size: tuple[int, ...], block: tuple[int, ...], ratio: float, draw: np.random.Generator
) -> NDArray[np.bool_]:
    """A mask that covers random blocks of a regular grid; those at the far ends may be cut.

    Args:
        size: of the mask in voxels.
        block: of a block.
        ratio: share of the blocks; at least one is hidden, and one is left where there are two.
        draw: where chance comes from.
    Returns:
        bool of shape `size`, true in hidden blocks.
    """
    counts = _counts(size, block)
    number = math.prod(counts)
    hidden = np.zeros(number, dtype=bool)
    hidden[draw.permutation(number)[: min(max(1, round(ratio * number)), max(1, number - 1))]] = True
    mask = hidden.reshape(counts)
    for axis, (voxels, length) in enumerate(zip(block, size, strict=True)):
        mask = mask.repeat(voxels, axis=axis).take(range(length), axis=axis)
    return mask


def _counts(size: tuple[int, ...], block: Iterable[int]) -> tuple[int, ...]:
    return tuple(-(-length // voxels) for length, voxels in zip(size, block, strict=True))
