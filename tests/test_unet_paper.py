"""U-Net of 2015 against the published figure, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.models import MODELS

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "configs" / "model" / "unet_2015.yaml").read_text())
del CONFIG["defaults"]  # for Hydra: the dataclass

# Figure 1 of the paper, in the order of the arrows: (layer, channels in, channels out, filter size, size of the result)
LAYERS = [
    ("conv", 1, 64, 3, 570),
    ("conv", 64, 64, 3, 568),
    ("pool", 64, 64, 2, 284),
    ("conv", 64, 128, 3, 282),
    ("conv", 128, 128, 3, 280),
    ("pool", 128, 128, 2, 140),
    ("conv", 128, 256, 3, 138),
    ("conv", 256, 256, 3, 136),
    ("pool", 256, 256, 2, 68),
    ("conv", 256, 512, 3, 66),
    ("conv", 512, 512, 3, 64),
    ("pool", 512, 512, 2, 32),
    ("conv", 512, 1024, 3, 30),
    ("conv", 1024, 1024, 3, 28),
    ("up", 1024, 512, 2, 56),
    ("conv", 1024, 512, 3, 54),
    ("conv", 512, 512, 3, 52),
    ("up", 512, 256, 2, 104),
    ("conv", 512, 256, 3, 102),
    ("conv", 256, 256, 3, 100),
    ("up", 256, 128, 2, 200),
    ("conv", 256, 128, 3, 198),
    ("conv", 128, 128, 3, 196),
    ("up", 128, 64, 2, 392),
    ("conv", 128, 64, 3, 390),
    ("conv", 64, 64, 3, 388),
    ("conv", 64, 2, 1, 388),
]
NAMES = {nn.Conv2d: "conv", nn.MaxPool2d: "pool", nn.ConvTranspose2d: "up"}


def build(**changes):
    return MODELS.build({**CONFIG, **changes}, in_channels=1, num_classes=2, spatial_dims=2)


def layer_table(model: nn.Module, size: int) -> list[tuple[str, int, int, int, int]]:
    """What a forward pass really runs, in order."""
    table = []

    def note(layer, inputs, output):
        kernel = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,)
        assert len(set(kernel)) == 1
        table.append((NAMES[type(layer)], inputs[0].shape[1], output.shape[1], kernel[0], output.shape[-1]))

    for layer in model.modules():
        if type(layer) in NAMES:
            layer.register_forward_hook(note)
    with torch.device("meta"):
        model.to("meta").eval()(torch.empty(1, 1, size, size))
    return table


def test_layers_are_those_of_the_figure():
    assert layer_table(build(), 572) == LAYERS


def test_number_of_weights_by_hand():
    by_hand = sum(i * o * k * k + o for name, i, o, k, _ in LAYERS if name != "pool")
    assert by_hand == 31_030_658
    assert sum(p.numel() for p in build().parameters()) == by_hand
    assert (
        sum(name != "pool" for name, *_ in LAYERS) == 23
    )  # the paper: "in total the network has 23 convolutional layers"


def test_572_gives_388_by_calculation_and_by_running():
    model = build(widths=[2, 2, 2, 2, 2]).eval()
    assert model.output_size((572, 572)) == (388, 388)
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert tuple(model(torch.zeros(1, 1, 188, 204)).shape[2:]) == model.output_size((188, 204)) == (4, 20)


@pytest.mark.parametrize(("size", "nearest"), [(570, "556 or 572"), (573, "572 or 588"), (100, "188")])
def test_sizes_that_pooling_cannot_halve_are_refused_with_the_nearest(size, nearest):
    model = build(widths=[2, 2, 2, 2, 2])
    with pytest.raises(MedsegError, match=f": {nearest}; 572") as refusal:
        model.output_size((size, 572))
    assert refusal.value.code == Code.MODEL
    with pytest.raises(MedsegError):
        model(torch.zeros(1, 1, size, 572))


def test_the_result_is_the_middle_of_the_input():
    """Translation: 16 voxels further in the image are 16 further in the result, and the margins match."""
    torch.manual_seed(0)
    model = build(widths=[2, 2, 2, 2, 2]).eval()
    x = torch.randn(1, 1, 236, 236)
    with torch.no_grad():
        whole = model(x)
        part = model(x[..., 16:220, 32:236])
    assert part.shape[-1] == 20
    torch.testing.assert_close(part, whole[..., 16:36, 32:52])


def test_drop_out_stands_at_the_end_of_the_contracting_path():
    probabilities = [m.p for m in build().encoder.modules() if isinstance(m, nn.Dropout)]
    assert probabilities == [0, 0, 0, 0.5, 0.5]


def test_padding_same_keeps_the_size():
    model = build(widths=[2, 2, 2, 2, 2], padding="same").eval()
    assert model.output_size((64, 80)) == (64, 80) == tuple(model(torch.zeros(1, 1, 64, 80)).shape[2:])


@pytest.mark.parametrize("changes", [{"deep_supervision": True}, {"down": "strided_convolution"}])
def test_what_needs_padding_is_refused_without(changes):
    with pytest.raises(MedsegError) as refusal:
        build(**changes)
    assert refusal.value.code == Code.CONFIG


def test_addition_works_with_cropped_skips():
    model = build(widths=[2, 2, 2, 2, 2], skip="add").eval()
    assert model(torch.zeros(1, 1, 188, 188)).shape == (1, 2, 4, 4)
