"""Networks built and run for their shapes alone: the same numbers as on torch's meta device, without its compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from medseg.data.plan.memory import step_cost
from medseg.models import MODELS
from medseg.models.shapes import ShapesOnly

STAGES: dict[str, Any] = {"widths": [8, 16, 16], "strides": [1, 2, 2]}
VALID = {"padding": "valid", "deep_supervision": False, "down": "max_pool", "activation": "elu"}
NETWORKS = [
    ({"name": "unet", **STAGES}, (16, 24, 8)),
    ({"name": "unet", **STAGES, "normalisation": "batch", "up": "transposed_padded"}, (16, 24)),
    ({"name": "unet", **STAGES, "normalisation": "group", "activation": "prelu", "up": "interpolation"}, (16, 24)),
    (
        {
            "name": "unet",
            **STAGES,
            "padding": "valid",
            "down": "max_pool",
            "activation": "elu",
            "deep_supervision": False,
        },
        (76, 92),
    ),
    ({"name": "residual_encoder_unet", **STAGES}, (16, 24, 8)),
    ({"name": "fusionnet"}, (32, 64)),
]


def shapes_of(settings: dict[str, Any], size: tuple[int, ...], context: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the weights, of what is kept for the way back, and of the heads."""
    kept: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_meta
        kept.append(tuple(tensor.shape))
        return tensor

    with context:
        model = MODELS.build(settings, in_channels=2, num_classes=3, spatial_dims=len(size)).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(torch.empty((2, 2, *size)))
    heads = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return [p.shape for p in model.parameters()], kept, [head.shape for head in heads]


@pytest.mark.parametrize(("settings", "size"), NETWORKS, ids=str)
def test_shapes_are_those_of_the_meta_device(settings: dict[str, Any], size: tuple[int, ...]) -> None:
    ours, meta = shapes_of(settings, size, ShapesOnly()), shapes_of(settings, size, torch.device("meta"))
    assert ours == meta and len(ours[1]) > 10


def test_numbers_that_a_network_reads_have_values() -> None:
    """SwinUNETR takes its rates of drop path from torch.linspace."""
    cost = step_cost(
        {"name": "monai", "network": "SwinUNETR", "arguments": {"feature_size": 12}},
        in_channels=1,
        num_outputs=3,
        patch_size=(32, 32, 32),
    )
    assert cost.num_weights > 1e5 and cost.num_saved > cost.num_input


def test_what_torch_refuses_is_refused() -> None:
    with ShapesOnly():
        image, weight = torch.empty((1, 2, 8, 8)), torch.empty((4, 3, 3, 3))
        with pytest.raises(RuntimeError, match="channel"):
            F.conv2d(image, weight)
        with pytest.raises(RuntimeError, match="[Ss]izes of tensors must match"):
            torch.cat((image, torch.empty((1, 2, 8, 7))), dim=1)
        with pytest.raises((RuntimeError, NotImplementedError)):
            image.sum().item()
        assert torch.cat((image, torch.empty((1, 2, 5, 8))), dim=-2).shape == (1, 2, 13, 8)
    assert not torch.empty(1).is_meta


def test_planning_the_default_network_leaves_the_compiler_alone() -> None:
    program = (
        "import sys\n"
        "from medseg.data.plan.memory import step_cost\n"
        "settings = {'name': 'unet', 'widths': [8, 16, 16], 'strides': [1, 2, 2]}\n"
        "for size in ((16, 16, 16), (16, 16)):\n"
        "    step_cost(settings, in_channels=1, num_outputs=3, patch_size=size)\n"
        "print(*(name for name in ('torch._dynamo', 'sympy') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
