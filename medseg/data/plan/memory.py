"""How much memory a training step takes, counted on the network itself, and how much a device has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from medseg.data.memory import available_bytes
from medseg.data.plan.schema import Axes
from medseg.models import MODELS
from medseg.models.shapes import ShapesOnly

GIB = 2**30
OPTIMIZER_BYTES = 28
"""For each weight: itself, its gradient, the two running means of Adam, its running average, and two temporaries of the
optimizer's step, in fp32."""
CHECKPOINT_BYTES = 28
"""For each weight, in the computer's memory beside a step: a checkpoint's content, made before it is written (the
weight, its average and the two means); the weight that waits while the average is validated; and in the end the best
model with the content of its file. Freed memory is kept for the next step (`keep_freed_memory`), so they add up."""
BASE_BYTES = {"cuda": 0.9 * GIB, "cpu": 0.6 * GIB}
"""What torch and its libraries take before anything is computed: on GPUs the context and the workspaces of cuDNN, on
CPUs the loaded libraries."""
TRANSIENT = 6
"""Copies of the largest feature map that exist beside the saved ones while gradients go back."""
LOSS_COPIES = 6
"""Maps of the size of the logits, in fp32, that the loss holds with its gradients."""
BATCHES_AHEAD = 6
"""Batches that are made ahead, cut larger than the patch for augmentation, on the CPU."""
MARGIN = 1.1
"""What allocators leave unused between the pieces. It and the counts above were fitted to CPU trainings such as those
of tests/test_plan_memory.py; on GPUs none of them has been compared with a training."""
SPARE = {"cuda": 0.9, "cpu": 0.4}
"""Share of a device's memory that a step is planned to take at most: on GPUs the allocator leaves gaps; on CPUs the
prepared cases lie in the same memory."""


@dataclass(frozen=True)
class StepCost:
    """What a training step holds. All counts but the weights are for one sample."""

    num_weights: int
    num_saved: int
    """Elements of the feature maps that are kept for the way back."""
    num_largest: int
    """Elements of the largest feature map."""
    num_logits: int
    """Elements of the maps of all heads."""
    num_input: int
    """Elements of a patch with its label."""

    def bytes_of(self, batch_size: int, *, device: str, precision: str) -> float:
        """Estimated peak of a step with so many samples."""
        element = 4 if precision == "fp32" else 2
        copies = 0 if precision == "fp32" else 2  # the weights are cast as well
        sample = (self.num_saved + TRANSIENT * self.num_largest) * element + 4 * LOSS_COPIES * self.num_logits
        sample += 4 * self.num_input * (BATCHES_AHEAD if device == "cpu" else 2)
        weight = OPTIMIZER_BYTES + copies + (CHECKPOINT_BYTES if device == "cpu" else 0)
        return BASE_BYTES[device] + MARGIN * (self.num_weights * weight + batch_size * sample)


def step_cost(
    settings: Mapping[str, Any],
    *,
    in_channels: int,
    num_outputs: int,
    patch_size: tuple[int, ...],
) -> StepCost:
    """Count what a training step of a network holds, by a pass that computes nothing (`ShapesOnly`).

    Args:
        settings: name and complete settings of the network.
        in_channels: channels of an image.
        num_outputs: of the network.
        patch_size: its number of axes is that of the network; enlarged to what the network takes.
    """
    return _counted(json.dumps(dict(settings), sort_keys=True), in_channels, num_outputs, tuple(patch_size))


@lru_cache(maxsize=32)
def _counted(settings: str, in_channels: int, num_outputs: int, patch_size: tuple[int, ...]) -> StepCost:
    """As `step_cost`; a planner asks for the same network more than once."""
    with ShapesOnly():
        model = MODELS.build(
            json.loads(settings), in_channels=in_channels, num_classes=num_outputs, spatial_dims=len(patch_size)
        ).train()
        patch_size = model.next_size(patch_size)
        patch = torch.empty((2, in_channels, *patch_size))
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no storage is freed and counted twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            saved[storage] = tensor
        return tensor

    with ShapesOnly(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(patch)
    sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() // 2 for tensor in saved.values()]
    heads = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return StepCost(
        num_weights=sum(parameter.numel() for parameter in model.parameters()),
        num_saved=sum(sizes),
        num_largest=max(sizes, default=0),
        num_logits=sum(head.numel() for head in heads) // 2,
        num_input=(in_channels + 1) * math.prod(patch_size),
    )


def complete_settings(
    settings: Mapping[str, Any], widths: Axes, kernels: tuple[Axes, ...], strides: tuple[Axes, ...]
) -> dict[str, Any]:
    """The settings of a network as JSON holds them, those of its stages that nobody has set taken from a plan."""
    planned = {"widths": widths, "kernels": kernels, "strides": strides}
    known = {field.name for field in fields(MODELS.part(str(settings["name"])).config)}
    open_ = {name: value for name, value in planned.items() if name in known and settings.get(name) is None}
    complete: dict[str, Any] = json.loads(json.dumps({**settings, **open_}))
    return complete


def device_bytes(device: str) -> float:
    """Memory of the device: of the GPU in all, or what this machine or container has free."""
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(available_bytes())
