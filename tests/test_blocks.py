"""Blocks by value: each does what its name says, in 2D and in 3D."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import make_activation
from medseg.models.blocks.block import Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dimensions import layers, per_axis
from medseg.models.blocks.dropout import Dropout
from medseg.models.blocks.head import SegmentationHead
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import make_normalisation
from medseg.models.blocks.resample import TransposedConvolution, make_down, make_up
from medseg.models.blocks.residual import ResidualBlock
from medseg.models.blocks.skip import centre_crop, make_skip

DIMS = [2, 3]
PLAIN = {n: ConvolutionStyle(n, normalisation="none", activation="linear") for n in DIMS}


def image(spatial_dims: int, channels: int = 2, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, channels, *range(size, size + 2 * spatial_dims, 2)), generator=generator)


def lengths(block: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    return tuple(block.output_length(n, axis) for axis, n in enumerate(x.shape[2:]))


@pytest.mark.parametrize("spatial_dims", DIMS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, "same"), (5, 1, "valid"), (3, 2, "same"), (3, 2, 0), (2, 3, 1)]
)
def test_convolution_filter_size_stride_padding(spatial_dims, kernel, stride, padding):
    style = ConvolutionStyle(spatial_dims, padding=padding, normalisation="none", activation="linear")
    block = ConvolutionBlock(2, 3, style, kernel=kernel, stride=stride)
    x = image(spatial_dims)
    number = {"same": kernel // 2, "valid": 0}.get(padding, padding)
    convolve = F.conv2d if spatial_dims == 2 else F.conv3d
    expected = convolve(x, block.convolution.weight, block.convolution.bias, stride, number)
    torch.testing.assert_close(block(x), expected)
    assert lengths(block, x) == tuple(expected.shape[2:])
    assert block.out_channels == expected.shape[1] == 3


def test_convolution_per_axis():
    style = ConvolutionStyle(3, padding=(0, 1, 2), bias=False, normalisation="none", activation="linear")
    block = ConvolutionBlock(1, 4, style, kernel=(1, 3, 5), stride=(1, 2, 1))
    assert block.convolution.weight.shape == (4, 1, 1, 3, 5)
    assert block.convolution.bias is None
    x = image(3, channels=1)
    assert tuple(block(x).shape) == (2, 4, 6, 4, 10)
    assert lengths(block, x) == (6, 4, 10)


def test_convolution_then_normalisation_then_activation():
    block = ConvolutionBlock(2, 3, ConvolutionStyle(2, normalisation="instance", activation="relu"))
    x = image(2)
    convolved = block.convolution(x)
    mean, var = convolved.mean((2, 3), keepdim=True), convolved.var((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(block(x), ((convolved - mean) / (var + 1e-5).sqrt()).clamp(min=0))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvolutionBlock(1, 1, ConvolutionStyle(2), kernel=4),
        lambda: ConvolutionBlock(1, 1, ConvolutionStyle(2), kernel=(3, 3, 3)),
        lambda: per_axis((2, 0), 2, where="stride"),
        lambda: make_up("transposed_padded", 1, 1, PLAIN[2], kernel=(3, 3), stride=(4, 2)),
        lambda: make_down(
            "strided_convolution", 1, 1, ConvolutionStyle(2, padding="valid"), kernel=(3, 3), stride=(2, 2)
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(build):
    with pytest.raises(MedsegError) as refusal:
        build()
    assert refusal.value.code == Code.CONFIG


def test_only_images_and_volumes():
    with pytest.raises(MedsegError) as refusal:
        layers(1)
    assert refusal.value.code == Code.MODEL


def test_image_smaller_than_the_filter():
    with pytest.raises(MedsegError) as refusal:
        ConvolutionBlock(1, 1, ConvolutionStyle(2, padding="valid")).output_length(2, 0)
    assert refusal.value.code == Code.MODEL


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [0.0, 0.0, 2.0]),
        ("leaky_relu", [-0.2, 0.0, 2.0]),
        ("elu", [math.expm1(-2.0), 0.0, 2.0]),
        ("prelu", [-0.5, 0.0, 2.0]),
        ("sigmoid", [1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-2))]),
        ("tanh", [-math.tanh(2), 0.0, math.tanh(2)]),
        ("linear", [-2.0, 0.0, 2.0]),
    ],
)
def test_activation(name, expected):
    x = torch.tensor([-2.0, 0.0, 2.0]).reshape(1, 3, 1, 1)
    result = make_activation(name, 3, negative_slope=0.1)(x)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected))


def test_prelu_learns_a_slope_per_channel():
    assert make_activation("prelu", 5).weight.shape == (5,)


@pytest.mark.parametrize("spatial_dims", DIMS)
@pytest.mark.parametrize(
    ("name", "over"), [("batch", "all images"), ("instance", "each channel"), ("group", "two channels")]
)
def test_normalisation(spatial_dims, name, over):
    x = image(spatial_dims, channels=4) * 3 + 5
    layer = make_normalisation(name, 4, spatial_dims, num_groups=2)
    result = layer(x)
    if over == "all images":
        parts = result.transpose(0, 1).flatten(1)
    else:
        parts = result.reshape(-1, math.prod(x.shape[2:]) * (2 if over == "two channels" else 1))
    torch.testing.assert_close(parts.mean(1), torch.zeros(len(parts)), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.var(1, correction=0), torch.ones(len(parts)), atol=1e-4, rtol=0)
    assert {name: p.shape for name, p in layer.named_parameters()} == {"weight": (4,), "bias": (4,)}


@pytest.mark.parametrize("spatial_dims", DIMS)
def test_instance_norm_is_that_of_torch_and_keeps_channels_last(spatial_dims):
    layer = make_normalisation("instance", 2, spatial_dims)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = image(spatial_dims)
    expected = F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=1e-5)
    torch.testing.assert_close(layer(x), expected)
    memory_format = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    result = layer(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(result, expected, check_stride=False)
    assert result.is_contiguous(memory_format=memory_format)


def test_no_normalisation_and_groups_that_do_not_fit():
    x = image(2)
    assert torch.equal(make_normalisation("none", 2, 2)(x), x)
    with pytest.raises(MedsegError, match="groups") as refusal:
        make_normalisation("group", 6, 2, num_groups=4)
    assert refusal.value.code == Code.MODEL


def test_pooling_by_value_and_per_axis():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    down = {
        name: make_down(name, 1, 7, PLAIN[2], kernel=(3, 3), stride=(1, 2)) for name in ("max_pool", "average_pool")
    }
    assert torch.equal(down["max_pool"](x), x[..., 1::2])
    assert torch.equal(down["average_pool"](x), x[..., ::2] + 0.5)
    assert all(block.out_channels == 1 and block.num_convolutions == 0 for block in down.values())


@pytest.mark.parametrize("spatial_dims", DIMS)
@pytest.mark.parametrize("name", ["max_pool", "average_pool", "strided_convolution"])
def test_down(spatial_dims, name):
    stride = (1, 2, 2)[-spatial_dims:]
    block = make_down(name, 2, 5, PLAIN[spatial_dims], kernel=(3,) * spatial_dims, stride=stride)
    x = image(spatial_dims)
    result = block(x)
    assert (
        tuple(result.shape[2:]) == lengths(block, x) == tuple(n // s for n, s in zip(x.shape[2:], stride, strict=True))
    )
    assert result.shape[1] == block.out_channels == (5 if name == "strided_convolution" else 2)
    assert block.num_convolutions == (name == "strided_convolution")
    with pytest.raises(MedsegError) as refusal:
        block.output_length(7, spatial_dims - 1)
    assert refusal.value.code == Code.MODEL


@pytest.mark.parametrize("spatial_dims", DIMS)
@pytest.mark.parametrize("name", ["transposed", "transposed_padded", "interpolation", "interpolation_convolution"])
def test_up(spatial_dims, name):
    stride = (1, 3, 2)[-spatial_dims:]
    block = make_up(name, 2, 5, PLAIN[spatial_dims], kernel=(3,) * spatial_dims, stride=stride)
    x = image(spatial_dims)
    result = block(x)
    assert (
        tuple(result.shape[2:]) == lengths(block, x) == tuple(n * s for n, s in zip(x.shape[2:], stride, strict=True))
    )
    assert result.shape[1] == block.out_channels == (2 if name == "interpolation" else 5)


def test_transposed_convolution_without_padding_spreads_each_voxel():
    block = TransposedConvolution(1, 1, PLAIN[2], stride=(2, 2))
    x = image(2, channels=1)
    weight = block.convolution.weight
    assert weight.shape == (1, 1, 2, 2)
    torch.testing.assert_close(block(x), torch.kron(x, weight) + block.convolution.bias)


def test_transposed_convolution_with_padding_has_its_own_filter_size():
    block = TransposedConvolution(1, 1, PLAIN[2], stride=(2, 2), kernel=(3, 5))
    assert block.convolution.weight.shape == (1, 1, 3, 5)
    x = image(2, channels=1)
    full = F.conv_transpose2d(x, block.convolution.weight, block.convolution.bias, stride=2, output_padding=1)
    torch.testing.assert_close(block(x), full[..., 1 : 1 + 12, 2 : 2 + 16])


def test_transposed_convolution_has_normalisation_and_activation():
    block = TransposedConvolution(2, 3, ConvolutionStyle(2, activation="relu"), stride=(2, 2))
    assert block(image(2)).min() == 0
    assert isinstance(block.activation, nn.ReLU)


def test_interpolation_is_linear_with_voxel_edges_in_place():
    up = make_up("interpolation", 1, 1, PLAIN[2], kernel=(3, 3), stride=(1, 2))
    x = torch.tensor([[0.0, 4.0], [8.0, 8.0]]).reshape(1, 1, 2, 2)
    assert torch.equal(up(x)[0, 0], torch.tensor([[0.0, 1.0, 3.0, 4.0], [8.0, 8.0, 8.0, 8.0]]))


@pytest.mark.parametrize("spatial_dims", DIMS)
def test_residual_block_adds_before_the_last_activation(spatial_dims):
    style = ConvolutionStyle(spatial_dims, normalisation="none", activation="relu")
    block = ResidualBlock(2, style, num_convolutions=3)
    convolutions = [m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert len(convolutions) == 3
    x = image(spatial_dims)
    first, second, third = convolutions
    expected = F.relu(x + third(F.relu(second(F.relu(first(x))))))
    torch.testing.assert_close(block(x), expected)
    assert lengths(block, x) == tuple(x.shape[2:])


def test_residual_block_needs_padding():
    with pytest.raises(MedsegError) as refusal:
        ResidualBlock(2, ConvolutionStyle(2, padding="valid"))
    assert refusal.value.code == Code.MODEL


@pytest.mark.parametrize("spatial_dims", DIMS)
def test_skip_by_value(spatial_dims):
    up, across = image(spatial_dims), image(spatial_dims) + 1
    add, concat = (make_skip(name, 2, 2, stage=0) for name in ("add", "concat"))
    assert torch.equal(add(up, across), up + across)
    assert torch.equal(concat(up, across), torch.cat((across, up), dim=1))
    assert (add.out_channels, concat.out_channels) == (2, 4)


def test_skip_crops_at_the_centre():
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert torch.equal(centre_crop(x, torch.Size((2, 4))), x[..., 2:4, 1:5])
    up = torch.ones(1, 1, 2, 4)
    assert torch.equal(make_skip("add", 1, 1, stage=0)(up, x), x[..., 2:4, 1:5] + 1)


def test_skip_refuses_addition_of_unequal_channels():
    with pytest.raises(MedsegError) as refusal:
        make_skip("add", 48, 32, stage=3)
    message = str(refusal.value)
    assert refusal.value.code == Code.MODEL
    assert all(part in message for part in ("stage 3", "48", "32"))
    assert make_skip("concat", 48, 32, stage=3).out_channels == 80


def test_dropout_only_while_training():
    block = Dropout(2, 0.5)
    x = torch.ones(1, 2, 50, 50)
    assert set(block(x).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("spatial_dims", DIMS)
def test_head(spatial_dims):
    head = SegmentationHead(2, 4, spatial_dims)
    x = image(spatial_dims)
    weight = head.convolution.weight.flatten(1)
    expected = torch.einsum("kc,nc...->nk...", weight, x) + head.convolution.bias.reshape(-1, *[1] * spatial_dims)
    torch.testing.assert_close(head(x), expected)


def test_an_empty_stack_is_the_identity():
    stack = Stack((), 3)
    x = image(2, channels=3)
    assert stack(x) is x
    assert (stack.out_channels, stack.output_length(7, 0)) == (3, 7)


@pytest.mark.parametrize(
    ("layer", "activation", "std"),
    [
        (nn.Conv2d(64, 200, 3), "relu", math.sqrt(2 / (9 * 64))),  # the example of Ronneberger et al. 2015
        (nn.Conv3d(32, 100, 3), "leaky_relu", math.sqrt(2 / (1 + 1e-4) / (27 * 32))),
        (nn.Conv2d(64, 200, 3), "linear", math.sqrt(1 / (9 * 64))),
        (nn.ConvTranspose2d(128, 64, 2, stride=2), "relu", math.sqrt(2 / 128)),
    ],
)
def test_initial_weights(layer, activation, std):
    torch.manual_seed(0)
    initialise(layer, activation)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not layer.bias.any()
