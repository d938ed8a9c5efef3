"""On a CUDA device: the same roads as on the CPU, with the same results, and the roads that only a GPU has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from medseg.bundle import load_bundle
from medseg.config import compose
from medseg.data.augment import AugmentConfig, Augmenter, Mirroring
from medseg.data.sampling import BatchItem
from medseg.device import choose_precision
from medseg.formats import open_volume
from medseg.inference.averaging import decode_mean
from medseg.inference.ensemble import Ensemble
from medseg.inference.memory import GIB, STITCHED_ON_HOST
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig, sliding_window_logits
from medseg.inference.warm import Predictor as WarmPredictor
from medseg.models import MODELS
from medseg.models.compiling import Forward
from medseg.training.feeding import on_device
from medseg.training.train import TrainResult, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TF32, whose ten bits decide differently where a network of ten steps is undecided."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(data: Path, folder: Path, *overrides: str) -> TrainResult:
    """A training of three steps on the GPU."""
    settings = [
        f"data.root='{data}'", "trainer.device=cuda", "trainer.max_steps=3", "trainer.log_steps=1",
        "trainer.num_validations=1", "data.plan.base_width=4", "data.plan.num_stages=2", "data.split.num_folds=2",
        *overrides,
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.txt").open("w", encoding="utf-8") as log:
        return train(compose("train", settings), folder, Console(file=log, width=300))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_train_and_predict(tiny_run, tmp_path: Path, padding: str, precision: str) -> None:
    result = run(
        tiny_run.data,
        tmp_path / "run",
        f"trainer.precision={precision}",
        f"model.padding={padding}",
        "model.down=max_pool",
        "model.deep_supervision=false",
    )
    assert result.steps == 3 and result.evaluation is not None
    assert math.isfinite(result.best_dice)


def test_a_run_in_fp16_goes_on_with_its_scale(tiny_run, tmp_path: Path) -> None:
    """The gradients' scale is part of the checkpoint."""
    from medseg.config import resumed

    fp16 = ("trainer.precision=fp16", "trainer.final_predictions=false", "trainer.ema=0.9")
    run(tiny_run.data, tmp_path / "run", *fp16)
    with (tmp_path / "again.txt").open("w", encoding="utf-8") as log:
        result = train(resumed(tmp_path / "run", ["trainer.max_steps=5"]), tmp_path / "run", Console(file=log))
    assert result.steps == 5 and math.isfinite(result.best_dice)


def test_compiled_training_is_the_same_training(tiny_run, tmp_path: Path) -> None:
    """Three steps of plain gradient descent with a compiled network and without end in weights that agree."""
    from test_training import weights

    fp32 = ("trainer.precision=fp32", "trainer.final_predictions=false", "optimizer=sgd", "optimizer.lr=1e-3")
    run(tiny_run.data, tmp_path / "plain", *fp32, "trainer.compile=off")
    run(tiny_run.data, tmp_path / "compiled", *fp32, "trainer.compile=on")
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    assert "cannot be compiled" not in (tmp_path / "compiled.txt").read_text(encoding="utf-8")
    assert all(torch.allclose(plain[k], compiled[k], atol=1e-3) for k in plain)


def test_predictions_agree_with_the_cpu(tiny_run) -> None:
    scan = open_volume(tiny_run.dicom)
    labels = [
        Predictor(load_bundle(tiny_run.run, device=device), WindowConfig()).predict(scan).array
        for device in ("cpu", "cuda")
    ]
    assert np.mean(labels[0] == labels[1]) > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_predicts_nearly_the_same(tiny_run, precision: str) -> None:
    if precision == "bf16" and choose_precision("auto", CUDA) != "bf16":
        pytest.skip("this GPU does not compute in bf16")
    scan = open_volume(tiny_run.dicom)
    full, mixed = (
        WarmPredictor.load(tiny_run.run, device="cuda", precision=p, postprocess=False)(scan, probabilities=True)
        for p in ("fp32", precision)
    )
    assert full.probabilities is not None and mixed.probabilities is not None
    np.testing.assert_allclose(full.probabilities.array, mixed.probabilities.array, atol=0.05)


def test_compiled_prediction_agrees_and_fills_its_batches(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = open_volume(tiny_run.dicom)
    settings = {"device": "cuda", "precision": "fp32", "postprocess": False, "batch_size": 3}
    plain = WarmPredictor.load(tiny_run.run, **settings)(scan).indices.array
    predictor = WarmPredictor.load(tiny_run.run, compile="on", **settings)
    sizes: list[int] = []
    call = Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda self, image: (sizes.append(len(image)), call(self, image))[1])
    assert np.mean(predictor(scan).indices.array == plain) > 0.999
    assert set(sizes) == {3}


def test_memory_that_runs_out_becomes_smaller_batches(tiny_run, caplog: pytest.LogCaptureFixture) -> None:
    """A real refusal of CUDA's: a batch that no GPU holds, then one that it holds."""
    scan = open_volume(tiny_run.dicom)
    predictor = WarmPredictor.load(tiny_run.run, device="cuda", precision="fp32", postprocess=False, batch_size=4)
    expected = predictor(scan).indices.array
    (one,) = predictor.ensemble.predictors
    forward = one.model.forward

    def greedy(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            torch.empty(2**50, device=CUDA)
        result: torch.Tensor = forward(x)
        return result

    one.model.forward = greedy  # type: ignore[method-assign]
    assert np.mean(predictor(scan).indices.array == expected) > 0.999
    assert one.forward.largest_batch == 1 and "does not suffice for a batch" in caplog.text


def test_sums_in_main_memory_say_the_same(
    tiny_run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from medseg.inference import memory

    planned = memory._planned

    def no_room_for_sums(scan, models, device, wanted, dtype, sums_on):
        plan = planned(scan, models, device, wanted, dtype, sums_on)
        return plan if sums_on.type == "cpu" else dataclasses.replace(plan, on_device={"sums": 2**20 * GIB})

    scan = open_volume(tiny_run.dicom)
    predictor = Predictor(load_bundle(tiny_run.run, device="cuda"), WindowConfig())
    near = predictor.predict(scan).array
    monkeypatch.setattr("medseg.inference.memory._planned", no_room_for_sums)
    far = predictor.predict(scan).array
    assert STITCHED_ON_HOST in caplog.text
    assert np.mean(near == far) > 0.999


def test_two_plans_are_averaged_on_the_gpu(tiny_run) -> None:
    scan = open_volume(tiny_run.dicom)
    one = Predictor(load_bundle(tiny_run.run, device="cuda"), WindowConfig())
    both = Ensemble([one, one]).predict_indices(scan).array
    assert np.mean(both == one.predict_indices(scan).array) > 0.999
    parts = [one.logits_of(scan), one.logits_of(scan)]
    mean = decode_mean(parts, [0.5, 0.5], one.info.labels, scan.grid)
    assert parts[0][0].device.type == "cuda" and np.mean(np.asarray(mean.array) == both) > 0.999


def test_half_sums_agree_with_full_ones() -> None:
    model = MODELS.build({"name": "unet", "widths": [4, 8]}, in_channels=1, num_classes=3, spatial_dims=3).eval()
    model, image = model.to(CUDA), torch.randn(1, 20, 30, 28)
    full, half = (
        sliding_window_logits(model, image, (16, 16, 16), 3, WindowConfig(), dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert full.device.type == "cuda"
    torch.testing.assert_close(half.float(), full, atol=2e-2, rtol=2e-2)


def test_augmentation_is_that_of_the_cpu() -> None:
    """What is drawn is a function of (seed, step), wherever it is computed."""
    augment = Augmenter(
        AugmentConfig(),
        patch_size=(16, 20, 24),
        spacing_mm=(1.0, 1.0, 1.0),
        is_picture=False,
        mirroring=Mirroring((0, 1, 2)),
        seed=3,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        size = augment.cut_size(step, 2)
        image = torch.randn((2, 1, *size), generator=generator)
        label = (image[:, 0] > 0.5).to(torch.uint8)
        here = augment(image.clone(), label.clone(), step)
        there = [tensor.cpu() for tensor in augment(image.to(CUDA), label.to(CUDA), step)]
        assert (here[1] == there[1]).float().mean() > 0.99  # a point between two voxels may be rounded to either
        assert (here[0] - there[0]).abs().mean() < 0.05, step


def test_nothing_in_a_step_waits_for_the_gpu(tiny_run, tmp_path: Path, monkeypatch) -> None:
    """A step that reads a number back from the GPU would stop the queue."""
    from medseg.training.loop import Loop

    original = Loop.train_step

    def watched(self: Loop, *batch: object) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if self.counters.step else "default")  # the first sets things up
        try:
            return original(self, *batch)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "train_step", watched)
    run(tiny_run.data, tmp_path / "run", "trainer.precision=bf16", "trainer.final_predictions=false",
        "trainer.log_steps=100")  # fmt: skip


def test_pinned_copies_arrive_whole() -> None:
    """Batches that are overwritten by the next as soon as they were handed over."""
    shape = (2, 1, 64, 64, 64)

    def batches() -> Generator[BatchItem, None, None]:
        for step in range(20):
            yield step, torch.full(shape, float(step)), torch.full((2, *shape[2:]), step, dtype=torch.uint8)

    for step, image, label in on_device(batches(), CUDA):
        assert image.device.type == label.device.type == "cuda"
        work = image * 2  # on the computing stream, which must wait for the copy
        assert bool((work == 2 * step).all()) and bool((label == step).all())
