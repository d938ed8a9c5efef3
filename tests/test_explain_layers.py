"""The table of layers: receptive fields, weights and work against hand calculation and against gradients."""

from __future__ import annotations

import io
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from matplotlib.transforms import Bbox
from rich.console import Console
from test_unet_paper import LAYERS, build
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.explain.drawing import drawing_figure, save_drawing
from medseg.explain.graph import graph_of
from medseg.explain.layers import layer_table
from medseg.explain.reach import Reach
from medseg.explain.subject import of_settings
from medseg.explain.text import print_layers, quantity
from medseg.explain.tracing import trace
from medseg.models import MODELS, SegmentationModel

SKIPS = {"fusionnet": "add", "monai": "add", "fcn": "add", "segnet": "pool indices"}
"""What is written at the skips of a drawing; of all others concat."""
KINDS = {"conv": "convolution", "pool": "pooling", "up": "transposed convolution"}


def unet_2015_table(size: int = 572):
    with torch.device("meta"):
        model = build()
    return layer_table(model, (size, size))


def test_unet_2015_has_the_layers_of_the_figure():
    layers = [layer for layer in unet_2015_table().layers if layer.window is not None]
    table = [
        (layer.kind, layer.inputs[0][0], layer.output[0], layer.window.kernel[0], layer.output[1]) for layer in layers
    ]
    assert table == [(KINDS[kind], *rest) for kind, *rest in LAYERS]


def test_unet_2015_weights_and_multiply_adds_by_hand():
    table = unet_2015_table()
    filtering = [layer for layer in table.layers if layer.kind.endswith("convolution")]
    by_hand = [(i, o, k, n) for kind, i, o, k, n in LAYERS if kind != "pool"]
    assert [layer.weights for layer in filtering] == [i * o * k * k + o for i, o, k, _ in by_hand]
    assert sum(layer.weights for layer in table.layers) == table.weights == 31_030_658
    # A convolution looks at C·F² numbers for each of its own; a 2×2 up-convolution, whose filters do not overlap, at C
    work = [n * n * i * o * (k * k if layer.kind == "convolution" else 1) for layer, (i, o, k, n) in
            zip(filtering, by_hand, strict=True)]  # fmt: skip
    assert [layer.macs for layer in filtering] == work
    assert sum(layer.macs for layer in table.layers) == sum(work)


def test_unet_2015_without_weight_sharing_by_hand():
    first, *_, last = (layer for layer in unet_2015_table().layers if layer.kind == "convolution")
    assert first.weights == 640
    assert first.weights_unshared == 570 * 570 * 64 * (9 + 1)
    assert first.weights_dense == 572 * 572 * (570 * 570 * 64) + 570 * 570 * 64
    assert last.weights_dense == (388 * 388 * 64) * (388 * 388 * 2) + 388 * 388 * 2
    up = next(layer for layer in unet_2015_table().layers if layer.kind == "transposed convolution")
    # each of 1024 · 28² numbers has its own 2×2 filters for 512 maps; each of 512 · 56² numbers its own bias
    assert up.weights_unshared == 28 * 28 * 1024 * 512 * 4 + 56 * 56 * 512


def test_unet_2015_receptive_field_by_hand():
    """Down: each 3×3 adds 2 jumps, each pooling one. Up: counted backwards from a voxel of the result.

    Its two convolutions need 5 voxels of the highest resolution, which lie over 3 of the next (either parity); with
    two convolutions 7, which lie over 4; 8, which lie over 4 or 5; 9, over 5 voxels of the lowest resolution. Each of
    these sees 140, and the next one 16 further.
    """
    table = unet_2015_table()
    fields = {stage: table.of_stage(stage)[-1].field for stage in table.stages}
    down = [5, 5 + 1 + 4 * 2, 14 + 2 + 4 * 4, 32 + 4 + 4 * 8, 68 + 8 + 4 * 16]
    assert [fields[f"encoder.{i}"] for i in range(5)] == [(n, n) for n in down]
    assert down == [5, 14, 32, 68, 140]
    assert table.field == fields["heads.0"] == (140 + 16 * (5 - 1),) * 2
    jumps = [table.of_stage(stage)[-1].jump[0] for stage in table.stages]
    assert jumps == [1, 2, 4, 8, 16, 8, 4, 2, 1, 1]


def test_fusionnet_receptive_field_and_weights_by_hand():
    """Five 3×3 convolutions per stage. Up (F 3, S 2, P 1): an odd voxel is made of two of the coarser ones.

    Backwards: 11 voxels lie over at most 7; with five convolutions 17, over at most 10; 20, over 11; 21, over at most
    12 of the lowest resolution, of which each sees 326, and the next one 16 further.
    """
    with torch.device("meta"):
        model = MODELS.build({"name": "fusionnet"}, in_channels=1, num_classes=2, spatial_dims=2)
    table = layer_table(model, (640, 640))
    fields = [table.of_stage(f"encoder.{i}")[-1].field[0] for i in range(5)]
    assert fields == [11, 11 + 1 + 10 * 2, 32 + 2 + 10 * 4, 74 + 4 + 10 * 8, 158 + 8 + 10 * 16]
    assert table.field == (326 + 16 * (12 - 1),) * 2
    first = sum(layer.weights for layer in table.of_stage("encoder.0"))
    assert first == (9 + 1) * 64 + 4 * (9 * 64 + 1) * 64 + 5 * 2 * 64  # five convolutions and their batch norms
    assert sum(layer.weights for layer in table.layers) == table.weights
    added = [layer for layer in table.layers if layer.kind == "merge"]
    assert len(added) == 9 + 4  # residual sums and skips
    assert {layer.function for layer in added} == {"add"}


def linear(model: SegmentationModel) -> SegmentationModel:
    """Every path counts: no weight is 0 or negative, and nothing cancels."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e-2)
    return model.double().eval()


def support(model: SegmentationModel, size: tuple[int, ...], voxel: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last voxel of the image, per axis, that a voxel of the result has a gradient to."""
    image = torch.ones((1, 1, *size), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(image)[(0, 0, *voxel)], image)
    places = gradient[0, 0].nonzero()
    return list(zip(places.amin(dim=0).tolist(), places.amax(dim=0).tolist(), strict=True))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"name": "unet", "widths": [1, 1, 1, 1], "padding": "valid", "down": "average_pool"}, (132, 132)),
        ({"name": "unet", "widths": [1, 1, 1], "down": "strided_convolution", "strides": [1, (1, 2), 2]}, (64, 96)),
        ({"name": "unet", "widths": [1, 1, 1], "up": "interpolation", "down": "average_pool"}, (96, 96)),
        ({"name": "unet", "widths": [1, 1, 1], "up": "interpolation_convolution", "strides": [1, 3, 2]}, (120, 120)),
        ({"name": "fusionnet", "widths": [1, 1, 1], "down": "average_pool"}, (128, 128)),
        ({"name": "residual_encoder_unet", "widths": [1, 1, 1], "num_blocks": [1, 1, 2]}, (96, 96)),
    ],
    ids=["valid", "per axis", "interpolation", "factor 3", "fusionnet", "residual"],
)
def test_receptive_fields_are_where_gradients_are(settings, size):
    """Exactly, for voxels at every place between the coarser ones."""
    settings = {**settings, "normalisation": "none", "activation": "linear"}
    if settings["name"] != "residual_encoder_unet":
        settings["deep_supervision"] = False
    if settings["name"] == "residual_encoder_unet":
        settings["normalisation"] = "batch"  # its blocks start as shortcuts of a normalisation
    model = linear(MODELS.build(settings, in_channels=1, num_classes=1, spatial_dims=2))
    reaches = trace(model, size)[-1].reaches
    output = model.output_size(size)
    for step in range(max(len(reach.lows) for reach in reaches)):
        voxel = tuple(n // 2 + step for n in output)
        expected = [(reach.low(o), reach.high(o)) for reach, o in zip(reaches, voxel, strict=True)]
        assert support(model, size, voxel) == expected, step


def test_reach_of_single_steps():
    assert Reach().windowed(3, padding=1) == Reach((-1,), (1,), 1)
    pooled = Reach().windowed(2, stride=2)
    assert (pooled.size, pooled.jump) == (2, 2)
    up = pooled.transposed(2, stride=2)
    assert (up.size, up.jump, len(up.lows)) == (2, 1, 2)
    assert [(up.low(o), up.high(o)) for o in (-1, 0, 1, 2)] == [(-2, -1), (0, 1), (0, 1), (2, 3)]
    assert Reach().merged(up) == Reach((0, 0), (1, 1), 2)
    assert Reach().merged(pooled) is None
    assert [Reach().interpolated(2, linear=True).low(o) for o in (0, 1)] == [-1, 0]


class Gated(SegmentationModel):
    """Two convolutions, the maps of the first weighted by their mean over the image."""

    in_channels, num_classes, spatial_dims = 1, 2, 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def output_size(self, input_size):
        return input_size

    def forward(self, x):
        maps = torch.relu(self.first(x))
        return self.last(maps * maps.mean(dim=(2, 3), keepdim=True))


def test_what_is_not_known_is_not_stated_too_small():
    first, *_, last = layer_table(Gated(), (16, 16)).layers
    assert first.field == (3, 3)
    assert last.field == (None, None) and last.jump == (1, 1)  # but where its voxels lie is known


@pytest.mark.parametrize("size", [(570, 572), (100, 572)])
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(size):
    with torch.device("meta"):
        model = build()
    with pytest.raises(MedsegError, match=r"nearest that fit, axis by axis: (556 or 572|188); 572") as refusal:
        layer_table(model, size)
    assert refusal.value.code == Code.MODEL
    with pytest.raises(MedsegError, match="another number of axes"):
        layer_table(model, (572, 572, 572))


@pytest.mark.parametrize("name", MODELS.names())
def test_every_registered_model_has_a_table_and_a_drawing(name, tmp_path):
    dims = 2
    settings = {"name": name}
    if name == "monai":
        settings |= {"network": "SegResNet", "arguments": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}}
    model = MODELS.build(settings, in_channels=2, num_classes=3, spatial_dims=dims).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size = model.next_size((40, 64))
    table = layer_table(model, size)
    assert table.layers[-1].output == (3, *model.output_size(size))
    assert sum(layer.weights for layer in table.layers) + table.weights_elsewhere == table.weights
    assert table.weights == sum(p.numel() for p in model.parameters())
    assert None not in table.field
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model.eval()(torch.zeros(1, 2, *size)).sum().backward()
    assert table.weights_elsewhere == sum(p.numel() for p in model.parameters() if p.grad is None)
    save_drawing(tmp_path / "network.svg", table, title=name)
    text = "".join(ET.parse(tmp_path / "network.svg").getroot().itertext())
    assert SKIPS.get(name, "concat") in text
    assert "image" in text


def test_the_drawing_shows_what_skips_do():
    words = [text.get_text() for text in drawing_figure(unet_2015_table(), title="U-Net").axes[0].texts]
    assert words.count("concat") == 4
    assert {"cut to 392×392", "cut to 56×56", "encoder.4", "1024×28×28", "U-Net", "2 × conv 3×3"} < set(words)
    assert sum(word.startswith("max pool 2×2") for word in words) == 4
    with torch.device("meta"):
        model = build(padding="same", skip="add")
    words = [text.get_text() for text in drawing_figure(layer_table(model, (64, 64))).axes[0].texts]
    assert words.count("add") == 4
    assert not any(word.startswith("cut") for word in words)


def test_table_as_text_and_json():
    table = unet_2015_table()
    content = json.loads(json.dumps(table.to_json("bf16")))
    assert content["total"]["weights"] == 31_030_658
    assert content["layers"][0]["output_size"] == ["(572 − 3 + 2·0) / 1 + 1 = 570"] * 2
    assert content["layers"][0]["activation_bytes"] == 2 * 64 * 570 * 570
    assert sum(stage["weights"] for stage in content["stages"]) == 31_030_658
    assert content["layers"][1]["activation_bytes"] == 0  # in place
    for width in (140, 90):
        shown = io.StringIO()
        print_layers(table, Console(file=shown, width=width))
        text = shown.getvalue()
        assert "image 1×572×572 → 2×388×388" in text
        assert ("unshared" in text) == (width == 140)
        (first,) = [line for line in text.splitlines() if "64×570×570" in line]
        assert "conv 3 + ReLU" in first
        assert "187 M" in first
        assert max(map(len, text.splitlines())) <= width
    every = io.StringIO()
    print_layers(table, Console(file=every, width=140), every=True)
    assert every.getvalue().count("ReLU") == 18


def test_strides_that_do_not_divide_are_rounded_down():
    with torch.device("meta"):
        model = MODELS.build({"name": "unet", "widths": [4, 4]}, in_channels=1, num_classes=2, spatial_dims=2)
    strided = next(layer for layer in layer_table(model, (32, 32)).layers if layer.output[1] == 16)
    assert strided.arithmetic[0] == "⌊(32 − 3 + 2·1) / 2⌋ + 1 = 16"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0"), (640, "640"), (31_030_658, "31 M"), (999_600, "1 M"), (6.8e12, "6.8 T")]
)
def test_quantities(number, words):
    assert quantity(number) == words


def test_drawing_into_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(MedsegError) as refusal:
        save_drawing(tmp_path / "nowhere" / "network.svg", unet_2015_table(188))
    assert refusal.value.code == Code.OUTPUT


def answers_to(model: nn.Module, size: tuple[int, int], voxel: tuple[int, int], draws: int) -> list[tuple[int, int]]:
    """First and last voxel of the image, per axis, that change a voxel of the result in any of several random images.

    Gradients do not tell of un-pooling: a voxel may only move a maximum to another place.
    """
    generator, found = torch.Generator().manual_seed(0), torch.zeros(size, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(draws):
            image = torch.randn((1, 1, *size), generator=generator, dtype=torch.float64)
            changed = image.expand(size[0] * size[1], 1, *size).clone()
            changed.view(len(changed), -1)[range(len(changed)), range(len(changed))] += 3
            change = model(changed)[(slice(None), 0, *voxel)] - model(image)[(0, 0, *voxel)]
            found |= change.abs().gt(1e-9).view(size)
    places = found.nonzero()
    return list(zip(places.amin(dim=0).tolist(), places.amax(dim=0).tolist(), strict=True))


class Unpooling(SegmentationModel):
    """What SegNet is made of: the maxima's places come across, the values from below."""

    in_channels, num_classes, spatial_dims = 1, 1, 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.below, self.last = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

    def output_size(self, input_size):
        return input_size

    def forward(self, x):
        pooled, places = nn.functional.max_pool2d(self.first(x), 2, return_indices=True)
        return self.last(nn.functional.max_unpool2d(self.below(pooled), places, 2))


class Repeating(Unpooling):
    """A pathway of a third of the resolution beside one of full resolution, as in DeepMedic."""

    def forward(self, x):
        below = self.below(x[..., 1::3, 1::3])
        return self.first(x) + below.repeat_interleave(3, dim=-1).repeat_interleave(3, dim=2)


@pytest.mark.parametrize("kind", [Unpooling, Repeating])
def test_receptive_fields_of_unpooling_and_of_pathways(kind):
    torch.manual_seed(1)
    model, size = kind().double(), (18, 18)
    reaches = trace(model, size)[-1].reaches
    for step in range(max(len(reach.lows) for reach in reaches)):
        voxel = (8 + step, 8)
        expected = [(reach.low(o), reach.high(o)) for reach, o in zip(reaches, voxel, strict=True)]
        assert answers_to(model, size, voxel, draws=6) == expected, step


def test_classifiers_have_a_table_by_hand():
    subject = of_settings({"name": "cnn", "widths": [4, 8], "head": "flatten", "hidden": [16]}, num_classes=3)
    table = layer_table(subject.model, subject.size)
    assert subject.size == (224, 224) and table.output_size == () and table.layers[-1].output == (3,)
    hidden, scores = (layer for layer in table.layers if layer.kind == "product")
    assert hidden.weights == 8 * 56 * 56 * 16 + 16 == hidden.macs + 16 and scores.weights == 16 * 3 + 3
    assert table.of_stage("backbone.stages.1")[-1].field == (16, 16) and hidden.field == (None, None)
    assert sum(layer.weights for layer in table.layers) == table.weights
    shown = io.StringIO()
    print_layers(table, Console(file=shown, width=140))
    assert "fully connected + ReLU" in shown.getvalue()
    words = [text.get_text() for text in drawing_figure(table).axes[0].texts]
    assert {"backbone.stages.1", "8×56×56", "2 × fully connected"} < set(words)
    with pytest.raises(MedsegError, match="at least") as refusal:
        layer_table(of_settings({"name": "cnn"}).model, (8, 64))
    assert refusal.value.code == Code.MODEL and "(16, 64)" in str(refusal.value)
    with pytest.raises(MedsegError, match="another number of axes"):
        layer_table(subject.model, (224, 224, 224))


@pytest.mark.parametrize("network", ["resnet18", "densenet121", "efficientnet_b0"])
def test_classifiers_of_torchvision_see_all_and_are_counted(network):
    with torch.device("meta"):
        subject = of_settings({"name": "torchvision", "network": network}, in_channels=3, num_classes=1000)
    table = layer_table(subject.model, (64, 64))
    # As their papers and torchvision state them
    assert table.weights == {"resnet18": 11_689_512, "densenet121": 7_978_856, "efficientnet_b0": 5_288_548}[network]
    assert table.weights_elsewhere == 0
    last_maps = table.of_stage("backbone.stages.4")[-1]
    assert last_maps.jump == (32, 32)
    # Squeeze and excitation weighs maps with their mean over the image, so that each place sees all of it
    assert last_maps.field == {"resnet18": (435, 435), "efficientnet_b0": (None, None)}.get(network, last_maps.field)
    words = [text.get_text() for text in drawing_figure(table).axes[0].texts]
    assert "mean pool" in words and "fully connected" in words


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("segnet", {"pool indices", "max unpool 2×2, stride 2×2"}),
        ("attention_unet", {"gate → concat", "concat", "interpolation"}),
        ("unet_plus_plus", {"nested.0.1", "mean", "result"}),
        ("deepmedic", {"1 of 3 voxels", "concat"}),
        ("fcn", {"add", "backbone.stages.0"}),
    ],
)
def test_drawings_say_how_maps_meet(name, expected):
    with torch.device("meta"):
        subject = of_settings({"name": name})
    words = {text.get_text() for text in drawing_figure(layer_table(subject.model, subject.size)).axes[0].texts}
    assert expected <= words


def test_maps_are_merged_where_sizes_are_equal():
    with torch.device("meta"):
        subject = of_settings({"name": "fcn"})
    boxes, edges = graph_of(layer_table(subject.model, subject.size))
    added = {(edge.source, edge.target) for edge in edges if edge.skip == "add"}
    assert added == {("heads.1", "up.0"), ("heads.2", "up.1")}
    assert all(boxes[a].layers[-1].output == boxes[b].layers[-1].output for a, b in added)


@pytest.mark.parametrize("name", ["unet", "unet_plus_plus", "fcn", "deepmedic"])
def test_words_and_lines_of_drawings_stay_clear_of_each_other(name):
    with torch.device("meta"):
        subject = of_settings({"name": name})
    figure = drawing_figure(layer_table(subject.model, subject.size))
    figure.canvas.draw()
    ax = figure.axes[0]
    words = [(t.get_text(), t.get_window_extent()) for t in ax.texts if t.get_text()]
    for (a, first), (b, second) in itertools.combinations(words, 2):
        assert not first.overlaps(second), (a, b)
    pieces = []
    for line in ax.lines:
        points = ax.transData.transform(line.get_xydata())
        pieces += [(line, Bbox([a, b])) for a, b in itertools.pairwise(points)]
    for text, box in words:
        assert not any(box.overlaps(piece) for _, piece in pieces), text
    level = [(line, piece) for line, piece in pieces if piece.height < 1e-6]
    for (one, a), (other, b) in itertools.combinations(level, 2):
        shared = min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
        assert one is other or abs(a.y0 - b.y0) > 1 or shared < 1
