"""How unsure the networks are of each voxel, and how much of that is that they say different things.

Every mirrored pass of every fold gives probabilities p of its own. Their mean P is what all of them together say:

- **uncertainty** H(P), the entropy of the mean: high where all are unsure, and where they disagree;
- **disagreement** H(P) - mean H(p), the mutual information between the answer and who gives it: high only where each
  is surer than all together. More data of that kind would help there; where uncertainty stands alone, the scan itself
  does not show it.

Both come from sums that need no pass to be kept: beside the K logits, K probabilities and one entropy are averaged by
the window in the same way, over folds, mirrored passes and overlapping tiles. The labels do not change by it.

Source: Gal, Uncertainty in deep learning, Cambridge 2016, section 3.3; Houlsby et al., Bayesian active learning for
classification and preference learning, arXiv 2011 (mutual information); Lakshminarayanan et al., NeurIPS 2017 (members
of an ensemble). What differs: overlapping tiles are passes too, with the weights that they have in the mean.

K outputs (classes, or regions that are there or not), Q the output of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from medseg.models import SegmentationModel


def num_sums(num_outputs: int) -> int:
    """Channels that are summed up over tiles: logits, probabilities, entropy."""
    return 2 * num_outputs + 1


class Opinions(SegmentationModel):
    """Networks as one that also says what uncertainty is made of.

    Args:
        models: in eval mode, with the same inputs and outputs.
        regions: the outputs are regions, each there or not, not classes.
    """

    def __init__(self, models: Sequence[nn.Module], *, regions: bool) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.regions = regions
        self.first = models[0].output_size

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result, as each of the networks has it."""
        size: tuple[int, ...] = self.first(input_size)  # type: ignore[operator]
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Means over the networks, float32, shape (N, 2 K + 1, *Q): logits, probabilities, entropy in nats."""
        total = self._opinion(self.models[0], x)
        for model in self.models[1:]:
            total += self._opinion(model, x)
        return total / len(self.models)

    def _opinion(self, model: nn.Module, x: Tensor) -> Tensor:
        logits = model(x).float()
        shares = logits.sigmoid() if self.regions else logits.softmax(1)
        doubt = entropy(lambda index: shares[:, index], shares.shape[1], regions=self.regions)
        return torch.cat([logits, shares, doubt[:, None]], 1)


def entropy(probability: Callable[[int], Tensor], num_outputs: int, *, regions: bool) -> Tensor:
    """Entropy in nats, one output at a time: of the classes, or the sum over regions that are there or not.

    Args:
        probability: output → its probability at some voxels, float32.
        num_outputs: K.
        regions: the outputs are regions.
    """
    total = _entropy_of(probability(0), regions=regions)
    for index in range(1, num_outputs):
        total += _entropy_of(probability(index), regions=regions)
    return total


def _entropy_of(probability: Tensor, *, regions: bool) -> Tensor:
    part: Tensor = torch.special.entr(probability)
    if regions:
        part += torch.special.entr((1 - probability).clamp_(min=0))  # sums of shares may round to more than 1
    return part


def largest_entropy(num_outputs: int, *, regions: bool) -> float:
    """The largest value of `entropy`."""
    return num_outputs * math.log(2) if regions else math.log(num_outputs)


@torch.inference_mode()
def disagreeing(
    planes: Iterator[tuple[int, Tensor]], num_outputs: int, *, regions: bool
) -> Iterator[tuple[int, Tensor]]:
    """Planes of `sliding_window_planes` whose last channel is the disagreement in place of the mean entropy.

    Here, on the grid on which the networks answer: of a single pass it is 0, whatever is made of its answer later.

    Args:
        planes: first plane and means (2 K + 1, n, *S[1:]), which are changed.
        num_outputs: K.
        regions: the outputs are regions.
    """
    for first, means in planes:
        probabilities = means[num_outputs : 2 * num_outputs]
        together = entropy(lambda index, p=probabilities: p[index].float(), num_outputs, regions=regions)  # type: ignore[misc]
        means[-1] = (together - means[-1]).clamp_(min=0)
        yield first, means
