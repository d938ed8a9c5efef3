"""U-Net with a ResNet encoder: weights counted, skips, frozen stages, inflation."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import Code, MedsegError
from medseg.explain.tracing import trace
from medseg.models import MODELS
from medseg.models.backbones import load_backbone
from medseg.models.classifiers import CLASSIFIERS
from medseg.models.shapes import ShapesOnly

NARROW = {"name": "unet_resnet", "decoder_widths": [8, 8, 8, 8, 4], "num_convolutions": 1}


def build(spatial_dims: int = 2, *, in_channels: int = 1, **settings):
    torch.manual_seed(0)
    return MODELS.build({**NARROW, **settings}, in_channels=in_channels, num_classes=2, spatial_dims=spatial_dims)


@pytest.mark.parametrize(("encoder", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_the_encoder_has_the_weights_that_are_published(encoder, published):
    """Without the fully connected layer of 1000 classes."""
    with ShapesOnly():
        model = build(in_channels=3, encoder=encoder)
    assert sum(p.numel() for p in model.backbone.parameters()) == published - 513 * 1000


def test_the_decoder_has_the_weights_that_follow_from_its_widths():
    """Steps up of 2×2 with bias; convolutions of 3×3 with bias and normalisation; skips concatenated."""
    with ShapesOnly():
        model = MODELS.build({"name": "unet_resnet"}, in_channels=3, num_classes=2, spatial_dims=2)
    expected, channels = 0, 512
    for width, across in zip((256, 128, 64, 32, 16), (256, 128, 64, 64, 16), strict=True):
        expected += 4 * channels * width + width
        expected += 9 * (width + across) * width + 3 * width + 9 * width * width + 3 * width
        channels = width
    assert sum(p.numel() for p in model.decoder.parameters()) == expected
    stem = 9 * 3 * 16 + 3 * 16 + 9 * 16 * 16 + 3 * 16
    assert sum(p.numel() for p in model.parameters()) == (11_689_512 - 513_000) + expected + stem + (16 * 2 + 2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_skips_that_add(spatial_dims):
    model = build(spatial_dims, skip="add")
    size = (64, 32, 32)[:spatial_dims]
    scores = model(torch.randn(1, 1, *size))
    assert scores.shape == (1, 2, *size)
    scores.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [stage.skip.out_channels for stage in model.decoder] == [256, 128, 64, 64, 4]


def test_volumes_of_few_slices():
    model = build(3, depth_strides=[1, 2, 1, 2, 1]).eval()
    assert model.divisor == (4, 32, 32)
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 8, 32, 64)).shape == (1, 2, 8, 32, 64)
    with pytest.raises(MedsegError, match="4 or 8; 32; 32 or 64"):
        model.output_size((6, 32, 40))


def test_a_single_voxel_at_the_bottom_is_refused():
    with pytest.raises(MedsegError, match="single voxel") as refusal:
        build().output_size((32, 32))
    assert refusal.value.code == Code.MODEL
    assert build().next_size((20, 20)) == (64, 64)


def test_the_weights_of_a_classifier_are_those_of_the_encoder():
    model = build(3, in_channels=2)
    classifier = CLASSIFIERS.build({"name": "torchvision"}, in_channels=1, num_classes=4, spatial_dims=2)
    notes = load_backbone(model.backbone, dict(classifier.backbone.state_dict()))
    assert notes == ["inflated along the depth", "the first convolution from 1 channels to 2"]
    flat = classifier.backbone.state_dict()["stages.2.layer2.0.conv1.weight"]
    own = model.backbone.state_dict()["stages.2.layer2.0.conv1.weight"]
    torch.testing.assert_close(own.sum(dim=2), flat)


def test_frozen_stages_stay_as_they_are():
    model = build(frozen_stages=3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # as the trainer has it: of all weights
    model(torch.randn(2, 1, 64, 32)).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {
        name for name in before if name.startswith(("backbone.stages.0", "backbone.stages.1", "backbone.stages.2"))
    }
    assert frozen <= same
    assert not any(name.endswith("conv1.weight") for name in same - frozen)


def test_receptive_fields_are_traced():
    """ResNet-18 sees 435 pixels at its last map: 7, pooled by 3, then 4 convolutions of 3 at each of 4 resolutions."""
    calls = [c for c in trace(build(), (1024, 1024)) if c.module.startswith("backbone.stages.4")]
    assert all(reach.size == 435 for reach in calls[-1].reaches)
