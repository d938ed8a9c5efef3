"""Several models as one: which a folder stands for, the mean of logits and of probabilities, what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peak
import pytest
import torch

from medseg.bundle import (
    FOLDS_FILE,
    BundleInfo,
    checkpoint_path,
    load_bundle,
    read_checkpoint,
    write_checkpoint,
)
from medseg.cli import main
from medseg.errors import MedsegError
from medseg.formats import open_label, open_volume
from medseg.inference.averaging import decode_mean
from medseg.inference.ensemble import Ensemble
from medseg.inference.members import (
    Configuration,
    Member,
    check_agreement,
    configurations_of,
    is_model,
    together,
    write_ensemble,
)
from medseg.inference.postprocess import PostProcessing
from medseg.inference.predictor import MeanModel, Predictor, decode
from medseg.inference.sliding_window import WindowConfig
from medseg.labels import Labels
from medseg.models import MODELS
from medseg.resampling import resample
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2})


def copy_of(run: Path, target: Path, *, shake: float = 0.0, seed: int = 0) -> Path:
    """A run's bundle and best checkpoint in another folder, with weights moved at random by a share of their size."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "bundle.json", target)
    tensors, metadata = read_checkpoint(checkpoint_path(run, "best"))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.startswith("model.") and tensor.is_floating_point():
            tensors[name] = tensor * (1 + shake * torch.randn(tensor.shape, generator=generator))
    write_checkpoint(checkpoint_path(target, "best"), tensors, metadata)
    return target


def folds(run: Path, target: Path, num: int = 2, *, shake: float = 0.3) -> Path:
    """A run of several folds, as `medseg train folds=all` leaves it."""
    names = [f"fold_{i}" for i in range(num)]
    for i, name in enumerate(names):
        copy_of(run, target / name, shake=shake, seed=i)
    (target / FOLDS_FILE).write_text(json.dumps({"members": names}))
    return target


def with_plan(run: Path, **changes: object) -> Path:
    """Change the plan in a run's bundle."""
    info = BundleInfo.read(run)
    dataclasses.replace(info, plan=dataclasses.replace(info.plan, **changes)).write(run)
    return run


@pytest.fixture
def scan(tiny_run) -> Volume:
    return open_volume(sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0])


def load(run: Path, **settings: object) -> Ensemble:
    return Ensemble.from_run(run, device="cpu", precision="fp32", **settings)


def test_an_ordinary_run_is_an_ensemble_of_one(tiny_run, scan: Volume) -> None:
    alone = Predictor(load_bundle(tiny_run.run), WindowConfig()).predict_indices(scan)
    ensemble = load(tiny_run.run, postprocess=False)
    assert ensemble.num_models == 1 and ensemble.describe() == []
    predicted = ensemble.predict_indices(scan)
    assert np.array_equal(predicted.array, alone.array) and predicted.grid.difference(scan.grid) is None


@pytest.mark.parametrize("num", [1, 2, 4])
def test_folds_with_equal_weights_are_the_run_itself(tiny_run, scan: Volume, tmp_path: Path, num: int) -> None:
    run = folds(tiny_run.run, tmp_path / "run", num, shake=0)
    ensemble = load(run)
    assert ensemble.num_models == num and len(ensemble.predictors) == 1
    image = torch.randn(1, 20, 30, 28, generator=torch.Generator().manual_seed(0))
    expected = Predictor(load_bundle(tiny_run.run), WindowConfig()).logits(image)
    assert torch.equal(ensemble.predictors[0].logits(image), expected)  # bitwise: sums of 2^n equal numbers are exact


def test_folds_average_logits(tiny_run, tmp_path: Path) -> None:
    run = folds(tiny_run.run, tmp_path / "run", 3)
    image = torch.randn(1, 20, 30, 28, generator=torch.Generator().manual_seed(0))
    singly = [Predictor(load_bundle(m.run), WindowConfig()).logits(image) for m in configurations_of(run)[0].members]
    assert not torch.allclose(singly[0], singly[1], atol=1e-3)
    got = load(run).predictors[0].logits(image)
    torch.testing.assert_close(got, torch.stack(singly).mean(0), atol=1e-5, rtol=1e-5)


def test_folds_prepare_and_resample_once(tiny_run, scan: Volume, tmp_path: Path, monkeypatch) -> None:
    import medseg.inference.predictor as module

    calls: list[str] = []
    for name in ("prepare_image", "Decoding", "sliding_window_planes"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _o=original, **k: (calls.append(_n), _o(*a, **k))[1])
    load(folds(tiny_run.run, tmp_path / "run", 3)).predict_indices(scan)
    assert sorted(calls) == ["Decoding", "prepare_image", "sliding_window_planes"]


def test_mixed_precision_sums_in_full_precision() -> None:
    models = [
        MODELS.build({"name": "unet", "widths": [4, 8]}, in_channels=1, num_classes=2, spatial_dims=2).eval()
        for _ in range(2)
    ]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mean = MeanModel(models)(torch.randn(1, 1, 16, 16))
    assert mean.dtype == torch.float32


def grid(shape: tuple[int, ...], spacing: float = 1.0, orientation: str = "SPL") -> Grid:
    return Grid(shape, np.diag([*[spacing] * len(shape), 1.0])).reoriented(orientation)


def reference_mean(logits: list[tuple[torch.Tensor, Grid]], weights: list[float], scan: Grid) -> np.ndarray:
    """The same, a whole volume of every class at a time."""
    total = 0.0
    for (values, covered), weight in zip(logits, weights, strict=True):
        probabilities = resample(values, covered.shape).softmax(0).numpy() * weight
        total = total + Volume(probabilities, covered).oriented_as(scan).array
    return total


@pytest.mark.parametrize("orientation", ["SPL", "PLS", "RAI"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_plans_average_probabilities_on_the_scans_grid(orientation: str, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    scan = Grid((37, 21, 19), np.diag([1.0, 1.5, 2.0, 1.0]))
    names = {"background": 0, **{f"c{i}": i for i in range(1, num_classes)}}
    first = (3 * torch.randn(num_classes, 12, 15, 20, generator=generator), scan.reoriented("SPL"))
    second = (3 * torch.randn(num_classes, 9, 8, 30, generator=generator), scan.reoriented(orientation))
    expected = reference_mean([first, second], [0.25, 0.75], scan)
    got = decode_mean([first, second], [0.25, 0.75], Labels.from_mapping(names), scan)
    assert got.grid is scan or got.grid.difference(scan) is None
    ranked = np.sort(expected, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5
    assert clear.mean() > 0.99 and np.array_equal(got.array[clear], expected.argmax(0)[clear])
    assert len(np.unique(got.array)) == num_classes
    only_first = reference_mean([first], [1.0], scan).argmax(0)
    assert (got.array != only_first).mean() > 0.1  # the second has its say


def test_the_mean_of_two_is_neither() -> None:
    """One model is sure of liver, the other leans to spleen: the mean of probabilities says liver."""
    scan = grid((4, 4, 4))
    sure = torch.tensor([0.0, 6.0, 0.0]).view(3, 1, 1, 1).expand(3, 4, 4, 4)
    leans = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 4, 4, 4)
    got = decode_mean([(sure, scan), (leans, scan)], [0.5, 0.5], LABELS, scan)
    assert (got.array == 1).all()


def test_regions_average_sigmoids() -> None:
    labels = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": 2})
    generator = torch.Generator().manual_seed(0)
    scan = grid((18, 12, 10))
    parts = [(3 * torch.randn(2, *size, generator=generator), scan) for size in ((9, 6, 5), (18, 12, 10))]
    mean = sum(resample(values, scan.shape).sigmoid() for values, _ in parts) / 2
    got = decode_mean(parts, [0.5, 0.5], labels, scan)
    clear = ((mean - 0.5).abs() > 1e-5).all(0).numpy()
    assert np.array_equal(got.array[clear], labels.decode(mean, threshold=0.5).numpy()[clear])


@pytest.mark.parametrize("start", [0, 5])
def test_outside_a_crop_a_model_says_background(start: int) -> None:
    """A plan that crops sees the middle only; the other is unsure of the liver everywhere."""
    scan = Grid((40, 10, 10), np.eye(4))
    affine = np.eye(4)
    affine[0, 3] = start
    crop = Grid((30, 10, 10), affine)
    sure = torch.tensor([0.0, 6.0, 0.0]).view(3, 1, 1, 1).expand(3, 15, 10, 10)
    unsure = torch.tensor([0.0, 0.5, 0.0]).view(3, 1, 1, 1).expand(3, 20, 10, 10)
    for logits in ([(unsure, scan), (sure, crop)], [(sure, crop), (unsure, scan)]):
        got = decode_mean(logits, [0.5, 0.5], LABELS, scan).array
        assert (got[start : start + 30] == 1).all()
        assert (got[:start] == 0).all() and (got[start + 30 :] == 0).all()


def test_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    scan = Grid.of_picture((37, 50))
    parts = [(3 * torch.randn(3, *size, generator=generator), scan) for size in ((20, 60), (37, 50))]
    expected = sum(resample(values, scan.shape).softmax(0) for values, _ in parts) / 2
    got = decode_mean(parts, [0.5, 0.5], LABELS, scan)
    ranked = expected.sort(0).values
    clear = (ranked[-1] - ranked[-2] > 1e-5).numpy()
    assert clear.mean() > 0.99 and np.array_equal(got.array[clear], expected.argmax(0).numpy()[clear])


@pytest.mark.parametrize("orientation", ["SPL", "RAI"])
def test_a_plan_that_crops(tiny_run, scan: Volume, tmp_path: Path, orientation: str) -> None:
    """Zeros around the scan change nothing where the plan crops them off, and nothing outside gets a label; alone and
    together with a plan that does not crop."""
    values = scan.array - scan.array.min() + 1.0
    padded = np.pad(values, [(0, 0), (3, 9), (0, 4), (5, 0)])
    affine = scan.grid.affine.copy()
    affine[:3, 3] = scan.grid.to_world([-3, 0, -5])
    around = Volume(padded, Grid(padded.shape[1:], affine)).reoriented(orientation)
    inside = Volume(values, scan.grid)
    whole = copy_of(tiny_run.run, tmp_path / "whole")
    cropping = with_plan(copy_of(tiny_run.run, tmp_path / "cropping"), crop=True)
    got = load(cropping).predict_indices(around).oriented_as(Grid(padded.shape[1:], affine)).array
    expected = load(cropping).predict_indices(inside).array
    box = tuple(slice(low, low + n) for low, n in zip((3, 0, 5), scan.grid.shape, strict=True))
    assert np.array_equal(got[box], expected) and expected.any()
    got[box] = 0
    assert not got.any()
    out = tmp_path / "both"
    out.mkdir()
    write_ensemble(out, [c for run in (whole, cropping) for c in configurations_of(run)])
    together_ = load(out)
    assert len(together_.predictors) == 2
    both = together_.predict_indices(around)
    assert both.grid.difference(around.grid) is None
    logits = [p.logits_of(around) for p in together_.predictors]
    assert [covered.shape == around.grid.reoriented("SPL").shape for _, covered in logits] == [True, False]


def test_a_crop_is_put_back_where_it_was() -> None:
    scan = Grid((12, 10, 8), np.diag([-1.0, 2.0, 3.0, 1.0]))
    whole = np.random.default_rng(0).integers(0, 3, scan.shape).astype(np.uint8)
    box = (slice(2, 9), slice(0, 10), slice(3, 7))
    affine = scan.affine.copy()
    affine[:3, 3] = scan.to_world([2, 0, 3])
    part = Volume(whole[box], Grid((7, 10, 4), affine)).reoriented("SPL")
    logits = torch.from_numpy(np.stack([part.array == index for index in range(3)])).float()
    got = decode(logits, part.grid, LABELS, scan)
    expected = np.zeros_like(whole)
    expected[box] = whole[box]
    assert np.array_equal(got.array, expected) and got.grid is scan


def test_runs_of_other_plans(tiny_run, scan: Volume, tmp_path: Path) -> None:
    """Two configurations, one of two folds at another spacing and with other axes, and their mean by hand."""
    one = copy_of(tiny_run.run, tmp_path / "runs" / "one")
    two = folds(tiny_run.run, tmp_path / "runs" / "two")
    for i in range(2):
        info = BundleInfo.read(two / f"fold_{i}")
        with_plan(two / f"fold_{i}", spacing_mm=tuple(1.4 * s for s in info.plan.spacing_mm), orientation="PSL")
    out = tmp_path / "out" / "ensemble"
    out.mkdir(parents=True)
    write_ensemble(out, [c for run in (one, two) for c in configurations_of(run)])
    ensemble = load(out)
    assert [p.num_models for p in ensemble.predictors] == [1, 2] and ensemble.weights == (0.5, 0.5)
    assert "3 models" in ensemble.describe()[0]
    got = ensemble.predict(scan)
    assert got.grid.difference(scan.grid) is None and got.array.dtype == np.uint8
    expected = reference_mean([load(run).predictors[0].logits_of(scan) for run in (one, two)], [0.5, 0.5], scan.grid)
    values = ensemble.info.labels.to_values(expected.argmax(0).astype(np.uint8))
    ranked = np.sort(expected, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5
    assert clear.mean() > 0.99 and np.array_equal(got.array[clear], values[clear])

    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)  # paths are relative: one level up from there they still hold
    assert len(configurations_of(moved / "ensemble")) == 2
    shutil.move(moved / "ensemble", tmp_path / "ensemble")
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING: 3 of the runs.*move an ensemble together with its runs"):
        configurations_of(tmp_path / "ensemble")


def test_members_that_see_the_same_go_together(tiny_run, tmp_path: Path) -> None:
    same, reasons, other = (copy_of(tiny_run.run, tmp_path / name) for name in ("same", "reasons", "other"))
    with_plan(reasons, batch_size=7)
    with_plan(other, patch_size=(16, 16, 16))
    groups = together([load_bundle(run) for run in (same, other, reasons)])
    assert [[b.run.name for b in group] for group in groups] == [["same", "reasons"], ["other"]]


def test_a_changed_member_is_refused(tiny_run, tmp_path: Path) -> None:
    run = copy_of(tiny_run.run, tmp_path / "run")
    out = tmp_path / "ensemble"
    out.mkdir()
    write_ensemble(out, [Configuration(run, (Member(run),))])
    load(out)
    shutil.rmtree(run)
    copy_of(tiny_run.run, run, shake=0.1)
    with pytest.raises(MedsegError, match=r"(?s)E_CHECKPOINT: .*another than when the ensemble was chosen.*select"):
        load(out)


def test_models_that_do_not_fit(tiny_run, tmp_path: Path) -> None:
    info = BundleInfo.read(tiny_run.run)
    table = info.labels.to_json()
    relabelled = dataclasses.replace(info, labels=Labels.from_mapping({**table, "spleen": 99}))
    with pytest.raises(MedsegError, match=r"(?s)E_MODEL: these models have other classes: spleen differ.*99"):
        check_agreement([(tmp_path / "a", info), (tmp_path / "b", relabelled)])
    order = dict(reversed(table.items()))
    with pytest.raises(MedsegError, match="other order"):
        check_agreement(
            [(tmp_path / "a", info), (tmp_path / "b", dataclasses.replace(info, labels=Labels.from_mapping(order)))]
        )
    with pytest.raises(MedsegError, match="E_MODEL: these models have other channels"):
        check_agreement([(tmp_path / "a", info), (tmp_path / "b", dataclasses.replace(info, channels=("T1", "T2")))])
    check_agreement([(tmp_path / "a", info), (tmp_path / "b", info)])


@pytest.mark.parametrize(
    "content", ["", "{}", '{"members": []}', '{"members": 3}', "[]"], ids=["empty", "no key", "none", "number", "list"]
)
def test_a_damaged_table_of_folds(tmp_path: Path, content: str) -> None:
    (tmp_path / FOLDS_FILE).write_text(content)
    assert is_model(tmp_path)
    with pytest.raises(MedsegError, match="E_RUN: the table of the folder's models cannot be read"):
        configurations_of(tmp_path)


def test_unfinished_folds_are_named(tiny_run, tmp_path: Path) -> None:
    run = folds(tiny_run.run, tmp_path / "run")
    shutil.rmtree(run / "fold_1")
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING: 1 of the runs.*fold_1.*resume"):
        load(run)


def test_folds_that_are_still_in_training_are_left_out(tiny_run, tmp_path: Path) -> None:
    run = folds(tiny_run.run, tmp_path / "run", 3)
    table = {"members": ["fold_0", "fold_1", "fold_2"], "finished": {"fold_0": {}, "fold_2": {}}}
    (run / FOLDS_FILE).write_text(json.dumps(table))
    shutil.rmtree(run / "fold_1" / "checkpoints")
    ensemble = load(run)
    assert ensemble.num_models == 2 and "not finished, and left out: fold_1" in ensemble.describe()[0]
    (run / FOLDS_FILE).write_text(json.dumps({**table, "finished": {}}))
    with pytest.raises(MedsegError, match=r"(?s)E_RUN: no fold of this run is finished.*resume=.*fold_0 SCAN"):
        load(run)


def test_mirroring_asks_every_member(tiny_run, scan: Volume, tmp_path: Path) -> None:
    run = folds(tiny_run.run, tmp_path / "run")
    info = BundleInfo.read(run / "fold_1")
    with pytest.raises(MedsegError, match="E_MODEL: the model was trained without mirroring"):
        load(run, mirror=True)
    for i in range(2):
        dataclasses.replace(info, mirror_axes=(1,)).write(run / f"fold_{i}")
    ensemble = load(run, mirror=True)
    assert ensemble.predictors[0].config.mirroring.axes == (1,)
    ensemble.predict_indices(scan)


def test_predict_says_what_it_does(tiny_run, tmp_path: Path, capsys) -> None:
    """Through the front door: folds, their post-processing, and without it."""
    run = folds(tiny_run.run, tmp_path / "run")
    PostProcessing(steps=("liver",)).write(run)
    scan = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0]
    case = scan.name.replace("_0000", "")
    main(["predict", str(run), str(scan), "-o", str(tmp_path / "with"), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "ensemble: 2 models (unet), mean of their logits" in said
    assert "post-processing: only the largest component stays of: liver; --no-postprocess leaves it out" in said
    main(["predict", str(run), str(scan), "-o", str(tmp_path / "without"), "--device", "cpu", "--no-postprocess"])
    assert "post-processing" not in capsys.readouterr().out
    labels = BundleInfo.read(run / "fold_0").labels
    plain, done = (open_label(tmp_path / name / case).array for name in ("without", "with"))
    expected = PostProcessing(steps=("liver",)).apply(labels.to_index(plain), labels)
    assert np.array_equal(labels.to_index(done), expected)
    with pytest.raises(SystemExit):
        main(["predict", str(scan), str(run), "-o", str(tmp_path / "x")])
    assert "did you swap them?" in capsys.readouterr().err


MEMORY = (
    peak.IMPORT
    + """
import numpy as np, torch
from medseg.inference.averaging import decode_mean
from medseg.labels import Labels
from medseg.volume import Grid
torch.set_num_threads(1)
labels = Labels.from_mapping({f"c{i}": i for i in range(12)})
scan = Grid((256, 192, 192), np.eye(4))
small = Grid((16, 16, 16), np.eye(4))
parts = [(torch.randn(12, 64, 64, 64), scan), (torch.randn(12, 48, 64, 64), scan)]
decode_mean([(t[:, :8, :8, :8].contiguous(), small) for t, _ in parts], [.5, .5], labels, small)
before = peak_bytes()
decode_mean(parts, [.5, .5], labels, scan)
print((peak_bytes() - before) / 2**20)
"""
)


def test_memory_is_bounded() -> None:
    """All classes on the scan's grid would be 432 MiB for each model; a slab of one class is 2.25 MiB, the result 9."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300)
    assert float(result.stdout) < 80
