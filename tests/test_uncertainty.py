"""Uncertainty is that of the mean of all passes and folds; disagreement the part that none of them has alone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from medseg.bundle import load_bundle
from medseg.data.augment import Mirroring
from medseg.formats import open_volume
from medseg.inference import averaging
from medseg.inference.averaging import mean_decoding
from medseg.inference.memory import Footprint, plan_memory
from medseg.inference.prediction import Wanted
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig, sliding_window_logits
from medseg.inference.uncertainty import Opinions, disagreeing, num_sums
from medseg.labels import Labels
from medseg.models import SegmentationModel
from medseg.volume import Grid, Volume

UNSURE = Wanted(uncertainty=True)


class Pointwise(SegmentationModel):
    """Logits that depend on the voxel and on where it lies in the patch, so that every mirrored pass differs."""

    def __init__(self, num_outputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(3, num_outputs, 1)
        self.layer.weight.data *= 4

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        return input_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1).expand(len(x), 1, *x.shape[2:])
        columns = torch.linspace(-1, 1, x.shape[3]).view(1, 1, 1, -1).expand(len(x), 1, *x.shape[2:])
        logits: torch.Tensor = self.layer(torch.cat([x, rows, columns], 1))
        return logits


def entropy(p: torch.Tensor, *, regions: bool) -> torch.Tensor:
    terms = [p, 1 - p] if regions else [p]
    return -sum((q * q.clamp(min=1e-30).log()).sum(0) for q in terms)  # type: ignore[return-value]


@pytest.mark.parametrize("regions", [False, True])
def test_as_each_pass_of_each_fold_by_hand(regions: bool) -> None:
    """Two folds, four mirrored passes with classes that change places: eight answers, kept and averaged here."""
    order = (0, 2, 1)
    mirroring = Mirroring((0, 1), side_axis=1, classes=order, outputs=order if regions else ())
    models = [Pointwise(3, seed).eval() for seed in (1, 2)]
    image = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    answers = []
    for model, axes in itertools.product(models, ((), (0,), (1,), (0, 1))):
        dims = [axis + 2 for axis in axes]
        with torch.no_grad():
            found = (model(image[None].flip(dims)).flip(dims) if axes else model(image[None]))[0]
        found = found[list(order)] if 1 in axes else found
        answers.append(found.sigmoid() if regions else found.softmax(0))
    mean = torch.stack(answers).mean(0)
    together = entropy(mean, regions=regions)
    alone = torch.stack([entropy(answer, regions=regions) for answer in answers]).mean(0)

    asked = Opinions(models, regions=regions).eval()
    config = WindowConfig(mirroring=mirroring, batch_size=3)
    sums = sliding_window_logits(asked, image, (8, 12), num_sums(3), config)
    ((_, got),) = disagreeing(iter([(0, sums)]), 3, regions=regions)
    torch.testing.assert_close(got[3:6], mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[6], together - alone, atol=1e-5, rtol=0)
    assert got[6].min() >= 0 and got[6].max() > 0.1
    plain = torch.stack([sliding_window_logits(model, image, (8, 12), 3, config) for model in models]).mean(0)
    torch.testing.assert_close(got[:3], plain, atol=1e-5, rtol=0)


def test_one_who_is_sure_does_not_hide_one_who_is_not() -> None:
    """The mean of logits is as sure as the surest of them; the mean of probabilities is not."""

    class Says(SegmentationModel):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.register_buffer("logits", torch.tensor(logits))

        def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
            return input_size

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.view(1, 2, 1, 1).expand(len(x), 2, *x.shape[2:])  # type: ignore[operator]

    found = Opinions([Says(40.0, 0.0), Says(0.0, 2.0)], regions=False)(torch.zeros(1, 1, 2, 2))[0]
    assert found[:2].softmax(0)[1].max() < 1e-6
    assert found[3].min() > 0.4
    ((_, got),) = disagreeing(iter([(0, found)]), 2, regions=False)
    assert got[4].min() > 0.4  # of at most log 2


def folds_of(tiny_run: object, *, same: bool) -> list:
    bundles = [load_bundle(tiny_run.run) for _ in range(2)]  # type: ignore[attr-defined]
    if not same:
        torch.manual_seed(1)
        for weights in bundles[1].model.parameters():
            weights.data += 0.3 * weights.data.std() * torch.randn_like(weights) if weights.numel() > 1 else 0
    return bundles


def test_a_scan_by_one_model_by_the_same_twice_and_by_two(tiny_run) -> None:
    scan = open_volume(sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0])
    same, other = (folds_of(tiny_run, same=same) for same in (True, False))
    one, twice, two = (Predictor(bundles, WindowConfig()).decoded(scan, UNSURE) for bundles in (same[0], same, other))
    for found in (one, twice, two):
        assert found.uncertainty is not None and found.disagreement is not None
        assert found.disagreement.grid.difference(scan.grid) is None
        assert (found.disagreement.array <= found.uncertainty.array + 2e-3).all()
    np.testing.assert_allclose(twice.uncertainty.array, one.uncertainty.array, atol=1e-3)  # type: ignore[union-attr]
    np.testing.assert_allclose(twice.disagreement.array, one.disagreement.array, atol=1e-3)  # type: ignore[union-attr]
    assert two.disagreement.array.mean() > 2 * one.disagreement.array.mean()  # type: ignore[union-attr]
    for found, bundles in ((one, same[0]), (two, other)):  # labels do not depend on what else is wanted
        assert np.array_equal(found.indices.array, Predictor(bundles, WindowConfig()).decoded(scan).indices.array)


def test_a_single_pass_disagrees_with_nobody(tiny_run) -> None:
    """A scan of one tile, on a grid twice as fine as the model's: what lies between voxels is no disagreement."""
    bundle = load_bundle(tiny_run.run)
    plan = bundle.info.plan
    grid = Grid(tuple(2 * n for n in plan.patch_size), np.diag([*(s / 2 for s in plan.spacing_mm), 1.0]))
    scan = Volume(np.random.default_rng(0).normal(size=(1, *grid.shape)).astype(np.float32), grid)
    info = dataclasses.replace(bundle.info, plan=dataclasses.replace(plan, orientation=grid.orientation))
    found = Predictor(dataclasses.replace(bundle, info=info), WindowConfig())
    decoded = found.decoded(scan, UNSURE)
    assert decoded.uncertainty is not None and decoded.disagreement is not None
    assert decoded.uncertainty.array.max() > 0.3 and decoded.disagreement.array.max() < 1e-3


def test_models_of_several_plans_disagree_with_each_other() -> None:
    labels = Labels.from_mapping({"a": 1, "b": 2})
    scan = Grid((4, 4, 4), np.eye(4))

    def model(*logits: float) -> tuple[torch.Tensor, Grid]:
        values = torch.tensor(logits)
        channels = torch.cat([values, values.softmax(0), torch.zeros(1)])
        return channels.view(7, 1, 1, 1).expand(7, 4, 4, 4), scan

    left, right = model(0.0, 30, 0), model(0.0, 0, 30)
    agree = mean_decoding([left, left], [0.5, 0.5], labels, scan, UNSURE)
    differ = mean_decoding([left, right], [0.5, 0.5], labels, scan, UNSURE)
    for found, expected in ((agree, 0.0), (differ, np.log(2) / np.log(3))):
        for volume in (found.uncertainty, found.disagreement):
            assert volume is not None
            np.testing.assert_allclose(volume.array, expected, atol=1e-3)
    crop = (right[0][:, :2], scan.boxed((slice(0, 2), slice(0, 4), slice(0, 4))))
    part = mean_decoding([left, crop], [0.5, 0.5], labels, scan, UNSURE)  # beyond its crop it says background
    assert part.disagreement is not None
    np.testing.assert_allclose(part.disagreement.array, np.log(2) / np.log(3), atol=1e-3)


def test_the_plan_counts_the_sums() -> None:
    model = Footprint((100, 100, 100), (64, 64, 64), (64, 64, 64), 1, 10, 1)
    scan = Grid((100, 100, 100), np.eye(4))
    plans = [
        plan_memory(scan, [model], torch.device("cpu"), wanted=wanted, available=(2**36, 2**36))
        for wanted in (Wanted(), UNSURE)
    ]
    sums, tiles = ([plan.on_device[what] for plan in plans] for what in ("sums of logits", "logits of tiles"))
    assert sums[1] == sums[0] * 21 // 10 and tiles[1] == tiles[0] * 21 // 10
    assert plans[1].on_device["uncertainty"] == 4 * 100**3


def test_a_mean_that_does_not_fit_the_device_is_made_in_main_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Elsewhere(torch.Tensor):
        """On a device that has no room."""

        device = torch.device("meta")  # type: ignore[assignment]

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return self.as_subclass(torch.Tensor)

    labels = Labels.from_mapping({"a": 1})
    scan = Grid((4, 5, 6), np.eye(4))
    parts = [torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    expected = mean_decoding([(part, scan) for part in parts], [0.5, 0.5], labels, scan)
    made = averaging._mean

    def full(logits, *others):
        if any(isinstance(found, Elsewhere) for found, _ in logits):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(logits, *others)

    monkeypatch.setattr(averaging, "_mean", full)
    got = mean_decoding([(part.as_subclass(Elsewhere), scan) for part in parts], [0.5, 0.5], labels, scan)
    assert np.array_equal(got.indices.array, expected.indices.array)
    assert "main memory" in caplog.text
