"""The contract that every registered model keeps, in 2D and 3D. A new model adds its small settings to `SMALL`."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.models.classifiers import CLASSIFIERS
from medseg.models.monai import NETWORKS
from medseg.models.stages import resolve_stages
from medseg.registry import make_config

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
DYNUNET = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 4, 8]}
DYNUNET_DEEP = {**DYNUNET, "deep_supervision": True, "deep_supr_num": 1}
MONAI_UNET = {"channels": [4, 8, 8], "strides": [2, 2]}
SMALL_CNN = {"name": "cnn", "widths": [4, 8, 8]}
TRANSFORMER = {"img_size": 32, "feature_size": 4, "hidden_size": 12, "mlp_dim": 12, "num_heads": 3}

SMALL = {
    "unet": {"name": "unet", "widths": [4, 8, 8]},
    "unet_add": {"name": "unet", "widths": [4, 8, 8], "skip": "add", "deep_supervision": False},
    "unet_deep": {"name": "unet", "widths": [4, 8, 8, 8]},
    "unet_pool": {
        "name": "unet",
        "widths": [4, 8, 8],
        "down": "max_pool",
        "up": "interpolation",
        "normalisation": "group",
        "num_groups": 2,
        "activation": "prelu",
        "dropout": 0.1,
    },
    "fusionnet": {"name": "fusionnet", "widths": [4, 8, 8]},
    "fusionnet_concat": {"name": "fusionnet", "widths": [4, 8, 8], "skip": "concat", "deep_supervision": True},
    "fusionnet_residual_down": {"name": "fusionnet", "widths": [4, 8, 8], "down": "residual_block"},
    "residual_encoder_unet": {"name": "residual_encoder_unet", "widths": [4, 8, 8, 12], "num_blocks": [1, 2, 1, 2]},
    "vnet": {"name": "vnet", "widths": [4, 8, 8], "num_convolutions": [1, 2, 1]},
    "residual_unet": {"name": "residual_unet", "widths": [4, 8, 8]},
    "attention_unet": {"name": "attention_unet", "widths": [4, 8, 8]},
    "unet_plus_plus": {"name": "unet_plus_plus", "widths": [4, 8, 8]},
    "segnet": {"name": "segnet", "widths": [4, 8, 8], "num_convolutions": [2, 2]},
    "deepmedic": {"name": "deepmedic", "filters": [4, 6, 6, 8], "hidden": [8], "residual": True},
    "unet_resnet": {"name": "unet_resnet", "decoder_widths": [16, 12, 8, 8, 4]},
    "fcn": {"name": "fcn", "classifier": {**SMALL_CNN, "head": "flatten", "hidden": [6], "image_size": 24}},
    "fcn_average": {"name": "fcn", "classifier": SMALL_CNN, "output_stride": 4},
    "monai_dynunet": {"name": "monai", "network": "DynUNet", "arguments": DYNUNET},
    "monai_dynunet_deep": {"name": "monai", "network": "DynUNet", "arguments": DYNUNET_DEEP},
    "monai_segresnet": {"name": "monai", "network": "SegResNet", "arguments": {"init_filters": 8}},
    "monai_segresnet_ds": {"name": "monai", "network": "SegResNetDS", "arguments": {"init_filters": 8, "dsdepth": 2}},
    "monai_unet": {"name": "monai", "network": "UNet", "arguments": MONAI_UNET},
    "monai_attention": {"name": "monai", "network": "AttentionUnet", "arguments": MONAI_UNET},
    "monai_basic": {"name": "monai", "network": "BasicUNet", "arguments": {"features": [4, 4, 4, 4, 4, 4]}},
    "monai_mednext": {"name": "monai", "network": "MedNeXt", "arguments": {"init_filters": 4, "kernel_size": 3}},
    "monai_swinunetr": {"name": "monai", "network": "SwinUNETR", "arguments": {"feature_size": 12}},
    "monai_unetr": {"name": "monai", "network": "UNETR", "arguments": TRANSFORMER},
}
RESOLUTIONS = {
    "unet": 1,
    "unet_pool": 1,
    "unet_deep": 2,
    "fusionnet_concat": 1,
    "residual_encoder_unet": 2,
    "attention_unet": 1,
    "unet_plus_plus": 2,
    "monai_dynunet_deep": 2,
    "monai_segresnet_ds": 2,
}
"""How many scores a model returns while training, where it is a list."""
UNPADDED = {"deepmedic": 24}
"""How many voxels fewer than they get models without padding return along each axis."""
UNUSED = {"monai_unetr": "cross_attn"}
"""Weights that MONAI creates and never uses."""
IN_CHANNELS, NUM_CLASSES = 2, 3


def build(case: str, spatial_dims: int) -> nn.Module:
    if case in ("monai_swinunetr", "monai_unetr"):
        pytest.importorskip("einops")
    torch.manual_seed(0)
    return MODELS.build(SMALL[case], in_channels=IN_CHANNELS, num_classes=NUM_CLASSES, spatial_dims=spatial_dims)


def size_for(case: str, model: nn.Module) -> tuple[int, ...]:
    """A small size with odd multiples of the divisor and unequal axes where the model allows that."""
    if case == "monai_unetr":
        return model.divisor
    if case == "monai_basic":
        return (32, 35, 37)[: len(model.divisor)]
    if case in UNPADDED:
        return tuple(d * f + UNPADDED[case] for d, f in zip(model.divisor, (1, 2, 3), strict=False))
    factors = (3, 5, 2) if max(model.divisor) < 16 else (2, 1, 2)
    return tuple(d * f for d, f in zip(model.divisor, factors, strict=False))


def image(case: str, model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((2, IN_CHANNELS, *size_for(case, model)), generator=generator)


def test_every_registered_model_is_tested():
    assert {settings["name"] for settings in SMALL.values()} == set(MODELS.names())


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("case", SMALL)
class TestContract:
    def test_forward_and_backward(self, case, spatial_dims):
        model = build(case, spatial_dims)
        assert (model.in_channels, model.num_classes, model.spatial_dims) == (IN_CHANNELS, NUM_CLASSES, spatial_dims)
        x = image(case, model)
        output = model(x)
        assert isinstance(output, list) == (case in RESOLUTIONS)
        scores = output if isinstance(output, list) else [output]
        assert len(scores) == RESOLUTIONS.get(case, 1)
        assert tuple(scores[0].shape) == (2, NUM_CLASSES, *model.output_size(tuple(x.shape[2:])))
        sum((s - s.detach().roll(1)).square().mean() for s in scores).backward()
        for name, parameter in model.named_parameters():
            if case in UNUSED and UNUSED[case] in name:
                continue
            assert parameter.grad is not None, f"no gradient: {name}"
            assert parameter.grad.isfinite().all(), f"gradient not finite: {name}"

    def test_one_tensor_while_predicting(self, case, spatial_dims):
        model = build(case, spatial_dims).eval()
        x = image(case, model)
        with torch.no_grad():
            scores = model(x)
        assert isinstance(scores, torch.Tensor)
        assert tuple(scores.shape) == (2, NUM_CLASSES, *(n - UNPADDED.get(case, 0) for n in x.shape[2:]))

    def test_state_dict_round_trip_with_no_weight_twice(self, case, spatial_dims):
        model, other = build(case, spatial_dims).eval(), build(case, spatial_dims).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        state = model.state_dict()
        storages = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
        assert len(storages) == len(set(storages))
        assert sum(state[name].numel() for name, _ in model.named_parameters()) == sum(
            p.numel() for p in model.parameters()
        )
        x = image(case, model)
        with torch.no_grad():
            assert not torch.equal(other(x), model(x))
            other.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)

    def test_a_copy_does_not_share_weights(self, case, spatial_dims):
        model = build(case, spatial_dims)
        pointers = {p.data_ptr() for p in model.parameters()}
        clone = copy.deepcopy(model)
        assert not pointers & {p.data_ptr() for p in clone.parameters()}
        assert clone.state_dict().keys() == model.state_dict().keys()


OWN = [case for case in SMALL if not case.startswith("monai")]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("case", OWN)
class TestOwnModels:
    def test_sizes_that_do_not_fit_are_refused_with_the_nearest(self, case, spatial_dims):
        model = build(case, spatial_dims)
        step = model.divisor[0]
        size = (UNPADDED.get(case, 0) + 5 * step + 1,) * spatial_dims
        for call in (lambda: model.output_size(size), lambda: model(torch.zeros(1, IN_CHANNELS, *size))):
            with pytest.raises(MedsegError, match=f"{size[0] - 1} or {size[0] - 1 + step}") as refusal:
                call()
            assert refusal.value.code == Code.MODEL
        with pytest.raises(MedsegError):
            model.output_size((4 * step,) * (spatial_dims + 1))

    def test_channels_last_in_bfloat16(self, case, spatial_dims):
        """The maps that reach the head are channels-last: no part of the network changed that."""
        model = build(case, spatial_dims)
        memory_format = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
        x = image(case, model).to(memory_format=memory_format)
        with torch.no_grad():
            expected = model.eval()(x)
        model.to(memory_format=memory_format)
        formats = []
        model.heads[0].register_forward_pre_hook(
            lambda _head, maps: formats.append(maps[0].is_contiguous(memory_format=memory_format))
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            scores = model(x)
        assert formats == [True]
        assert (scores.float() - expected).abs().mean() < 0.1 * expected.abs().mean()

    def test_compiles_without_a_break(self, case, spatial_dims):
        model = build(case, spatial_dims).eval()
        x = image(case, model)
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(compiled(x), model(x))
        torch.compiler.reset()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_files(path):
    if yaml.safe_load(path.read_text())["name"] in CLASSIFIERS.names():
        return  # tests/test_classifiers.py
    text = path.read_text()
    assert text.startswith("# ")
    settings = yaml.safe_load(text)
    part = MODELS.part(settings.pop("name"))
    assert settings.pop("defaults") == [f"_{part.name}"]
    config, default = make_config(part.config, settings, where="model"), part.config()
    assert all(getattr(config, name) != getattr(default, name) for name in settings), "states a default"
    if part.name != "monai":
        with torch.device("meta"):
            part.build(config, in_channels=1, num_classes=2, spatial_dims=2)


def test_deep_supervision_has_half_the_size_each():
    sizes = [tuple(s.shape[2:]) for s in build("unet_deep", 2)(torch.zeros(1, IN_CHANNELS, 24, 40))]
    assert sizes == [(24, 40), (12, 20)]
    sizes = [tuple(s.shape[2:]) for s in build("monai_segresnet_ds", 2)(torch.zeros(1, IN_CHANNELS, 24, 40))]
    assert sizes == [(24, 40), (12, 20)]


def test_unet_defaults_are_those_of_nnunet():
    for spatial_dims, widths in ((2, [32, 64, 128, 256, 512, 512]), (3, [32, 64, 128, 256, 320, 320])):
        stages = resolve_stages(None, None, (1, 2, 2, 2, 2, 2), spatial_dims)
        assert [stage.width for stage in stages] == widths
        assert {stage.kernel for stage in stages} == {(3,) * spatial_dims}
    assert [stage.stride for stage in resolve_stages(None, None, None, 2)] == [(1, 1)] + [(2, 2)] * 4


def test_unet_stage_of_nnunet():
    """Two convolutions per stage, the first strided, each with instance norm and leaky ReLU 0.01; plain steps up."""
    model = build("unet", 3)
    convolutions = [m for m in model.encoder[1].modules() if isinstance(m, nn.Conv3d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in convolutions] == [(4, 8, (2,) * 3), (8, 8, (1,) * 3)]
    assert all(c.bias is not None for c in convolutions)
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
    up = model.decoder[0].up
    assert sum(p.numel() for p in up.parameters()) == 8 * 8 * 2**3 + 8


def test_unet_per_axis():
    settings = {"name": "unet", "widths": [4, 6, 8], "kernels": [[1, 3, 3], [3, 3, 3], 3], "strides": [1, [1, 2, 2], 2]}
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=3).eval()
    assert model.divisor == (2, 4, 4)
    assert model(torch.zeros(1, 1, 4, 8, 12)).shape == (1, 2, 4, 8, 12)
    assert model.encoder[0].block[0][0].convolution.kernel_size == (1, 3, 3)
    assert model.encoder[1].down.block.convolution.stride == (1, 2, 2)
    assert model.decoder[1].up.convolution.kernel_size == (1, 2, 2)


def test_a_skip_that_cannot_add_is_refused_when_the_model_is_built():
    settings = {"name": "unet", "widths": [4, 8, 16], "up": "interpolation"}
    with pytest.raises(MedsegError) as refusal:
        MODELS.build({**settings, "skip": "add"}, in_channels=1, num_classes=2, spatial_dims=2)
    assert refusal.value.code == Code.MODEL
    assert all(part in str(refusal.value) for part in ("stage 1", "16 channels", "8 channels"))
    MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=2)


@pytest.mark.parametrize("name", ["unet", "fusionnet"])
def test_a_single_voxel_at_the_bottom_is_refused(name):
    model = MODELS.build({"name": name, "widths": [4, 4, 4]}, in_channels=1, num_classes=2, spatial_dims=2)
    with pytest.raises(MedsegError, match="single voxel") as refusal:
        model.output_size((4, 4))
    assert refusal.value.code == Code.MODEL
    assert model.output_size((4, 8)) == (4, 8)
    model(torch.zeros(1, 1, 4, 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": [4]},
        {"widths": [4, 8], "strides": [1, 2, 2]},
        {"widths": [4, 0]},
        {"strides": [2, 2]},
        {"strides": [[1, 2], 2]},
        {"kernels": [3, 4]},
        {"kernels": [3, [3, 3, 3]]},
        {"dropout": 1.0},
        {"dropout": [0.0, 0.1]},
        {"num_convolutions": 0},
        {"activation": "reluu"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(MedsegError) as refusal:
        MODELS.build({"name": "unet", **wrong}, in_channels=1, num_classes=2, spatial_dims=2)
    assert refusal.value.code == Code.CONFIG


def monai(network: str, **arguments):
    settings = {"name": "monai", "network": network, "arguments": arguments}
    return MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=3)


def test_monai_divisors():
    assert monai("SegResNet").divisor == (8, 8, 8)
    assert monai("UNet", channels=[4, 4, 4], strides=[[1, 2, 2], 2]).divisor == (2, 4, 4)


@pytest.mark.parametrize(
    ("network", "arguments", "code", "message"),
    [
        ("SegResnet", {}, Code.NAME, "SegResNet"),
        ("SegResNet", {"init_filter": 8}, Code.CONFIG, "init_filters"),
        ("SegResNet", {"in_channels": 8}, Code.CONFIG, "leave it out"),
        ("UNet", {"channels": [4, 8]}, Code.CONFIG, "strides"),
        ("FlexibleUNet", {"backbone": "efficientnet-b0", "pretrained": True}, Code.CONFIG, "download"),
        ("UNet", {"channels": [4], "strides": []}, Code.MODEL, "channels"),
        ("UNet", {"channels": [4, 8], "strides": [2], "act": "nothing"}, Code.MODEL, "nothing"),
    ],
)
def test_monai_refusals(network, arguments, code, message):
    with pytest.raises(MedsegError, match=message) as refusal:
        monai(network, **arguments)
    assert refusal.value.code == code


def test_what_makes_monai_download_is_known():
    """A new version of MONAI may have more arguments that do."""
    import monai.networks.nets as nets

    downloading = ("pretrain", "weight", "download", "url", "progress")
    names = {name for network in NETWORKS for name in inspect.signature(getattr(nets, network)).parameters}
    assert {name for name in names if any(part in name for part in downloading)} == {"pretrained"}
    assert inspect.signature(nets.FlexibleUNet).parameters["pretrained"].default is False


def test_monai_refuses_a_size_with_the_nearest():
    with pytest.raises(MedsegError, match=r"\(16, 16, 24\) or \(24, 24, 24\)") as refusal:
        monai("SegResNet").output_size((17, 17, 24))
    assert refusal.value.code == Code.MODEL


def test_monai_probing_leaves_the_network_as_it_was():
    model = monai("SegResNet")
    model.network.down_layers[0].eval()
    modes = [m.training for m in model.modules()]
    model.output_size((24, 24, 24))
    assert [m.training for m in model.modules()] == modes
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.skipif(importlib.util.find_spec("einops") is not None, reason="einops is installed")
@pytest.mark.parametrize("case", ["monai_swinunetr", "monai_unetr"])
def test_monai_names_the_package_that_is_missing(case):
    with pytest.raises(MedsegError, match="einops") as refusal:
        MODELS.build(SMALL[case], in_channels=1, num_classes=2, spatial_dims=2)
    assert refusal.value.code == Code.MODEL


def test_monai_is_imported_only_when_it_is_used():
    script = (
        "import sys; from medseg.models import MODELS; "
        "MODELS.build({'name': 'unet', 'widths': [4, 4]}, in_channels=1, num_classes=2, spatial_dims=2); "
        "sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_padded_up_sampling_has_no_gaps_where_filters_are_flat() -> None:
    """Kernels of 1 on an axis that is halved: the transposed convolution takes 3 there."""
    settings = {"name": "fusionnet", "widths": [4, 8], "kernels": [[3, 1, 1], [3, 1, 1]], "strides": [1, [1, 2, 2]]}
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=3)
    assert model(torch.randn(2, 1, 4, 8, 8)).shape == (2, 2, 4, 8, 8)


def test_next_size_is_one_that_fits() -> None:
    valid = MODELS.build(
        {"name": "unet", "widths": [4, 8], "padding": "valid", "down": "max_pool", "deep_supervision": False},
        in_channels=1, num_classes=2, spatial_dims=2,
    )  # fmt: skip
    size = valid.next_size((15, 17))
    assert valid.output_size(size) and all(new - old in range(4) for new, old in zip(size, (15, 17), strict=True))
    swin = MODELS.build(
        {"name": "monai", "network": "SwinUNETR", "arguments": {"feature_size": 12}},
        in_channels=1, num_classes=2, spatial_dims=2,
    )  # fmt: skip
    assert swin.output_size(swin.next_size((20, 30))) == swin.next_size((20, 30))
