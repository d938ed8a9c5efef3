"""`medseg.Predictor`: one warm object for files and arrays, with everything that can be said of a scan."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import medseg
from medseg.errors import MedsegError
from medseg.formats import open_volume
from medseg.inference.ensemble import planned_logits
from medseg.inference.manifest import options_of
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
    with pytest.raises(MedsegError, match="E_LIMIT"):  # as medseg select asks several runs
        planned_logits([one, one], open_volume(path))


def test_several_plans_say_the_same_in_every_form(tiny_run, predictor: Predictor, path: Path) -> None:
    """Two predictors with the same weights: the mean of their probabilities is those of one."""
    from medseg.inference.ensemble import Ensemble

    (one,) = predictor.ensemble.predictors
    got = Predictor(Ensemble([one, one]))(path, probabilities=True, uncertainty=True)
    alone = predictor(path, probabilities=True, uncertainty=True)
    for ours, theirs in (
        (got.probabilities, alone.probabilities),
        (got.uncertainty, alone.uncertainty),
        (got.disagreement, alone.disagreement),
    ):
        assert isinstance(ours, Volume) and isinstance(theirs, Volume)
        np.testing.assert_allclose(ours.array, theirs.array, atol=2e-3)
    assert (got.indices.array != alone.indices.array).mean() < 1e-3


def test_precision_of_the_sums_follows_the_memory(predictor: Predictor, path: Path, monkeypatch) -> None:
    from medseg.inference import predictor as module

    seen: list[torch.dtype] = []
    original = module.sliding_window_planes
    monkeypatch.setattr(module, "sliding_window_planes", lambda *a, **k: (seen.append(a[-1]), original(*a, **k))[1])
    predictor(path)
    full = module.plan_memory
    monkeypatch.setattr(
        module,
        "plan_memory",
        lambda *a, **k: dataclasses.replace(full(*a, **k), dtype=torch.float16),
    )
    half = predictor(path)
    assert seen == [torch.float32, torch.float16]
    assert (half.indices.array == predictor.ensemble.predict_indices(open_volume(path)).array).mean() > 0.99


def _full(model: torch.nn.Module, num_fit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a network run out of memory above a number of tiles; the sizes of the batches that it was given."""
    original, sizes = model.forward, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > num_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(x)

    monkeypatch.setattr(model, "forward", forward)
    return sizes


def test_batches_that_do_not_fit_become_smaller_and_stay_so(tiny_run, path: Path, monkeypatch, caplog) -> None:
    predictor = medseg.Predictor.load(tiny_run.run, device="cpu", precision="fp32", batch_size=4, step=0.05)
    expected = predictor(path).indices.array
    (one,) = predictor.ensemble.predictors
    sizes = _full(one.model, 1, monkeypatch)
    assert (predictor(path).indices.array == expected).mean() > 0.999  # but for roundings
    assert sizes[:3] == [4, 2, 1] and set(sizes[3:]) == {1}
    assert (predictor(path).indices.array == expected).mean() > 0.999
    assert sizes.count(4) == sizes.count(2) == 1
    assert sum("does not suffice for a batch" in record.message for record in caplog.records) == 2


def test_a_device_without_room_for_one_tile_is_told_so(tiny_run, path: Path, monkeypatch) -> None:
    predictor = medseg.Predictor.load(tiny_run.run, device="cpu")
    (one,) = predictor.ensemble.predictors
    _full(one.model, 0, monkeypatch)
    with pytest.raises(MedsegError, match=r"(?s)E_LIMIT.*one tile.*--device cpu"):
        predictor(path)
    with pytest.raises(MedsegError, match="E_LIMIT"):
        one.logits(torch.zeros(1, 16, 24, 24))


@pytest.mark.parametrize("several", [False, True])
def test_sums_move_to_main_memory_where_the_device_is_full(
    tiny_run, path: Path, monkeypatch, caplog, several: bool
) -> None:
    """The device is the CPU under another name: what is asked for there runs out of memory once the network is past."""
    from medseg.inference import predictor as module
    from medseg.inference.ensemble import Ensemble

    predictor = medseg.Predictor.load(tiny_run.run, device="cpu", precision="fp32")
    (one,) = predictor.ensemble.predictors
    chosen = Ensemble([one, one]) if several else predictor.ensemble
    expected = chosen.predict_indices(open_volume(path)).array
    asked: list[torch.device | None] = []

    def full(original):
        def work(*arguments, forward, sums_on):
            asked.append(sums_on)
            if sums_on != torch.device("cpu"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*arguments, forward=forward, sums_on=sums_on)

        return work

    for name in ("sliding_window_planes", "sliding_window_logits"):
        monkeypatch.setattr(module, name, full(getattr(module, name)))
    memory = module.plan_memory
    elsewhere = torch.device("meta")
    for place in ("predictor", "ensemble"):
        monkeypatch.setattr(
            f"medseg.inference.{place}.plan_memory",
            lambda *a, **k: dataclasses.replace(memory(*a, **k), sums_on=elsewhere),
        )
    np.testing.assert_array_equal(chosen.predict_indices(open_volume(path)).array, expected)
    assert asked == [elsewhere, torch.device("cpu")] * (2 if several else 1)
    assert "put together in main memory" in caplog.text


def test_who_is_compiled_in_prediction(tiny_run, path: Path, monkeypatch) -> None:
    from medseg.inference import predictor as module

    compiled: list[object] = []

    def quick(model):
        compiled.append(model)
        return lambda x: model(x)

    monkeypatch.setattr(torch, "compile", quick)
    settings = {"device": "cpu", "precision": "fp32", "postprocess": False}
    (off,) = medseg.Predictor.load(tiny_run.run, **settings).ensemble.predictors
    automatic = medseg.Predictor.load(tiny_run.run, device="cpu", compile="auto").ensemble
    (auto,) = automatic.predictors
    assert options_of(automatic)["compile"] == "off", "what the manifest records is what was done"
    assert not off.forward.compiled and not auto.forward.compiled
    on = medseg.Predictor.load(tiny_run.run, compile="on", **settings)
    assert options_of(on.ensemble)["compile"] == "on"
    expected = off.predict_indices(open_volume(path)).array
    assert np.mean(on(path).indices.array == expected) > 0.99 and len(compiled) == 1
    on(path)
    assert len(compiled) == 1
    (one,) = on.ensemble.predictors
    one.forward.after, one.forward._call = 2, one.model  # as "auto" on CUDA does, after more passes
    image = torch.zeros(1, 16, 24, 24)
    for expected_count in (1, 1, 2):
        one.logits(image)
        assert len(compiled) == expected_count
    assert module.LONG_PASSES > 0
