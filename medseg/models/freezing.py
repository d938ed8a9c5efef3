"""Networks of which the first stages can keep what they are, while the others learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import nn

from medseg.errors import Code, MedsegError


class Freezable(nn.Module):
    """A network of named stages, from the image on.

    A frozen stage has weights without gradient, and stays as in prediction: its batch normalisations use and keep the
    statistics that they have. (Yosinski et al., How transferable are features in deep neural networks?, NeurIPS 2014.)
    """

    frozen_stages: int = 0
    """How many of `stages`, from the image on, keep what they are; see `freeze`."""

    @property
    def stages(self) -> Sequence[tuple[str, nn.Module]]:
        """Its parts by name, from the image to the scores. Freezing and fine-tuning count in them."""
        raise NotImplementedError

    def freeze(self, number: int) -> None:
        """Let the first `number` stages keep what they are, and the others learn.

        Raises:
            MedsegError: E_CONFIG if nothing would learn.
        """
        stages = self.stages
        if not 0 <= number < len(stages):
            raise MedsegError(
                Code.CONFIG,
                "no network has so many stages in front of one that learns",
                where="model.frozen_stages",
                expected=f"0 to {len(stages) - 1} of the stages {', '.join(name for name, _ in stages)}",
                got=number,
            )
        self.frozen_stages = number
        for i, (_, stage) in enumerate(stages):
            stage.requires_grad_(i >= number)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As torch's, but for the frozen stages."""
        super().train(mode)
        for _, stage in self.stages[: self.frozen_stages] if self.frozen_stages else ():
            stage.eval()
        return self
