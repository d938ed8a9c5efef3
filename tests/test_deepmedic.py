"""DeepMedic against the paper: sizes of segments, weights, what each pathway sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medseg.config import compose
from medseg.errors import Code, MedsegError
from medseg.explain.layers import layer_table
from medseg.models import MODELS
from medseg.models.blocks.skip import centre_crop
from medseg.models.shapes import ShapesOnly

FILTERS = (30, 30, 40, 40, 40, 40, 50, 50)


def build(spatial_dims: int = 3, in_channels: int = 1, num_classes: int = 2, **settings):
    torch.manual_seed(0)
    return MODELS.build(
        {"name": "deepmedic", **settings}, in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims
    )


def small(**settings):
    return build(filters=(3, 4, 4, 5), hidden=(6,), **settings)


def test_segments_of_the_paper():
    """9³ are labelled of a segment of 25³ and a context of 19³ at a third of the resolution."""
    with ShapesOnly():
        model = build()
        seen = {}
        for name in ("fine", "coarse", "up"):
            getattr(model, name).register_forward_hook(
                lambda _m, given, result, name=name: seen.update({name: (given[0].shape[2:], result.shape[1:])})
            )
        scores = model(torch.empty(2, 1, 57, 57, 57))
    assert scores.shape == (2, 2, 9, 9, 9) and model.output_size((57, 57, 57)) == (9, 9, 9)
    assert seen["fine"] == ((25, 25, 25), (50, 9, 9, 9))
    assert seen["coarse"] == ((19, 19, 19), (50, 3, 3, 3))
    assert seen["up"][1] == (50, 9, 9, 9)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_number_of_weights_by_hand(spatial_dims):
    """Eleven layers; each but the last with bias, scale and shift of its normalisation, and the slope of its PReLU."""
    with ShapesOnly():
        model = build(spatial_dims, in_channels=2, num_classes=5)
    taps = 3**spatial_dims
    pathway = sum((c * taps + 4) * k for c, k in zip((2, *FILTERS), FILTERS, strict=False))
    hidden = (100 + 4) * 150 + (150 + 4) * 150
    assert sum(p.numel() for p in model.parameters()) == 2 * pathway + hidden + 151 * 5
    layers = [m for m in model.fine.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert len(layers) == 8 and all(m.padding == (0,) * spatial_dims for m in layers)


def test_receptive_fields():
    """17³ of the first pathway; the second has as many on a grid three times as coarse: 49 voxels from end to end."""
    with ShapesOnly():
        model = build()
    table = layer_table(model, (57, 57, 57))
    assert [table.of_stage(stage)[-1].field for stage in table.stages if "fine" in stage][-1] == (17, 17, 17)
    assert table.field == (49, 49, 49)


def test_what_each_voxel_depends_on():
    """By gradients, along one axis: a labelled voxel sees 17 voxels around itself, and every third of 49 around the
    middle of its block of three."""
    model = small(spatial_dims=2, normalisation="none").eval()
    x = torch.randn(1, 1, 33, 33, requires_grad=True)
    scores = model(x)
    assert scores.shape[2:] == (9, 9)
    for voxel in (3, 4, 5):  # one block of three
        (gradient,) = torch.autograd.grad(scores[0, 0, voxel, 4], x, retain_graph=True)
        seen = gradient[0, 0].abs().sum(dim=1).nonzero().flatten().tolist()
        place, middle = 12 + voxel, 12 + 4
        own = set(range(place - 4, place + 5))
        assert set(seen) == own | set(range(middle - 12, middle + 13, 3))


def test_residual_connections_are_those_of_brats_2016():
    """The input of layer 3 is added to the answer of layer 4, cut to its size; new channels get nothing."""
    model = small(residual=True, spatial_dims=2).eval()
    layers = list(model.fine.layers)
    x = torch.randn(1, 1, 12, 12)
    entering = layers[1](layers[0](x))
    answer = layers[3](layers[2](entering))
    added = centre_crop(entering, answer.shape[2:])
    expected = torch.cat((answer[:, :4] + added, answer[:, 4:]), dim=1)
    torch.testing.assert_close(model.fine(x), expected)
    plain = small(spatial_dims=2).eval()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())


def test_sizes():
    model = build()
    assert model.divisor == (3, 3, 3)
    assert model.next_size((20, 57, 70)) == (57, 57, 72)
    with pytest.raises(MedsegError, match="51; 57 or 60; 51") as refusal:
        model.output_size((20, 58, 50))
    assert refusal.value.code == Code.MODEL
    with pytest.raises(MedsegError, match="single voxel"):
        model.output_size((51, 51, 51))
    assert model.output_size((51, 51, 54)) == (3, 3, 6)
    assert small(factor=5).output_size((55, 50, 50)) == (15, 10, 10)


@pytest.mark.parametrize(
    "wrong",
    [{"filters": []}, {"hidden": [0]}, {"factor": 2}, {"factor": 1}, {"dropout": 1.0}, {"num_groups": 0}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(MedsegError) as refusal:
        build(**wrong)
    assert refusal.value.code == Code.CONFIG


def test_drop_out_follows_the_hidden_layers():
    model = small().train()
    probabilities = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert probabilities == [0.5] and [m.p for m in build().modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_the_experiment_states_the_papers_segments():
    experiment = compose("train", ["data.root=data", "experiment=deepmedic"])
    assert experiment.model["name"] == "deepmedic" and experiment.data.plan.patch_size == (57, 57, 57)
    assert experiment.data.plan.batch_size == 10 and math.isclose(experiment.trainer.foreground_share, 0.5)
