"""The loop: what a run leaves behind, resume, schedules, early stopping, a loss that is not finite."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from medseg.bundle import checkpoint_path, read_checkpoint
from medseg.config import compose, resumed
from medseg.errors import MedsegError
from medseg.formats import open_label, open_volume, write_image, write_label
from medseg.training.loop import Loop
from medseg.training.schedules import SCHEDULES
from medseg.training.train import TrainResult, train
from medseg.volume import Grid, Volume

TINY = (
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,16,16]",
    "trainer.device=cpu",
    "trainer.num_validations=2",
    "trainer.log_steps=1",
    "trainer.overlay_cases=1",
    "trainer.map_cases=0",  # what else TensorBoard gets takes longer than these trainings: test_tensorboard.py
    "trainer.embedding_cases=0",
    "trainer.final_predictions=false",
)


def run(data: Path, folder: Path, *overrides: str) -> TrainResult:
    experiment = compose("train", [f"data.root='{data}'", *TINY, *overrides])
    with (folder.parent / f"{folder.name}.txt").open("w") as log:
        return train(experiment, folder, Console(file=log))


def weights(folder: Path, name: str = "latest") -> dict[str, torch.Tensor]:
    return {k: v for k, v in read_checkpoint(checkpoint_path(folder, name))[0].items() if k.startswith("model.")}


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_holds_everything_about_it(tiny_run) -> None:
    folder = tiny_run.run
    expected = {
        "bundle.json",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "history.csv",
        "plan.yaml",
        "split.json",
        "survey.json",
        "tensorboard",
        "validation",
    }
    assert expected <= {p.name for p in folder.iterdir()}
    rows = history(folder)
    assert [int(r["step"]) for r in rows if r["train_loss"]] == [2, 4, 6, 8, 10]
    validations = [r for r in rows if r["val_dice_mean"]]
    assert [int(r["step"]) for r in validations] == [5, 10]
    per_class = [float(v) for k, v in validations[-1].items() if k.startswith("val_dice_") and k != "val_dice_mean"]
    assert float(validations[-1]["val_dice_mean"]) == pytest.approx(np.mean(per_class), abs=1e-4)  # none is absent
    plan = yaml.safe_load((folder / "plan.yaml").read_text())
    assert plan["patch_size"] == [16, 24, 24] and plan["normalisation"] == ["ct"]


def test_final_predictions_lie_on_the_scans_grids(tiny_run) -> None:
    split = json.loads((tiny_run.run / "split.json").read_text())
    metrics = json.loads((tiny_run.run / "validation" / "metrics.json").read_text())
    assert metrics["num_cases"] == len(split["val"]) > 0
    case = split["val"][0]
    predicted = open_label(tiny_run.run / "validation" / f"{case}.nii.gz")
    scan = open_volume(tiny_run.data / "imagesTr" / f"{case}_0000.nii.gz")
    assert predicted.grid.difference(scan.grid) is None and predicted.array.dtype == np.uint8
    assert list((tiny_run.run / "validation" / "overlays").glob("*.png"))


def test_tensorboard_holds_scalars_pictures_and_the_configuration(tiny_run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny_run.run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/training", "loss/validation", "training/lr", "dice/mean", "dice/liver"} <= set(tags["scalars"])
    (overlay,) = [tag for tag in tags["images"] if tag.startswith("validation/")]
    assert len(events.Images(overlay)) == 2
    text = {t for t in tags["tensors"] if t.startswith(("configuration", "plan"))}
    assert len(text) == 2


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_resume_goes_on_as_if_nothing_had_happened(tiny_run, tmp_path: Path, signal_: signal.Signals) -> None:
    """6 steps straight and 3 + 3 give the same weights, optimizer and augmentation included, bit by bit."""
    settings = ("trainer.precision=fp32", "schedule=cosine")
    run(tiny_run.data, tmp_path / "straight", *settings, "trainer.max_steps=6")

    interrupted = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        from medseg.training.loop import Loop

        original = Loop.train_step

        def ask_to_stop(self, step, image, label):
            if step == 2:
                os.kill(os.getpid(), signal_)
            return original(self, step, image, label)

        patch.setattr(Loop, "train_step", ask_to_stop)
        with pytest.raises(KeyboardInterrupt if signal_ == signal.SIGINT else SystemExit) as ended:
            run(tiny_run.data, interrupted, *settings, "trainer.max_steps=6")
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 143
    assert [int(r["step"]) for r in history(interrupted)][-1] == 3
    result = run(tiny_run.data, interrupted, *settings, "trainer.max_steps=6", f"resume='{interrupted}'")
    assert result.steps == 6
    straight, resumed = weights(tmp_path / "straight"), weights(interrupted)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    losses = [[r["train_loss"] for r in history(tmp_path / n) if r["train_loss"]] for n in ("straight", "interrupted")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_resumed_run_keeps_its_split_where_the_folder_has_grown(tiny_run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    hidden = [data / "imagesTr" / "phantom_001_0000.nii.gz", data / "labelsTr" / "phantom_001.nii.gz"]
    description = json.loads((data / "dataset.json").read_text())
    description["numTraining"] -= 1
    (data / "dataset.json").write_text(json.dumps(description))
    for path in hidden:
        path.rename(tmp_path / path.name)
    run(data, tmp_path / "run", "trainer.max_steps=2")
    split, plan = (tmp_path / "run" / "split.json").read_text(), (tmp_path / "run" / "plan.yaml").read_text()
    for path in hidden:
        (tmp_path / path.name).rename(path)
    result = run(data, tmp_path / "run", "trainer.max_steps=4", f"resume='{tmp_path / 'run'}'")
    assert result.steps == 4
    assert (tmp_path / "run" / "split.json").read_text() == split
    assert (tmp_path / "run" / "plan.yaml").read_text() == plan
    validations = [int(r["step"]) for r in history(tmp_path / "run") if r["val_dice_mean"]]
    assert validations == [1, 2, 4]  # two of the first budget, and the one still due of the larger
    for path in (data / "imagesTr").glob("phantom_003*"):
        path.unlink()
    (data / "labelsTr" / "phantom_003.nii.gz").unlink()
    with pytest.raises(MedsegError, match="E_MISSING.*not in the data folder any more"):
        run(data, tmp_path / "run", "trainer.max_steps=6", f"resume='{tmp_path / 'run'}'")


def test_test_cases_are_not_looked_at_and_validation_cases_shape_no_plan(tiny_run, tmp_path: Path) -> None:
    rows = ["case,image,label,split"]
    sides = {"phantom_001": "train", "phantom_002": "train", "phantom_003": "val", "phantom_004": "test"}
    for name, side in sides.items():
        label = "" if side == "test" else tiny_run.data / "labelsTr" / f"{name}.nii.gz"
        rows.append(f"{name},{tiny_run.data / 'imagesTr' / f'{name}_0000.nii.gz'},{label},{side}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    run(tmp_path / "manifest.csv", tmp_path / "a", "trainer.max_steps=1", "data.plan.patch_size=null")
    survey = json.loads((tmp_path / "a" / "survey.json").read_text())
    assert {c["case_id"] for c in survey["cases"]} == {"phantom_001", "phantom_002", "phantom_003"}
    first = yaml.safe_load((tmp_path / "a" / "plan.yaml").read_text())

    other = tmp_path / "other.nii.gz"  # another validation image: much brighter, other spacing
    scan = open_volume(tiny_run.data / "imagesTr" / "phantom_003_0000.nii.gz")
    grid = Grid(scan.grid.shape, scan.grid.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
    write_image(other, Volume(scan.array * 3, grid))
    label = open_label(tiny_run.data / "labelsTr" / "phantom_003.nii.gz")
    write_label(tmp_path / "other_label.nii.gz", Volume(label.array, grid))
    rows[3] = f"phantom_003,{other},{tmp_path / 'other_label.nii.gz'},val"
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    run(tmp_path / "manifest.csv", tmp_path / "b", "trainer.max_steps=1", "data.plan.patch_size=null")
    assert yaml.safe_load((tmp_path / "b" / "plan.yaml").read_text()) == first


def test_bad_cases_stay_out_when_told(tiny_run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    broken = data / "imagesTr" / "phantom_004_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-60])
    with pytest.raises(MedsegError, match="E_TRUNCATED"):
        run(data, tmp_path / "a", "trainer.max_steps=1")
    run(data, tmp_path / "b", "trainer.max_steps=1", "data.on_bad_case=skip", "data.split.validation=[phantom_001]")
    split = json.loads((tmp_path / "b" / "split.json").read_text())
    assert split["train"] == ["phantom_002", "phantom_003"] and split["val"] == ["phantom_001"]
    assert "left out   phantom_004: E_TRUNCATED" in (tmp_path / "b.txt").read_text()


def test_volumes_smaller_than_any_patch(tmp_path: Path) -> None:
    grid = Grid((6, 7, 5), np.eye(4))
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(3):
        label = np.zeros(grid.shape, dtype=np.uint8)
        label[2:4, 2:5, 1:4] = 1
        image = np.random.default_rng(i).normal(size=(1, *grid.shape)) + label
        write_image(tmp_path / "data" / "images" / f"{i}.nii.gz", Volume(image, grid))
        write_label(tmp_path / "data" / "labels" / f"{i}.nii.gz", Volume(label, grid))
    experiment = compose("train", [f"data.root='{tmp_path / 'data'}'", "trainer.max_steps=1", "trainer.device=cpu"])
    with (tmp_path / "log.txt").open("w") as log:
        train(experiment, tmp_path / "run", Console(file=log))
    assert open_label(next((tmp_path / "run" / "validation").glob("*.nii.gz"))).grid.shape == grid.shape


def test_one_case_is_learnt_by_heart(tiny_run, tmp_path: Path) -> None:
    result = run(
        tiny_run.data,
        tmp_path / "run",
        "debug=overfit",
        "trainer.max_minutes=null",
        "trainer.max_steps=400",
        "trainer.log_steps=10",
        "optimizer.lr=0.01",
        "data.plan.base_width=8",
        "data.plan.batch_size=2",
        "data.plan.patch_size=[16,24,24]",
    )
    losses = [float(r["train_loss"]) for r in history(tmp_path / "run") if r["train_loss"]]
    assert losses[-1] < 0.1 * losses[0]
    assert result.best_dice > 0.95
    again = train(resumed(tmp_path / "run", ["trainer.max_steps=401"]), tmp_path / "run", Console(file=io.StringIO()))
    assert again.steps == 401  # the same cases on both sides are no leak where they were asked for


def test_early_stopping(tiny_run, tmp_path: Path) -> None:
    result = run(
        tiny_run.data,
        tmp_path / "run",
        "trainer.max_steps=40",
        "trainer.num_validations=20",
        "trainer.patience=1",
        "optimizer.lr=1e-12",
    )
    assert result.steps == 4  # validated at 2 (the best by being first) and at 4 (no better)


def test_a_loss_that_is_not_finite_ends_the_run(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.training.loop.Loop.train_step", lambda self, step, image, label: torch.tensor(math.nan))
    with pytest.raises(MedsegError, match=r"(?s)E_NAN_LOSS.*step 1.*lower optimizer.lr"):
        run(tiny_run.data, tmp_path / "run", "trainer.max_steps=4")
    assert not checkpoint_path(tmp_path / "run", "best").exists()


def test_without_overlays_and_out_of_patience(tiny_run, tmp_path: Path) -> None:
    """A run that stopped early stays as it is when it is resumed."""
    overrides = ["trainer.max_steps=40", "trainer.num_validations=20", "trainer.patience=1", "optimizer.lr=1e-12"]
    run(tiny_run.data, tmp_path / "run", *overrides, "trainer.overlay_cases=0")
    best = weights(tmp_path / "run", "best")
    result = train(resumed(tmp_path / "run", []), tmp_path / "run", Console(file=io.StringIO()))
    assert result.steps == 4
    assert all(torch.equal(best[k], v) for k, v in weights(tmp_path / "run", "best").items())


@pytest.mark.parametrize("spoilt", ["weights", "statistics", "average"])
def test_weights_that_are_not_finite_are_not_saved(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """The loss is that of before the update: it can be finite where the weights are not any more."""
    original = Loop.train_step

    def spoiled(self: Loop, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = original(self, step, image, label)
        assert self.average is not None
        average = {k: v for k, v in self.average.weights().items() if v.is_floating_point()}
        statistics = {k: v for k, v in self.model.state_dict().items() if k.endswith("running_var")}
        places = {"weights": dict(self.model.named_parameters()), "statistics": statistics, "average": average}
        next(iter(places[spoilt].values())).data.fill_(math.nan)
        return loss

    monkeypatch.setattr("medseg.training.loop.Loop.train_step", spoiled)
    with pytest.raises(MedsegError, match=r"(?s)E_NAN_LOSS.*weights are not finite.*step 1"):
        run(tiny_run.data, tmp_path / "run", "trainer.max_steps=1", "trainer.ema=0.9", "model.normalisation=batch")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_time_budget(tiny_run, tmp_path: Path) -> None:
    result = run(tiny_run.data, tmp_path / "run", "trainer.max_minutes=0.1", "schedule.warmup=0", "optimizer.lr=1e-3")
    assert result.steps >= 1 and result.minutes >= 0.1
    logged = [(float(r["minutes"]), float(r["lr"])) for r in history(tmp_path / "run") if r["lr"]]
    assert logged
    before = 0.0
    for minutes, rate in logged:  # the schedule ran over time: the last step began since the row before
        latest, earliest = minutes + 1e-4, max(0.0, before - 1e-4)  # minutes are written with four digits
        assert 1e-3 * max(0.0, 1 - latest / 0.1) ** 0.9 <= rate <= 1e-3 * (1 - earliest / 0.1) ** 0.9
        before = minutes


def test_slow_validations_are_spaced_out(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.training import loop

    original = loop.validate

    def slow(*arguments, **options):
        time.sleep(0.6)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "validate", slow)
    run(
        tiny_run.data,
        tmp_path / "run",
        "trainer.max_minutes=0.15",
        "trainer.num_validations=30",
        "trainer.overlay_cases=1",
    )
    validations = [r for r in history(tmp_path / "run") if r["val_dice_mean"]]
    assert 1 <= len(validations) <= 4  # 30 of them would take twice the budget


@pytest.mark.parametrize("model", ["model.padding=valid", "model=fusionnet", "model=monai"])
def test_other_models_go_the_same_way(tiny_run, tmp_path: Path, model: str) -> None:
    more = {
        "model.padding=valid": ["model.deep_supervision=false", "model.down=max_pool", "data.plan.patch_size=null"],
        "model=fusionnet": ["model.widths=[4,8]"],
        "model=monai": ["model.network=SegResNet", "model.arguments={init_filters: 8}", "data.plan.patch_size=null"],
    }[model]
    result = run(tiny_run.data, tmp_path / "run", model, *more, "trainer.max_steps=2")
    assert result.steps == 2 and math.isfinite(float(history(tmp_path / "run")[0]["train_loss"]))


def test_a_patch_that_does_not_fit_is_refused_before_training(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="E_MODEL"):
        run(tiny_run.data, tmp_path / "run", "data.plan.patch_size=[9,16,16]", "trainer.max_steps=1")


@pytest.mark.parametrize("name", ["poly", "cosine"])
def test_schedules(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "warmup": 0.1})
    factors = [schedule(p) for p in np.linspace(0, 1, 101)]
    assert 0 < factors[0] < 0.01 and factors[10] == pytest.approx(1.0) and factors[-1] == pytest.approx(0, abs=1e-9)
    assert all(a <= b for a, b in itertools.pairwise(factors[:11]))
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    middle = {"poly": 0.5**0.9, "cosine": 0.5}[name]
    assert schedule(0.55) == pytest.approx(middle)
