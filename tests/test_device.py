"""What is avoided on CPUs: gradients of small maps made of uninitialised memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from medseg.config import compose
from medseg.device import explicit_padding
from medseg.training.loop import Loop
from medseg.training.train import train

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LARGEST = 18
"""Memory is poisoned in blocks of up to 2 to the power of this floats: more than any buffer of these convolutions."""


def poison() -> None:
    """Fill memory that is about to be used again with NaN: whoever reads what nobody wrote gets NaN."""
    blocks = [torch.full((1 << power,), torch.nan) for power in range(6, LARGEST + 1) for _ in range(4)]
    del blocks


def poisoned(result: Tensor) -> Tensor:
    """The same; memory is poisoned right before the backward pass of what made it."""
    if not result.requires_grad:
        return result
    result = result.view_as(result)
    result.register_hook(lambda _: poison())
    return result


def gradients(layer: nn.Module, image: Tensor, push: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients of the image and each weight, as float64."""
    image = image.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        result = poisoned(layer(image))
    torch.autograd.backward(result, push.to(result.dtype))
    weights = [p.grad for p in layer.parameters()]
    return [t.double() for t in (result.detach(), image.grad, *weights) if t is not None]


def compare(
    make: Callable[[], nn.Module], size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """The layer under repair against float64, which oneDNN does not compute."""
    torch.manual_seed(0)
    layer = make().to(memory_format=layout)
    image = torch.randn(size).contiguous(memory_format=layout)
    push = torch.randn_like(layer(image).detach())
    poison()
    with explicit_padding(CPU):
        ours = gradients(layer, image, push, dtype)
    reference = gradients(layer.double(), image.double(), push, torch.float64)
    tolerance = 0.03 if dtype == BF16 else 1e-4
    for got, expected in zip(ours, reference, strict=True):
        assert got.shape == expected.shape and bool(torch.isfinite(got).all())
        assert float((got - expected).norm()) <= tolerance * float(expected.norm())


SMALL = {
    "deepest stage": (lambda: nn.Conv3d(64, 64, 3, padding=1), (2, 64, 2, 3, 3)),
    "one input channel": (lambda: nn.Conv3d(1, 16, 3, padding=1), (2, 1, 2, 8, 8)),
    "stride": (lambda: nn.Conv3d(32, 32, 3, stride=2, padding=1), (2, 32, 4, 1, 1)),
    "padding by name": (lambda: nn.Conv3d(16, 16, 5, padding="same"), (2, 16, 3, 6, 6)),
    "even filter by name": (lambda: nn.Conv3d(16, 16, 4, padding="same"), (2, 16, 2, 3, 3)),
    "dilation": (lambda: nn.Conv3d(32, 32, 3, padding=2, dilation=2), (2, 32, 4, 4, 4)),
    "per axis": (lambda: nn.Conv3d(32, 32, (5, 3, 1), padding=(2, 1, 0)), (1, 32, 3, 4, 4)),
    "groups": (lambda: nn.Conv3d(32, 32, 7, padding=3, groups=32), (2, 32, 3, 3, 3)),
    "large filter": (lambda: nn.Conv3d(16, 8, 7, stride=2, padding=3), (1, 16, 6, 1, 2)),
    "plane": (lambda: nn.Conv2d(32, 32, 7, padding=3), (2, 32, 2, 2)),
    "transposed": (lambda: nn.ConvTranspose3d(16, 16, 3, stride=2, padding=1, output_padding=1), (2, 16, 1, 1, 1)),
    "transposed per axis": (lambda: nn.ConvTranspose3d(16, 8, (5, 3, 3), padding=(2, 1, 1)), (2, 16, 2, 4, 3)),
    "transposed plane": (lambda: nn.ConvTranspose2d(16, 8, 5, padding=2), (2, 16, 3, 2)),
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", SMALL)
def test_maps_smaller_than_the_filter_have_right_gradients(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    make, size = SMALL[name]
    last = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    compare(make, size, dtype, last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv3d(8, 8, 3, padding=1), (2, 8, 3, 4, 5)),
        (lambda: nn.Conv3d(8, 8, 3), (2, 8, 3, 4, 5)),
        (lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1), (2, 8, 4, 4)),
        (lambda: nn.ConvTranspose3d(8, 8, 2, stride=2), (2, 8, 1, 2, 2)),
        (lambda: nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1, output_padding=1), (2, 8, 2, 3, 3)),
    ],
)
def test_larger_maps_are_left_alone(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """Bit by bit, and without a padding of our own in the graph."""
    layer, image = make(), torch.randn(size)
    with explicit_padding(CPU):
        ours = layer(image)
    assert torch.equal(ours, layer(image))
    assert "Convolution" in type(ours.grad_fn).__name__
    assert all("Pad" not in type(node).__name__ for node, _ in ours.grad_fn.next_functions)


def test_one_image_without_a_batch() -> None:
    layer, image = nn.Conv3d(4, 4, 3, padding=1), torch.randn(4, 2, 3, 3)
    with explicit_padding(CPU):
        torch.testing.assert_close(layer(image), layer(image[None])[0])


def test_gpus_keep_their_own_padding() -> None:
    with explicit_padding(torch.device("cuda")):
        result = nn.Conv3d(4, 4, 3, padding=1)(torch.randn(1, 4, 2, 2, 2))
    assert all("Pad" not in type(node).__name__ for node, _ in result.grad_fn.next_functions)


def test_a_training_step_reads_no_uninitialised_memory(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI's SegResNet, whose deepest maps are 2x3x3 here: its gradients were NaN now and then."""
    experiment = compose(
        "train",
        [
            f"data.root='{tiny_run.data}'", "model=monai", "model.network=SegResNet",
            "model.arguments={init_filters: 8}", "data.plan.patch_size=[16,24,24]", "data.plan.batch_size=2",
            "trainer.device=cpu", "trainer.precision=bf16", "trainer.max_steps=2", "trainer.log_steps=1",
            "trainer.num_validations=1", "trainer.overlay_cases=1", "trainer.final_predictions=false",
        ],
    )  # fmt: skip
    original, finite = Loop.train_step, []

    def poisoned_step(self, step, image, label):
        for module in self.model.modules():
            if isinstance(module, nn.Conv3d) and step == 0:
                module.register_forward_hook(lambda module, arguments, result: poisoned(result))
        loss = original(self, step, image, label)
        finite.extend(bool(torch.isfinite(p.grad).all()) for p in self.model.parameters())
        return loss

    monkeypatch.setattr(Loop, "train_step", poisoned_step)
    with (tmp_path / "log.txt").open("w") as log:
        train(experiment, tmp_path / "run", Console(file=log))
    assert finite and all(finite)
