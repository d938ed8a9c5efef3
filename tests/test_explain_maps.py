"""Filters, feature maps, what excites them, saliency and shifts, on networks whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.explain.effective import effective_field
from medseg.explain.equivariance import shift_table
from medseg.explain.excitation import LARGEST, most_exciting
from medseg.explain.layers import layer_table
from medseg.explain.maps import around_middle, feature_maps, first_filters, map_places, plane
from medseg.explain.pictures import filter_grid, heat_map, image_grid, map_grid, save_picture
from medseg.explain.saliency import answered, grad_cam, gradient_saliency, occlusion_saliency
from medseg.explain.tracing import map_shapes
from medseg.models import MODELS, SegmentationModel
from medseg.models.classifiers import ClassificationModel


class Linear(SegmentationModel):
    """A convolution and a head of filters of size 1, without padding beyond the border."""

    in_channels, num_classes, spatial_dims = 1, 2, 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 1)

    @property
    def divisor(self):
        return (1, 1)

    def output_size(self, input_size):
        return input_size

    def forward(self, x):
        return self.head(self.features(x))

    @property
    def as_one(self):
        """The filters (2, 3, 3) of both layers together."""
        return torch.einsum("kc,chw->khw", self.head.weight[:, :, 0, 0], self.features.weight[:, 0]).detach()


def unet(**settings) -> SegmentationModel:
    torch.manual_seed(1)
    plain = {"name": "unet", "widths": [4, 6, 8], **settings}
    return MODELS.build(plain, in_channels=1, num_classes=3, spatial_dims=2).eval()


@pytest.fixture
def voxel() -> torch.Tensor:
    voxels = torch.zeros((9, 9), dtype=torch.bool)
    voxels[4, 5] = True
    return voxels


def test_feature_maps_are_what_the_layer_made_not_what_became_of_it():
    """The leaky ReLU works in place on what the normalisation made."""
    model, image = unet(), torch.randn(1, 16, 16)
    name = "encoder.0.block.0.0.normalisation"
    maps = feature_maps(model, image, [name, "encoder.1", ""])
    block = model.encoder[0].block[0][0]
    with torch.no_grad():
        expected = block.normalisation(block.convolution(image[None]))[0]
    torch.testing.assert_close(maps[name], expected)
    assert (maps[name] < -0.5).any()
    assert maps["encoder.1"].shape == (6, 8, 8)
    assert maps[""].shape == (3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(maps[""], model(image[None])[0])


def test_the_mode_stays_and_no_hook_is_left():
    model = unet().train()
    feature_maps(model, torch.randn(1, 16, 16), ["encoder.0"])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unknown_layers_are_refused_with_the_nearest():
    with pytest.raises(MedsegError, match=r"encoder\.1") as refusal:
        feature_maps(unet(), torch.randn(1, 16, 16), ["encodr.1"])
    assert refusal.value.code == Code.NAME
    with pytest.raises(MedsegError, match="no feature maps"):
        feature_maps(Flat(), torch.randn(1, 4, 4), ["flat"])


class Flat(Linear):
    """One layer makes no map."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()

    def forward(self, x):
        self.flat(x)
        return super().forward(x)


def test_first_filters():
    model = unet()
    name, weights = first_filters(model)
    assert name == "encoder.0.block.0.0.convolution"
    assert torch.equal(weights, model.encoder[0].block[0][0].convolution.weight)


def test_gradient_of_a_linear_network_is_its_filter(voxel):
    model, image = Linear(), torch.randn(1, 9, 9)
    heat = gradient_saliency(model, image, 1, voxel)
    expected = torch.zeros(9, 9)
    expected[3:6, 4:7] = model.as_one[1].abs()
    torch.testing.assert_close(heat, expected)


def test_occlusion_of_a_linear_network_is_filter_times_image(voxel):
    model, image = Linear(), torch.randn(1, 9, 9)
    heat = occlusion_saliency(model, image, 1, voxel, window=(1, 1), step=(1, 1), fill=0.0, batch_size=7)
    expected = torch.zeros(9, 9)
    expected[3:6, 4:7] = model.as_one[1] * image[0, 3:6, 4:7]
    torch.testing.assert_close(heat, expected, atol=1e-5, rtol=1e-4)
    done = []
    part = occlusion_saliency(
        model, image, 1, voxel, window=(3, 3), step=(3, 3), within=(slice(3, 4), slice(0, 9)), progress=done.append
    )
    assert done == [1, 1, 1]
    assert torch.isnan(part[:3]).all()
    assert torch.isnan(part[6:]).all()
    assert part[4, 5] != 0


def test_grad_cam_by_hand():
    """The gradient of the mean score is the head's weight over the number of voxels there, and 0 elsewhere."""
    model, image = Linear(), torch.randn(1, 9, 9)
    with torch.no_grad():
        maps = model.features(image[None])[0]
    voxels = torch.rand(9, 9) > 0.6
    expected = (model.head.weight[1, :, 0, 0, None, None].detach() * maps).sum(dim=0).relu() / 81
    torch.testing.assert_close(grad_cam(model, image, 1, voxels, "features"), expected)


def test_nothing_to_explain_is_refused():
    model = Linear()
    for explain in (gradient_saliency, lambda *a: grad_cam(*a, "features")):
        with pytest.raises(MedsegError, match="nothing to explain"):
            explain(model, torch.randn(1, 9, 9), 1, torch.zeros((9, 9), dtype=torch.bool))


def test_answered_of_classes_and_of_regions():
    logits = torch.tensor([[1.0, -1.0], [2.0, -3.0]])[..., None]
    assert answered(logits, 1)[:, 0].tolist() == [True, False]
    assert answered(logits, 0, overlapping=True)[:, 0].tolist() == [True, False]
    assert answered(logits, 1, overlapping=True)[:, 0].tolist() == [True, False]


def test_what_excites_a_linear_filter_is_the_filter():
    model = Linear()
    found = most_exciting(model, "features", [0, 2], (9, 9), steps=1000)
    weights = model.features.weight[[0, 2], 0].detach()
    torch.testing.assert_close(found.images[:, 0, 3:6, 3:6], LARGEST * weights.sign())
    best = LARGEST * weights.abs().sum(dim=(1, 2)) + model.features.bias[[0, 2]].detach()
    np.testing.assert_allclose(found.after, best, rtol=1e-5)
    assert all(a > b for a, b in zip(found.after, found.before, strict=True))


def test_excitation_climbs_in_a_real_network_and_repeats():
    model = unet()
    steps = []
    found = most_exciting(model, "encoder.2", [0, 3, 5], (32, 32), steps=12, progress=lambda: steps.append(1))
    assert found.images.shape == (3, 1, 32, 32)
    assert float(found.images.abs().max()) <= LARGEST
    assert all(a > b + 0.5 for a, b in zip(found.after, found.before, strict=True))
    assert len(steps) == 12
    again = most_exciting(model, "encoder.2", [0, 3, 5], (32, 32), steps=12)
    assert torch.equal(found.images, again.images)


def test_effective_field_of_a_convolution_is_its_filter():
    model = Linear()
    nn.init.constant_(model.features.weight, 1.0)
    (field,) = effective_field(model, torch.randn(2, 1, 9, 9)).values()
    assert field.extent == (3, 3)
    assert field.size == pytest.approx(3)
    assert field.influence.shape == (9, 9)
    assert float(field.influence.max()) == 1


def test_effective_field_lies_within_the_theoretical_one():
    """Without normalisation nothing else can be reached; of 68 voxels far fewer are listened to."""
    model = unet(widths=[2, 2, 2, 2], normalisation="none", down="max_pool", padding="valid", deep_supervision=False)
    fields = effective_field(model, torch.randn(2, 1, 140, 140), layers=("", "encoder.3"))
    assert max(fields["encoder.3"].extent) <= 68
    assert 1 < fields["encoder.3"].size < 68
    assert max(fields[""].extent) <= 68 + 8 * 4


def test_convolutions_without_stride_move_with_the_image():
    image = torch.randn(1, 24, 24)
    one, both = shift_table(Linear(), image, (16, 16), [(0, 1), (3, 5)])
    assert one.voxels == (0, 1)
    assert one.agreement_middle == both.agreement_middle == 1
    assert one.difference_middle < 1e-5
    assert one.difference > 1e-3  # near the borders zeros take the place of voxels


def test_pooling_moves_only_in_its_steps():
    """Without padding and normalisation nothing else is in the way."""
    model = unet(normalisation="none", down="max_pool", padding="valid", deep_supervision=False)
    assert model.divisor == (4, 4)
    table = shift_table(model, torch.randn(1, 80, 80), (68, 68), [(0, 1), (0, 2), (0, 4), (4, 8)])
    assert [shift.difference < 1e-5 for shift in table] == [False, False, True, True]
    assert table[2].agreement == table[3].agreement == 1
    assert table[0].agreement < 1


def test_a_shift_that_leaves_nothing_is_refused():
    with pytest.raises(MedsegError, match="nothing is left"):
        shift_table(Linear(), torch.randn(1, 24, 24), (8, 8), [(0, 8)])


def test_plane_of_a_volume():
    maps = torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 3, 3)
    assert plane(maps)[0, 0, 0] == 2
    assert [float(plane(maps, share)[0, 0, 0]) for share in (0, 0.49, 1)] == [0, 1, 3]
    assert plane(maps[:, 0]).shape == (2, 3, 3)


def test_filters_as_a_grid_have_grey_for_zero():
    weights = torch.zeros(6, 1, 3, 3)
    weights[0, 0, 0, 0], weights[1, 0, 2, 2] = 1.0, -0.5
    grid = filter_grid(weights)
    assert grid.dtype == np.uint8
    side = 96  # 3 pixels, 32 times
    assert grid.shape == (2 * (side + 2) + 2, 3 * (side + 2) + 2, 3)
    first, second = grid[2 : 2 + side, 2 : 2 + side], grid[2 : 2 + side, 4 + side : 4 + 2 * side]
    assert first[0, 0, 0] == 255
    assert first[-1, -1, 0] == 128
    assert second[-1, -1, 0] == 64
    assert filter_grid(torch.randn(2, 2, 3, 3, 3)).ndim == 3


def test_maps_images_and_heat_as_pictures(tmp_path):
    maps = torch.stack([torch.linspace(0, 1, 64).view(8, 8), torch.full((8, 8), 7.0)])
    grid = map_grid(maps)
    assert grid.shape[2] == 3
    assert image_grid(maps).shape == grid.shape
    heat = torch.zeros(8, 8)
    heat[2, 3] = 5.0
    picture = heat_map(maps[1], heat)
    grey = picture[0, 0]
    assert (grey == grey[0]).all()
    factor = picture.shape[0] // 8
    assert (picture[2 * factor, 3 * factor] != grey).any()
    assert heat_map(maps[1], torch.full((8, 8), torch.nan)).shape == picture.shape
    signed = heat_map(maps[1], -heat, signed=True)[2 * factor, 3 * factor].astype(int)
    assert signed[2] > signed[0]  # blue
    save_picture(tmp_path / "heat.png", picture)
    assert (tmp_path / "heat.png").stat().st_size > 0
    with pytest.raises(MedsegError):
        save_picture(tmp_path / "nowhere" / "heat.png", picture)


def test_places_of_maps_in_networks_of_this_toolkit():
    model = unet()
    places = map_places(model, layer_table(model, (16, 16)))
    assert places.stages == ("encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "heads.0")
    assert (places.before_scores, places.coarsest) == ("decoder.1", "encoder.2")


MONAI = {
    "VNet": ({}, (32, 32, 32), "network.up_tr32", "network.down_tr256"),
    "UNETR": (
        {"img_size": [16, 16, 16], "feature_size": 2, "hidden_size": 4, "mlp_dim": 4, "num_heads": 2},
        (16, 16, 16), "network.decoder2", "network.decoder5",
    ),
    "UNet": (
        {"channels": [2, 4, 8], "strides": [2, 2]}, (8, 8, 8), "network.model.1", "network.model.1.submodule.1"
    ),
}  # fmt: skip
"""Arguments, a size → the stage before the scores, and the coarsest maps."""


def of_monai(network) -> SegmentationModel:
    settings = {"name": "monai", "network": network, "arguments": MONAI[network][0]}
    return MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=3).eval()


@pytest.mark.parametrize("network", MONAI)
def test_places_of_maps_in_networks_of_monai(network):
    """Also in a transformer, of whose maps nobody says what they see."""
    _, size, before, coarsest = MONAI[network]
    model = of_monai(network)
    places = map_places(model, layer_table(model, size))
    assert (places.before_scores, places.coarsest) == (before, coarsest)


def test_what_was_found_in_a_transformer_can_be_looked_at():
    model, (_, size, before, coarsest) = of_monai("UNETR"), MONAI["UNETR"]
    image = torch.randn(1, *size)
    maps = feature_maps(model, image, (*map_places(model, layer_table(model, size)).stages, coarsest))
    assert all(found.dim() == 4 for found in maps.values())
    assert grad_cam(model, image, 1, torch.ones(size, dtype=torch.bool), before).shape == size


class Squeezing(Linear):
    """A block at half the resolution that weighs its channels by their means, as squeeze and excitation does."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.MaxPool2d(2)
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1))
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):
        low = self.down(self.features(x))
        return self.head(self.up(low * self.weigh(low)))


def test_what_is_squeezed_to_one_number_is_not_the_coarsest_map():
    model = Squeezing()
    places = map_places(model, layer_table(model, (8, 8)))
    assert (places.before_scores, places.coarsest) == ("up", "down")


def test_shapes_of_maps_are_those_that_are_computed():
    model = unet()
    shapes = map_shapes(model, (16, 32))
    maps = feature_maps(model, torch.randn(1, 16, 32), list(shapes))
    assert {name: tuple(found.shape) for name, found in maps.items()} == shapes
    assert list(shapes)[-1] == "" and not any(m._forward_hooks for m in model.modules())


class Weighing(ClassificationModel):
    """A classifier whose scores are weighted sums of the voxels."""

    in_channels, num_classes, spatial_dims = 1, 2, 2

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(36, 2)

    def forward(self, x):
        return self.scores(x.flatten(1))


def test_saliency_of_a_classifier_by_hand():
    torch.manual_seed(0)
    model, image, all_of_it = Weighing(), torch.randn(1, 6, 6), torch.ones(1, dtype=torch.bool)
    weight = model.scores.weight.detach()[1].view(6, 6)
    assert torch.allclose(gradient_saliency(model, image, 1, all_of_it), weight.abs())
    falls = occlusion_saliency(model, image, 1, all_of_it, window=(1, 1), step=(1, 1), fill=0.0)
    assert torch.allclose(falls, weight * image[0], atol=1e-6)


def test_what_the_middle_sees_is_cut_out():
    images = torch.arange(2 * 9 * 12).view(2, 9, 12)
    assert torch.equal(around_middle(images, (3, None)), images[:, 2:7])
    assert torch.equal(around_middle(images, (99, 1)), images[:, :, 5:8])
