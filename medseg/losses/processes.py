"""Sums of a loss over the processes that share a batch.

Each process has some samples of the batch. A ratio of sums (Dice over the batch, a mean over the voxels that count) is
that of the whole batch only if its sums are: the mean of the processes' own ratios is another number. Losses take such
sums through `summed`, which leaves them as they are where one process trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

_group: ProcessGroup | None = None
"""Of the processes that compute one loss together, while they do."""


@contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """While the block runs, losses are those of all processes of a group; each of them computes the same losses.

    Args:
        group: None leaves each loss to the process that computes it.
    """
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def is_together() -> bool:
    """Whether `summed` asks other processes."""
    return _group is not None


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of tensors over all processes, with gradients; the tensors themselves outside `together`.

    On the way back the gradients are summed too: what arrives is the gradient of the sum of all processes' losses.
    These being equal, the mean over processes that DistributedDataParallel takes is the gradient of the one loss.

    Args:
        tensors: of one shape and type; the same on all processes.
    Source:
        nnU-Net's AllGatherGrad (Isensee et al., Nature Methods 2021) does so for Dice; a sum needs less than a gather.
    """
    if _group is None:
        return tensors
    total: Tensor = _Sum.apply(torch.stack(tensors), _group)  # type: ignore[no-untyped-call]
    return total.unbind()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradients[0], context.group), None


def _all_reduced(values: Tensor, group: ProcessGroup) -> Tensor:
    values = values.clone()
    all_reduce(values, group=group)
    return values
