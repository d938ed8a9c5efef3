"""V-Net, residual and attention U-Net, U-Net++ and SegNet: their papers' numbers, and what makes each what it is."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import medseg
from medseg.config import compose
from medseg.data.plan.memory import complete_settings, step_cost
from medseg.errors import Code, MedsegError
from medseg.explain.layers import layer_table
from medseg.models import MODELS
from medseg.models.blocks.gate import AttentionGate, NoGate
from medseg.models.blocks.pool import IndexedPool, Unpool
from medseg.models.blocks.residual import PreActivationResidualBlock
from medseg.models.shapes import ShapesOnly
from medseg.training.train import train

ZOO = ("vnet", "residual_unet", "attention_unet", "unet_plus_plus", "segnet")
HELD = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


def build(name: str, spatial_dims: int = 2, in_channels: int = 1, num_classes: int = 2, **settings):
    torch.manual_seed(0)
    return MODELS.build(
        {"name": name, **settings}, in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims
    )


def shapes_of(name: str, **settings) -> nn.Module:
    """The network without values: full size, in no time."""
    with ShapesOnly():
        return build(name, **settings)


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolution(channels: int, filters: int, taps: int) -> int:
    return (channels * taps + 1) * filters


class TestVNet:
    WIDTHS = (16, 32, 64, 128, 256)
    NUMBERS = (1, 2, 3, 3, 3)

    @pytest.mark.parametrize("spatial_dims", [2, 3])
    def test_number_of_weights_by_hand(self, spatial_dims):
        """Rows of 5ⁿ, steps of 2ⁿ, one learnt slope for each channel of each convolution (of a residual block: of the
        sum), and the projection of the first shortcut."""
        model = shapes_of("vnet", spatial_dims=spatial_dims, widths=self.WIDTHS, normalisation="none")
        filters, step = 5**spatial_dims, 2**spatial_dims
        expected = convolution(1, 16, filters) + 16 + 16
        for below, width, number in zip(self.WIDTHS, self.WIDTHS[1:], self.NUMBERS[1:], strict=False):
            expected += convolution(below, width, step) + width
            expected += number * (convolution(width, width, filters) + width)
        incoming = 256
        for width, number in zip(self.WIDTHS[-2::-1], self.NUMBERS[-2::-1], strict=True):
            expected += convolution(incoming, width, step) + width
            incoming = 2 * width
            expected += number * (convolution(incoming, incoming, filters) + incoming)
        assert weights(model) == expected + convolution(incoming, 2, 1)

    def test_receptive_fields_of_table_1(self):
        """Of the left stages; those of the right ones the paper counts with the step up, which adds nothing."""
        table = layer_table(shapes_of("vnet", spatial_dims=3, widths=self.WIDTHS), (128, 128, 64))
        fields = [table.of_stage(f"encoder.{i}")[-1].field for i in range(5)]
        assert fields == [(n,) * 3 for n in (5, 22, 72, 172, 372)]
        shapes = [table.of_stage(f"encoder.{i}")[-1].output for i in range(5)]
        assert shapes == [(16 * 2**i, 128 // 2**i, 128 // 2**i, 64 // 2**i) for i in range(5)]

    def test_what_enters_a_stage_is_added(self):
        model = build("vnet", widths=(4, 8)).eval()
        stage = model.encoder[1]
        x = stage.down(torch.randn(1, 4, 8, 8))
        torch.testing.assert_close(stage.block(x), stage.block.activation(x + stage.block.convolutions(x)))
        decoder = model.decoder[0]
        assert decoder.block.out_channels == 8  # up and across together, not those of the encoder
        assert len(decoder.block.shortcut) == 0


class TestResidualUNet:
    WIDTHS = (64, 128, 256, 512)

    def test_number_of_weights_of_the_paper(self):
        """7.8 million: the rows and the output; the projections of the shortcuts and the normalisations come on top."""
        model = shapes_of("residual_unet", in_channels=3, num_classes=1, widths=self.WIDTHS)
        rows = [m.convolutions for m in model.modules() if isinstance(m, PreActivationResidualBlock)]
        held = [m for row in rows for m in row.modules() if isinstance(m, HELD)]
        assert sum(map(weights, held)) + weights(model.heads) == 7_782_913
        assert len(rows) == 7 and len(held) == 14
        pairs = ((3, 64), (64, 128), (128, 256), (256, 512), (768, 256), (384, 128), (192, 64))
        projected = sum(c * k for c, k in pairs)
        normalised = 64 + sum(c + k for c, k in pairs[1:])  # the first block does without its first one
        assert weights(model) == 7_782_913 + projected + 2 * normalised

    def test_normalisation_and_activation_precede_the_convolutions(self):
        block = build("residual_unet", widths=(4, 8), strides=(1, (1, 2))).eval().encoder[1].block
        x = torch.randn(1, 4, 6, 6)
        first, second = (m for m in block.modules() if isinstance(m, nn.BatchNorm2d))
        a, b = block.convolutions[1], block.convolutions[3]
        assert a.convolution.stride == (1, 2)
        torch.testing.assert_close(block(x), block.shortcut(x) + b(torch.relu(second(a(torch.relu(first(x)))))))

    def test_the_first_convolution_sees_the_image(self):
        model = build("residual_unet", widths=(4, 8))
        assert type(next(iter(model.encoder[0].block.convolutions))).__name__ == "ConvolutionBlock"

    def test_without_normalisation_the_shortcut_keeps_its_input(self):
        block = build("residual_unet", widths=(4, 8), normalisation="none").decoder[0].block
        x = torch.randn(1, 12, 6, 6)
        before = x.clone()
        block(x)
        torch.testing.assert_close(x, before, rtol=0, atol=0)


class TestAttentionUNet:
    WIDTHS = (16, 32, 64, 128, 256)

    def test_number_of_weights(self):
        """Without gates, 3D: 5.88 million, those of the U-Net that the paper compares with; then each gate by hand."""
        settings = {"spatial_dims": 3, "widths": self.WIDTHS, "normalisation": "none", "deep_supervision": False}
        model = shapes_of("attention_unet", **settings)
        gates = [m for m in model.modules() if isinstance(m, AttentionGate)]
        plain = weights(model) - sum(map(weights, gates))
        assert plain == 5_882_544 + 2 * sum(self.WIDTHS) + 2 * sum(self.WIDTHS[:-1]) + convolution(16, 2, 1)
        assert [weights(gate) for gate in gates] == [
            k * k * 8 + convolution(below, k, 1) + convolution(k, 1, 1)
            for below, k in ((256, 128), (128, 64), (64, 32))
        ]
        assert [type(stage.gate) for stage in model.decoder] == [AttentionGate] * 3 + [NoGate]

    def test_equation_of_the_gate(self):
        torch.manual_seed(0)
        gate = AttentionGate(3, 5, (1, 2))
        x, g = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 4, 3)
        weight = torch.sigmoid(gate.score(torch.relu(gate.from_across(x) + gate.from_below(g))))
        assert weight.shape == (2, 1, 4, 3)
        expected = x * nn.functional.interpolate(weight, scale_factor=(1.0, 2.0), mode="bilinear")
        torch.testing.assert_close(gate(x, g), expected)
        nn.init.constant_(gate.score.bias, -100.0)
        assert gate(x, g).abs().max() < 1e-20

    def test_gated_maps_meet_what_comes_up(self):
        model = build("attention_unet", widths=(4, 8, 8)).eval()
        stage = model.decoder[0]
        below, across = torch.randn(1, 8, 2, 2), torch.randn(1, 8, 4, 4)
        merged = torch.cat((stage.gate(across, below), stage.up(below)), dim=1)
        torch.testing.assert_close(stage(below, across), stage.block(merged))


class TestUNetPlusPlus:
    def test_number_of_weights_of_the_paper(self):
        """9.04 million, and a U-Net of the same widths 7.76."""
        widths = (32, 64, 128, 256, 512)
        model = shapes_of("unet_plus_plus", num_classes=1, widths=widths, normalisation="none")
        assert weights(model) == 9_041_700 and len(model.heads) == 4
        unet = {"normalisation": "none", "down": "max_pool", "deep_supervision": False, "widths": widths}
        assert weights(shapes_of("unet", num_classes=1, **unet)) == 7_759_521

    def test_nodes_are_joined_as_in_figure_1(self):
        model = build("unet_plus_plus", widths=(4, 6, 8, 10)).eval()
        x = torch.randn(1, 1, 16, 16)

        def join(stage, below, *row):
            return stage.block(torch.cat((*row, stage.up(below)), dim=1))

        with torch.no_grad():
            x00, x10, x20, x30 = model.encoded(x)
            (n01, n02), (n11,) = model.nested
            n21, n12, n03 = model.decoder
            x01, x11, x21 = join(n01, x10, x00), join(n11, x20, x10), join(n21, x30, x20)
            x02, x12 = join(n02, x11, x00, x01), join(n12, x21, x10, x11)
            x03 = join(n03, x12, x00, x01, x02)
            scores = [head(node) for head, node in zip(model.heads, (x03, x02, x01), strict=True)]
            torch.testing.assert_close(model(x), sum(scores) / 3)
            model.train()
            assert len(model(x)) == 3

    def test_one_head_without_deep_supervision(self):
        model = build("unet_plus_plus", 3, widths=(4, 4, 4), deep_supervision=False)
        assert len(model.heads) == 1 and model(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


class TestSegNet:
    WIDTHS = (64, 128, 256, 512, 512, 512)

    def test_number_of_weights_of_the_paper(self):
        """The encoder is VGG-16's (14 714 688 weights); in all 29.4 million."""
        model = shapes_of("segnet", in_channels=3, num_classes=11, widths=self.WIDTHS)
        held = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
        assert len(held) == 13 and sum(map(weights, held)) == 14_714_688
        up = ((512, 512),) * 5 + ((512, 256),) + ((256, 256),) * 2 + ((256, 128), (128, 128), (128, 64), (64, 64))
        decoder = sum(convolution(c, k, 9) for c, k in up)
        normalised = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512) + 2 * sum(k for _, k in up)
        assert weights(model) == 14_714_688 + decoder + normalised + convolution(64, 11, 1) == 29_443_723

    @pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2), (3, 2, 2)], ids=str)
    def test_values_go_back_to_their_places(self, stride):
        x = torch.randperm(2 * 3 * 6 ** len(stride)).float().view(2, 3, *(6,) * len(stride)) + 1
        pool, unpool = IndexedPool(3, stride), Unpool(3, stride)
        values, places = pool(x)
        back = unpool(values, places)
        kept = back != 0
        assert back.shape == x.shape and kept.sum() == values.numel()
        torch.testing.assert_close(back[kept], x[kept])
        torch.testing.assert_close(pool(back)[0], values)

    def test_each_stage_gets_the_places_of_its_own_pooling(self):
        """And nothing else comes across; the lowest stage only holds pooled maps."""
        model = build("segnet", widths=(4, 6, 6)).eval()
        (first, second, lowest), (low, high) = model.encoder, model.decoder
        pool, unpool = nn.functional.max_pool2d, nn.functional.max_unpool2d
        x = torch.randn(2, 1, 8, 12)
        with torch.no_grad():
            a, places_a = pool(first.block(x), 2, return_indices=True)
            b, places_b = pool(second.block(a), 2, return_indices=True)
            up = high.block(unpool(low.block(unpool(b, places_b, 2)), places_a, 2))
            torch.testing.assert_close(model(x), model.heads[0](up))
        assert len(lowest.block) == 0 and low.block.out_channels == 4


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_gives_stages_and_memory(name):
    """Widths and strides that nobody has set come from the plan; what a step takes is counted on the network."""
    stages = ((8, 16, 32), ((1, 3, 3), (3, 3, 3), (3, 3, 3)), ((1, 1, 1), (1, 2, 2), (2, 2, 2)))
    settings = complete_settings({"name": name}, *stages)
    cost = step_cost(settings, in_channels=2, num_outputs=3, patch_size=(4, 16, 16))
    model = build(**settings, spatial_dims=3, in_channels=2, num_classes=3)
    assert cost.num_weights == weights(model) and model.divisor == (2, 4, 4)
    # What goes back reads at least the image and the maps of two convolutions at full resolution.
    assert cost.num_saved > (2 + 8 + 8) * 4 * 16 * 16
    if name != "vnet":
        first = next(m for m in model.modules() if isinstance(m, nn.Conv3d) and m.kernel_size != (1, 1, 1))
        assert first.kernel_size == (1, 3, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "vnet", "num_convolutions": [1, 2]},
        {"name": "vnet", "kernel": 4},
        {"name": "vnet", "num_groups": 0},
        {"name": "segnet", "widths": [4, 4, 4], "num_convolutions": [2, 0]},
        {"name": "residual_unet", "num_convolutions": 0},
        {"name": "attention_unet", "num_convolutions": 101},
        {"name": "unet_plus_plus", "widths": [4]},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(MedsegError) as refusal:
        build(**wrong)
    assert refusal.value.code == Code.CONFIG


@pytest.mark.parametrize("name", [*ZOO, "deepmedic"])
def test_training_bundle_and_prediction(tiny_run, tmp_path: Path, name: str) -> None:
    """Two steps in bf16 through the ordinary road, and labels on the scan's own grid by the bundle that they leave."""
    folder = tmp_path / "run"
    small = ["data.plan.base_width=4", "data.plan.num_stages=3", "data.plan.patch_size=[8,16,16]"]
    if name == "deepmedic":
        small = ["model.filters=[4,6,6,8]", "model.hidden=[8]", "data.plan.patch_size=[30,33,36]"]
    overrides = [
        *(f"data.root='{tiny_run.data}'", f"model={name}", *small, "data.plan.batch_size=2"),
        *("trainer.device=cpu", "trainer.precision=bf16", "trainer.max_steps=2", "trainer.num_validations=1"),
        *("trainer.log_steps=1", "trainer.overlay_cases=0", "trainer.map_cases=0", "trainer.embedding_cases=0"),
        "trainer.final_predictions=false",
    ]
    with (tmp_path / "console.txt").open("w") as log:
        result = train(compose("train", overrides), folder, Console(file=log))
    assert result.steps == 2
    with (folder / "history.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    predictor = medseg.Predictor.load(folder, device="cpu", precision="fp32")
    labels = predictor(tiny_run.dicom).labels
    assert labels.grid.difference(medseg.Predictor.load(tiny_run.run, device="cpu")(tiny_run.dicom).labels.grid) is None
