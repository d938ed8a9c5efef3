"""Fully convolutional networks: the classifier's scores at every place, skips that add, interpolation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.models.backbones import load_backbone
from medseg.models.classifiers import CLASSIFIERS
from medseg.models.fcn import LinearUp
from medseg.models.shapes import ShapesOnly

CNN = {"name": "cnn", "widths": [4, 8, 8], "num_convolutions": 1}


def pair(classifier: dict, spatial_dims: int, **settings):
    """A classifier with statistics of some images, and what is made of it."""
    torch.manual_seed(0)
    context = {"in_channels": 1, "num_classes": 3, "spatial_dims": spatial_dims}
    source = CLASSIFIERS.build(classifier, **context)
    with torch.no_grad():
        for _ in range(3):
            source.train()(torch.randn(2, 1, *(48,) * spatial_dims) + 0.5)
    model = MODELS.build({"name": "fcn", "classifier": classifier, **settings}, **context)
    tensors = source.state_dict()
    load_backbone(model.backbone, dict(source.backbone.state_dict()))
    model.load_classifier(tensors)
    return source.eval(), model.eval()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("window", [3, 4, 6])
def test_scores_are_the_classifiers_where_its_window_is_the_image(spatial_dims, window):
    classifier = {**CNN, "widths": [4, 8], "head": "flatten", "hidden": [20, 10], "image_size": 4 * window}
    if window == 6:
        classifier["hidden"] = []
    torch.manual_seed(0)
    context = {"in_channels": 1, "num_classes": 3, "spatial_dims": spatial_dims}
    source = CLASSIFIERS.build(classifier, **context).eval()
    model = MODELS.build({"name": "fcn", "classifier": classifier, "output_stride": 4}, **context).eval()
    load_backbone(model.backbone, dict(source.backbone.state_dict()))
    model.load_classifier(source.state_dict())
    x = torch.randn(2, 1, *(4 * window,) * spatial_dims)
    with torch.no_grad():
        expected, scores = source(x), model.coarse_scores(x)
    centre = (slice(None), slice(None), *((window - 1) // 2,) * spatial_dims)
    torch.testing.assert_close(scores[centre], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(scores[(slice(None), slice(None), *(0,) * spatial_dims)], expected, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_scores_are_the_classifiers_on_every_crop_of_a_larger_image(spatial_dims):
    """With filters of size 1 no padding tells a crop from the image."""
    classifier = {**CNN, "widths": [4, 8], "kernel": 1, "head": "flatten", "hidden": [20], "image_size": 12}
    torch.manual_seed(0)
    context = {"in_channels": 1, "num_classes": 3, "spatial_dims": spatial_dims}
    source = CLASSIFIERS.build(classifier, **context).eval()
    model = MODELS.build({"name": "fcn", "classifier": classifier, "output_stride": 4}, **context).eval()
    load_backbone(model.backbone, dict(source.backbone.state_dict()))
    model.load_classifier(source.state_dict())
    x = torch.randn(1, 1, *(32,) * spatial_dims)
    with torch.no_grad():
        scores = model.coarse_scores(x)
        for start in (0, 8, 20):
            crop = (slice(None), slice(None), *(slice(start, start + 12),) * spatial_dims)
            place = (slice(None), slice(None), *(start // 4 + 1,) * spatial_dims)
            torch.testing.assert_close(scores[place], source(x[crop]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("classifier", [CNN, {"name": "torchvision"}], ids=lambda c: c["name"])
def test_the_mean_of_the_scores_is_the_classifiers(classifier, spatial_dims):
    source, model = pair(classifier, spatial_dims, output_stride=8)
    x = torch.randn(1, 1, *(64, 32, 32)[:spatial_dims])
    with torch.no_grad():
        expected, scores = source(x), model.coarse_scores(x)
    torch.testing.assert_close(scores.flatten(2).mean(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_earlier_maps_add_nothing_at_first_and_learn(spatial_dims):
    """FCN-8s begins as FCN-32s does, but for how it interpolates; then the skips change the scores."""
    settings = {"name": "fcn", "classifier": {**CNN, "widths": [4, 4, 4, 4]}, "output_stride": 4}
    torch.manual_seed(0)
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=spatial_dims).eval()
    assert model.scored == [3, 2, 1] and len(model.heads) == 3 and len(model.up) == 2
    x = torch.randn(1, 1, *(32,) * spatial_dims)
    with torch.no_grad():
        scores, coarse = model(x), model.coarse_scores(x)
        up = coarse
        for layer in model.up:
            up = layer(up)
        torch.testing.assert_close(scores, model.interpolation(up))
        nn.init.ones_(model.heads[2].convolution.weight)
        assert not torch.allclose(model(x), scores)
    assert scores.shape == (1, 2, *x.shape[2:])


@pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2), (4, 3)], ids=str)
def test_up_sampling_begins_as_linear_interpolation(stride):
    up = LinearUp(3, stride)
    x = torch.randn(1, 3, *(6, 7, 8)[: len(stride)])
    with torch.no_grad():
        found = up(x)
    expected = F.interpolate(
        x, scale_factor=tuple(map(float, stride)), mode="bilinear" if len(stride) == 2 else "trilinear"
    )
    assert found.shape == expected.shape
    inside = (slice(None), slice(None), *(slice(s, -s) if s > 1 else slice(None) for s in stride))
    torch.testing.assert_close(found[inside], expected[inside])
    assert all(p.requires_grad for p in up.parameters())


def test_the_default_has_five_poolings_and_weights_that_follow():
    with ShapesOnly():
        model = MODELS.build({"name": "fcn"}, in_channels=1, num_classes=2, spatial_dims=2)
    assert model.divisor == (32, 32)
    assert [len(model.heads), len(model.layers), len(model.up)] == [3, 2, 2]
    convolutions, channels = 0, 1
    for width in (32, 64, 128, 256, 256):
        convolutions += 9 * channels * width + 3 * width + 9 * width * width + 3 * width
        channels = width
    connected = (256 * 9 * 256 + 256) + (256 * 256 + 256) + (256 * 2 + 2)
    skips = (256 * 2 + 2) + (128 * 2 + 2) + 2 * (2 * 4 * 4)
    assert sum(p.numel() for p in model.parameters()) == convolutions + connected + skips


def test_layers_of_other_sizes_are_refused():
    source, _ = pair(CNN, 2)
    other = MODELS.build({"name": "fcn", "classifier": CNN}, in_channels=1, num_classes=2, spatial_dims=2)
    before = other.heads[0].convolution.weight.clone()
    other.load_classifier(source.state_dict(), with_scores=False)
    assert torch.equal(other.heads[0].convolution.weight, before)
    with pytest.raises(MedsegError, match=r"head\.scores"):
        other.load_classifier(source.state_dict())
    flat = {**CNN, "head": "flatten", "hidden": [4], "image_size": 24}
    wrong = CLASSIFIERS.build(flat, in_channels=1, num_classes=3, spatial_dims=2)
    target = MODELS.build(
        {"name": "fcn", "classifier": {**flat, "hidden": [5]}}, in_channels=1, num_classes=3, spatial_dims=2
    )
    with pytest.raises(MedsegError, match=r"head\.hidden\.0") as refusal:
        target.load_classifier(wrong.state_dict())
    assert refusal.value.code == Code.MODEL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_stride": 12}, "2 or 4 or 8"),
        ({"output_stride": 64}, "2 or 4 or 8"),
        ({"classifier": "some/run"}, "name a run"),
        ({"frozen_stages": 7}, "stage_0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(MedsegError, match=message) as refusal:
        MODELS.build({"name": "fcn", "classifier": CNN, **settings}, in_channels=1, num_classes=2, spatial_dims=2)
    assert refusal.value.code == Code.CONFIG
