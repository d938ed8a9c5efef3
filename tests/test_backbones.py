"""torchvision's networks as backbones: the same scores, weights counted, channels, inflation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.models.backbones import TORCHVISION, load_backbone, make_torchvision_backbone, torchvision_name
from medseg.models.classifiers import CLASSIFIERS
from medseg.models.shapes import ShapesOnly
from medseg.torchvision_compat import prepare_torchvision

prepare_torchvision()
import torchvision  # noqa: E402

WEIGHTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "densenet121": 7_978_856,
    "efficientnet_b0": 5_288_548,
}
"""As torchvision publishes them, for 1000 classes of colour pictures."""


def randomised(network: str) -> nn.Module:
    """torchvision's own network with statistics that are no 0 and 1."""
    torch.manual_seed(0)
    whole = torchvision.models.get_model(network, weights=None, num_classes=5).eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return whole


def loaded(network: str, whole: nn.Module, *, in_channels: int, spatial_dims: int, depth_strides=(2, 2, 2, 2, 2)):
    """Our classifier with the weights of torchvision's."""
    settings = {"name": "torchvision", "network": network, "depth_strides": list(depth_strides)}
    model = CLASSIFIERS.build(settings, in_channels=in_channels, num_classes=5, spatial_dims=spatial_dims).eval()
    theirs = whole.state_dict()
    own = model.backbone.state_dict()
    notes = load_backbone(model.backbone, {name: theirs[torchvision_name(network, name)] for name in own})
    last = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1]
    model.head.scores.load_state_dict(last.state_dict())
    return model, notes


@pytest.mark.parametrize("network", TORCHVISION)
def test_weights_are_as_many_as_published(network):
    settings = {"name": "torchvision", "network": network}
    with ShapesOnly():
        model = CLASSIFIERS.build(settings, in_channels=3, num_classes=1000, spatial_dims=2)
    assert sum(p.numel() for p in model.parameters()) == WEIGHTS[network]


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "densenet121", "efficientnet_b0"])
def test_scores_are_those_of_torchvision_and_inflated_ones_too(network):
    """A volume that is constant along the depth is seen as its slice; with one channel, as the grey picture."""
    whole = randomised(network)
    generator = torch.Generator().manual_seed(1)
    grey = torch.randn((1, 1, 64, 64), generator=generator)
    with torch.no_grad():
        expected = whole(grey.expand(-1, 3, -1, -1))
        colour, notes = loaded(network, whole, in_channels=3, spatial_dims=2)
        torch.testing.assert_close(colour(grey.expand(-1, 3, -1, -1)), expected)
        assert notes == []
        single, notes = loaded(network, whole, in_channels=1, spatial_dims=2)
        torch.testing.assert_close(single(grey), expected, rtol=1e-4, atol=1e-5)
        assert notes == ["the first convolution from 3 channels to 1"]
        depth_strides = (2, 1, 2, 1, 1)
        volume, notes = loaded(network, whole, in_channels=2, spatial_dims=3, depth_strides=depth_strides)
        assert volume.smallest_size == (4, 32, 32)
        torch.testing.assert_close(volume(grey.unsqueeze(2).expand(-1, 2, 8, -1, -1)), expected, rtol=1e-4, atol=1e-4)
        assert notes == ["inflated along the depth", "the first convolution from 3 channels to 2"]
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("network", ["densenet121", "efficientnet_b0"])
def test_every_weight_learns(network):
    settings = {"name": "torchvision", "network": network}
    torch.manual_seed(0)
    model = CLASSIFIERS.build(settings, in_channels=1, num_classes=3, spatial_dims=2)
    nn.functional.cross_entropy(model(torch.randn(3, 1, 64, 64)), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("network", TORCHVISION)
def test_maps_have_the_stated_sizes(network):
    with ShapesOnly():
        for spatial_dims, strides in ((2, (2,) * 5), (3, (2, 2, 1, 1, 1))):
            backbone = make_torchvision_backbone(
                network, in_channels=1, spatial_dims=spatial_dims, depth_strides=strides
            )
            size = (8, 64, 96)[-spatial_dims:]
            maps = backbone.train()(torch.empty(2, 1, *size))
            for found, width, factors in zip(maps, backbone.widths, backbone.factors, strict=True):
                assert tuple(found.shape[1:]) == (width, *(n // f for n, f in zip(size, factors, strict=True)))


def test_kept_statistics_do_not_move():
    settings = {"name": "torchvision", "keep_statistics": True}
    model = CLASSIFIERS.build(settings, in_channels=1, num_classes=2, spatial_dims=2).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(1, 1, 32, 32)).sum().backward()  # of one image, too
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())


def test_weights_of_another_network_are_refused():
    backbone = make_torchvision_backbone("resnet18", in_channels=1, spatial_dims=2)
    state = dict(backbone.state_dict())
    del state["stages.2.layer2.0.conv1.weight"]
    with pytest.raises(MedsegError, match=r"stages\.2\.layer2\.0\.conv1") as refusal:
        load_backbone(backbone, state)
    assert refusal.value.code == Code.MODEL
    other = make_torchvision_backbone("resnet50", in_channels=1, spatial_dims=2)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(MedsegError, match="missing, or of another shape"):
        load_backbone(backbone, dict(other.state_dict()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_old_files_count_no_batches():
    backbone = make_torchvision_backbone("resnet18", in_channels=1, spatial_dims=2)
    state = {name: t + 1 for name, t in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert load_backbone(backbone, state) == []
    assert torch.equal(backbone.state_dict()["stages.0.conv1.weight"], state["stages.0.conv1.weight"])
