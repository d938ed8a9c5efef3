"""`medseg.Predictor`: one warm object for files and arrays, with everything that can be said of a scan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import medseg
from medseg.errors import MedsegError
from medseg.formats import open_volume
from medseg.inference.warm import Predictor
from medseg.volume import Volume


@pytest.fixture(scope="module")
def predictor(tiny_run) -> Predictor:
    return medseg.Predictor.load(tiny_run.run, device="cpu", precision="fp32", postprocess=False)


@pytest.fixture
def path(tiny_run) -> Path:
    return sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0]


def test_import_medseg_stays_light() -> None:
    code = "import sys, medseg; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; medseg.Predictor"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="Predicter"):
        medseg.Predicter  # noqa: B018


def test_paths_volumes_and_arrays_give_the_same(predictor: Predictor, path: Path) -> None:
    scan = open_volume(path)
    expected = predictor.ensemble.predict(scan)
    array = np.asarray(scan.array)
    found = [
        predictor(path),
        predictor(str(path)),
        predictor([path]),
        predictor(scan),
        predictor(array, affine=scan.grid.affine),
        predictor(array[0], affine=scan.grid.affine),
    ]
    for got in found:
        assert np.array_equal(got.labels.array, expected.array) and got.labels.array.dtype == expected.array.dtype
        assert got.labels.grid.difference(scan.grid) is None
        assert got.probabilities is None and got.uncertainty is None


@pytest.mark.parametrize("orientation", ["SPL", "RAS", "LIA"])
def test_an_array_with_spacing_and_orientation(predictor: Predictor, path: Path, orientation: str) -> None:
    turned = open_volume(path).reoriented(orientation)
    expected = predictor(turned).labels.array
    got = predictor(np.asarray(turned.array)[0], spacing_mm=turned.grid.spacing_mm, orientation=orientation)
    assert np.array_equal(got.labels.array, expected)
    assert got.labels.grid.orientation == orientation


def test_probabilities_and_uncertainty(predictor: Predictor, path: Path) -> None:
    got = predictor(path, probabilities=True, uncertainty=True)
    labels = predictor.ensemble.info.labels
    assert got.probabilities is not None and got.uncertainty is not None
    probabilities = got.probabilities.array.astype(np.float32)
    assert probabilities.shape == (labels.num_classes, *got.labels.grid.shape)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=5e-3)
    ranked = np.sort(probabilities, axis=0)
    clear = ranked[-1] - ranked[-2] > 2e-3
    assert clear.mean() > 0.9 and np.array_equal(got.indices.array[clear], probabilities.argmax(0)[clear])
    assert got.uncertainty.array.min() >= 0 and got.uncertainty.array.max() <= 1
    assert got.uncertainty.array[ranked[-1] > 0.9].mean() < got.uncertainty.array[ranked[-1] < 0.5].mean()


def test_what_is_refused(predictor: Predictor, path: Path, tiny_run) -> None:
    array = np.zeros((20, 20, 20), np.float32)
    with pytest.raises(MedsegError, match="(?s)E_NO_GEOMETRY.*spacing_mm"):
        predictor(array)
    with pytest.raises(MedsegError, match="orientation='RAR'"):
        predictor(array, spacing_mm=(1, 1, 1), orientation="RAR")
    with pytest.raises(MedsegError, match="does not fit the model"):
        predictor(array[None, None], spacing_mm=(1, 1, 1))
    array[3, 3, 3] = np.nan
    with pytest.raises(MedsegError, match="E_NONFINITE"):
        predictor(array, spacing_mm=(1, 1, 1))
    with pytest.raises(MedsegError, match="not one scan"):
        predictor(tiny_run.data / "imagesTr")


def test_a_scan_too_large_is_refused_before_any_work(
    predictor: Predictor, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.inference.memory.available_bytes", lambda: 2**20)
    (one,) = predictor.ensemble.predictors
    monkeypatch.setattr(one.model, "forward", lambda x: pytest.fail("the network was asked"))
    with pytest.raises(MedsegError, match="E_LIMIT"):
        predictor(path)


def test_several_plans_say_the_same_in_every_form(tiny_run, predictor: Predictor, path: Path) -> None:
    """Two predictors with the same weights: the mean of their probabilities is those of one."""
    from medseg.inference.ensemble import Ensemble

    (one,) = predictor.ensemble.predictors
    got = Predictor(Ensemble([one, one]))(path, probabilities=True, uncertainty=True)
    alone = predictor(path, probabilities=True, uncertainty=True)
    for ours, theirs in ((got.probabilities, alone.probabilities), (got.uncertainty, alone.uncertainty)):
        assert isinstance(ours, Volume) and isinstance(theirs, Volume)
        np.testing.assert_allclose(ours.array, theirs.array, atol=2e-3)
    assert (got.indices.array != alone.indices.array).mean() < 1e-3


def test_precision_of_the_sums_follows_the_memory(predictor: Predictor, path: Path, monkeypatch) -> None:
    from medseg.inference import predictor as module

    seen: list[torch.dtype] = []
    original = module.sliding_window_planes
    monkeypatch.setattr(module, "sliding_window_planes", lambda *a: (seen.append(a[-1]), original(*a))[1])
    predictor(path)
    full = module.plan_memory
    monkeypatch.setattr(
        module,
        "plan_memory",
        lambda *a, **k: type("Plan", (), {"dtype": torch.float16})() if full(*a, **k) else None,
    )
    half = predictor(path)
    assert seen == [torch.float32, torch.float16]
    assert (half.indices.array == predictor.ensemble.predict_indices(open_volume(path)).array).mean() > 0.99
