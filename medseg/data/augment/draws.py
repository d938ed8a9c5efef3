"""Random numbers of one batch, all from one generator on the CPU."""

from __future__ import annotations

import torch

from medseg.data.augment.config import Range


class Draws:
    """What a batch draws, in a fixed order and number: a changed probability shifts nothing that is drawn after it.

    Args:
        seed: of the run.
        step: which batch.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)

    def chosen(self, shape: tuple[int, ...], probability: float) -> torch.Tensor:
        """Bool: true with a probability."""
        return torch.rand(shape, generator=self.generator) < probability

    def uniform(self, shape: tuple[int, ...], span: Range) -> torch.Tensor:
        """Float32, uniform in a range."""
        return torch.rand(shape, generator=self.generator) * (span[1] - span[0]) + span[0]

    def factor(self, shape: tuple[int, ...], span: Range) -> torch.Tensor:
        """Float32, with equal chances below and above 1, uniform on either side (batchgeneratorsv2's `BGContrast`)."""
        low, high = span
        below = torch.rand(shape, generator=self.generator) < 0.5
        share = torch.rand(shape, generator=self.generator)
        under, over = low + share * (min(high, 1.0) - low), max(low, 1.0) + share * (high - max(low, 1.0))
        if low >= 1 or high <= 1:
            return over if low >= 1 else under
        return torch.where(below, under, over)

    def seed(self) -> int:
        """A seed for a generator on the device."""
        return int(torch.randint(2**62, (1,), generator=self.generator))
