"""Classifiers: the contract in 2D and 3D, weights counted, frozen stages, inflation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.models.classifiers import CLASSIFIERS
from medseg.registry import make_config

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
SMALL = {
    "cnn": {"name": "cnn", "widths": [4, 8]},
    "cnn_fc": {
        "name": "cnn",
        "widths": [4, 8],
        "head": "flatten",
        "hidden": [24, 12],
        "dropout": 0.0,
        "image_size": 40,
    },
    "cnn_plain": {"name": "cnn", "widths": [4, 8], "normalisation": "none", "pool": "average_pool"},
    "resnet18": {"name": "torchvision"},
    "efficientnet_b0": {"name": "torchvision", "network": "efficientnet_b0"},
    "densenet121": {"name": "torchvision", "network": "densenet121"},
}
FAST = ["cnn", "cnn_fc", "cnn_plain", "resnet18"]
SIZES = {2: (40, 40), 3: (40, 40, 40)}
IN_CHANNELS, NUM_CLASSES = 2, 3


def build(case: str, spatial_dims: int, **more):
    torch.manual_seed(0)
    settings = {**SMALL[case], **more}
    return CLASSIFIERS.build(settings, in_channels=IN_CHANNELS, num_classes=NUM_CLASSES, spatial_dims=spatial_dims)


def image(case: str, spatial_dims: int, size: tuple[int, ...] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((2, IN_CHANNELS, *(size or SIZES[spatial_dims])), generator=generator)


def test_every_registered_classifier_is_tested():
    assert {settings["name"] for settings in SMALL.values()} == set(CLASSIFIERS.names())


def test_every_configuration_file_is_one_that_can_be_built():
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        name = settings.pop("name")
        if name not in CLASSIFIERS.names():
            continue
        found.append(path.stem)
        assert path.read_text().startswith("# ")
        assert settings.pop("defaults") == [f"_{name}"]
        part = CLASSIFIERS.part(name)
        config = make_config(part.config, settings, where="model")
        assert all(getattr(config, key) != getattr(part.config(), key) for key in settings), "states a default"
    assert found == ["cnn", "cnn_fc", "densenet121", "efficientnet_b0", "resnet18", "resnet34", "resnet50"]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("case", FAST)
class TestContract:
    def test_forward_and_backward(self, case, spatial_dims):
        model = build(case, spatial_dims)
        assert (model.in_channels, model.num_classes, model.spatial_dims) == (IN_CHANNELS, NUM_CLASSES, spatial_dims)
        scores = model(image(case, spatial_dims))
        assert scores.shape == (2, NUM_CLASSES)
        nn.functional.cross_entropy(scores, torch.tensor([0, 2])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_any_size_from_the_smallest_on(self, case, spatial_dims):
        model = build(case, spatial_dims).eval()
        if case == "cnn_fc":
            with pytest.raises(MedsegError, match="image_size"):
                model(image(case, spatial_dims, (44,) * spatial_dims))
            return
        odd = tuple(n + 3 + 2 * i for i, n in enumerate(model.smallest_size))
        with torch.no_grad():
            for size in (model.smallest_size, odd):
                assert model(image(case, spatial_dims, size)).isfinite().all()

    def test_state_dict_holds_each_weight_once(self, case, spatial_dims):
        model = build(case, spatial_dims)
        state = model.state_dict()
        storages = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
        assert len(storages) == len(set(storages))

    def test_last_maps_are_those_that_the_head_sees(self, case, spatial_dims):
        model, seen = build(case, spatial_dims).eval(), []
        model.last_maps.register_forward_hook(lambda _module, _args, maps: seen.append(maps))
        model.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        with torch.no_grad():
            model(image(case, spatial_dims))
        assert seen[0] is seen[1] and seen[0].dim() == spatial_dims + 2

    def test_frozen_stages_keep_weights_and_statistics(self, case, spatial_dims):
        model = build(case, spatial_dims)
        model.freeze(2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()
        nn.functional.cross_entropy(model(image(case, spatial_dims)), torch.tensor([0, 2])).backward()
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        frozen = {name for name in before if name.startswith(("backbone.stages.0.", "backbone.stages.1."))}
        assert frozen and not changed & frozen
        learning = {name for name in before if not name.endswith("bias")} - frozen
        assert changed >= learning

    def test_compiles_without_a_break(self, case, spatial_dims):
        model, x = build(case, spatial_dims).eval(), image(case, spatial_dims)
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(compiled(x), model(x))
        torch.compiler.reset()


def test_freezing_everything_is_refused_with_the_stages():
    model = build("resnet18", 2)
    with pytest.raises(MedsegError, match="stage_4, head") as refusal:
        model.freeze(6)
    assert refusal.value.code == Code.CONFIG
    with pytest.raises(MedsegError, match="frozen_stages"):
        build("cnn", 2, frozen_stages=9)


def test_weights_of_the_small_network_are_counted():
    """Convolutions with bias and batch normalisation: k²·C·K + K + 2K; then C·K + K."""
    model = CLASSIFIERS.build(
        {"name": "cnn", "widths": [4, 8], "num_convolutions": 1, "head": "flatten", "hidden": [10], "image_size": 13},
        in_channels=1, num_classes=3, spatial_dims=2,
    )  # fmt: skip
    expected = (9 * 4 + 3 * 4) + (9 * 4 * 8 + 3 * 8) + (8 * 3 * 3 * 10 + 10) + (10 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"name": "cnn", "head": "flatten"}, Code.CONFIG),
        ({"name": "cnn", "head": "flatten", "image_size": 8}, Code.MODEL),
        ({"name": "cnn", "head": "flatten", "image_size": [32, 32, 32]}, Code.CONFIG),
        ({"name": "cnn", "kernel": 4}, Code.CONFIG),
        ({"name": "cnn", "widths": []}, Code.CONFIG),
        ({"name": "cnn", "dropout": 1.0}, Code.CONFIG),
        ({"name": "torchvision", "network": "resnet19"}, Code.CONFIG),
        ({"name": "torchvision", "depth_strides": [2, 2, 2, 2, 3]}, Code.CONFIG),
        ({"name": "resnet"}, Code.NAME),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, code):
    with pytest.raises(MedsegError) as refusal:
        CLASSIFIERS.build(settings, in_channels=1, num_classes=2, spatial_dims=2)
    assert refusal.value.code == code


def test_it_learns_what_is_told_by_the_brightness():
    torch.manual_seed(0)
    model = CLASSIFIERS.build({"name": "cnn", "widths": [4, 8]}, in_channels=1, num_classes=2, spatial_dims=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = torch.arange(16) % 2
    images = torch.randn(16, 1, 16, 16) + labels.view(-1, 1, 1, 1)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.9
