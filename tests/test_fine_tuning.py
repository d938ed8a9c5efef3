"""Fine-tuning: another run's weights, network and plan are taken over, and what cannot be is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from test_training import weights

from medseg.bundle import MODEL_PREFIX, BundleInfo, checkpoint_path, read_checkpoint
from medseg.config import compose
from medseg.errors import MedsegError
from medseg.training.initial import REASON, begun_by, load_initial
from medseg.training.train import TrainResult, train

QUICK = ("trainer.device=cpu", "trainer.num_validations=1", "trainer.final_predictions=false", "trainer.max_steps=1")


def fine_tune(data: Path, initial: Path, folder: Path, *overrides: str) -> TrainResult:
    same_split = "data.split.num_folds=2"  # as the run that it begins with: its validation cases are not seen
    settings = [f"data.root='{data}'", f"trainer.initial='{initial}'", same_split, *QUICK, *overrides]
    experiment = compose("train", settings)
    with (folder.parent / f"{folder.name}.txt").open("w") as log:
        return train(experiment, folder, Console(file=log, width=500))


def test_a_run_begins_where_another_ended(tiny_run, tmp_path: Path) -> None:
    fine_tune(tiny_run.data, tiny_run.run, tmp_path / "run", "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    before, after = weights(tiny_run.run, "best"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    log = (tmp_path / "run.txt").read_text()
    assert f"initial    {len(before)} of {len(before)} tensors taken from" in log and "fresh" not in log
    old, new = BundleInfo.read(tiny_run.run), BundleInfo.read(tmp_path / "run")
    assert new.model == old.model
    for name in ("spacing_mm", "patch_size", "batch_size", "normalisation", "intensity", "orientation", "widths"):
        assert getattr(new.plan, name) == getattr(old.plan, name), name
        assert new.plan.reasons[name] == REASON, name
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").rglob("*") if path.is_file())
    assert str(tiny_run.run).encode() not in events


def test_cases_that_trained_the_other_run_do_not_validate(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_LEAK.*2 cases.*data.split.file=.*split.json"):
        fine_tune(tiny_run.data, tiny_run.run, tmp_path / "run", "fold=1")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run.data, copy)
    fine_tune(copy, tiny_run.run, tmp_path / "elsewhere", "fold=1")
    assert "2 ids that validate or test trained that run" in (tmp_path / "elsewhere.txt").read_text()


def test_a_key_wins_over_what_is_taken_over(tiny_run, tmp_path: Path) -> None:
    fine_tune(
        tiny_run.data, tiny_run.run, tmp_path / "run", "data.plan.patch_size=[24,24,24]", "data.plan.batch_size=1"
    )
    plan = yaml.safe_load((tmp_path / "run" / "plan.yaml").read_text())
    assert plan["patch_size"] == [24, 24, 24] and plan["batch_size"] == 1
    assert tuple(plan["spacing_mm"]) == BundleInfo.read(tiny_run.run).plan.spacing_mm


def test_a_head_for_other_classes_begins_anew(tiny_run, tmp_path: Path) -> None:
    names = json.loads((tiny_run.data / "dataset.json").read_text())["labels"]
    values = sorted(int(value) for value in names.values() if int(value))
    classes = f"data.labels={{background: 0, organ: {values}}}"
    fine_tune(tiny_run.data, tiny_run.run, tmp_path / "run", classes, "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    before, after = weights(tiny_run.run, "best"), weights(tmp_path / "run")
    heads = [name for name in after if before[name].shape != after[name].shape]
    assert heads and all("heads" in name for name in heads) and all(after[name].shape[0] == 2 for name in heads)
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before if k not in heads)
    log = (tmp_path / "run.txt").read_text()
    assert f"fresh, for 2 instead of {len(names)} classes: " in log
    assert all(name.removeprefix("model.") in log for name in heads[:2])


def test_filters_are_spread_over_other_channels(tiny_run) -> None:
    old = BundleInfo.read(tiny_run.run)
    plan = dataclasses.replace(
        old.plan, num_channels=2, normalisation=old.plan.normalisation * 2, intensity=old.plan.intensity * 2
    )
    info = dataclasses.replace(old, plan=plan)
    model, before = info.build_model().eval(), old.build_model().eval()
    lines = load_initial(model, info, tiny_run.run)
    assert any("spread over 2 instead of 1 channel(s)" in line for line in lines)
    tensors, _ = read_checkpoint(checkpoint_path(tiny_run.run, "best"))
    before.load_state_dict({k.removeprefix(MODEL_PREFIX): v for k, v in tensors.items() if k.startswith(MODEL_PREFIX)})
    x = torch.randn(1, 1, *old.plan.patch_size)
    assert torch.allclose(model(x.expand(-1, 2, -1, -1, -1)), before(x), atol=1e-4)


def test_another_network_is_refused(tiny_run, tmp_path: Path) -> None:
    old = BundleInfo.read(tiny_run.run)
    info = dataclasses.replace(old, model={**old.model, "widths": [4, 8, 12]})
    with pytest.raises(MedsegError, match=r"(?s)E_MODEL.*do not fit.*only its classes and channels.*encoder"):
        load_initial(info.build_model(), info, tiny_run.run)
    with pytest.raises(MedsegError, match="E_RUN"):
        fine_tune(tiny_run.data, tmp_path, tmp_path / "run")


@pytest.mark.parametrize("stated", ["model=fusionnet", "preset=M", "model.normalisation=batch", "model.widths=[4,8]"])
def test_another_network_is_not_stated_in_vain(tiny_run, tmp_path: Path, stated: str) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*that of the run that training starts from.*model"):
        fine_tune(tiny_run.data, tiny_run.run, tmp_path / "run", stated)


def test_the_same_network_may_be_stated(tiny_run) -> None:
    widths = list(BundleInfo.read(tiny_run.run).model["widths"])
    settings = (f"data.root='{tiny_run.data}'", f"trainer.initial='{tiny_run.run}'", f"model.widths={widths}")
    experiment, _ = begun_by(compose("train", settings), spatial_dims=3, num_channels=1)
    assert list(experiment.model["widths"]) == widths


def test_pictures_do_not_start_from_volumes(tiny_run) -> None:
    experiment = compose("train", [f"data.root='{tiny_run.data}'", f"trainer.initial='{tiny_run.run}'"])
    with pytest.raises(MedsegError, match=r"(?s)E_MODEL.*number of dimensions.*2D.*3D"):
        begun_by(experiment, spatial_dims=2, num_channels=1)


def test_other_channels_have_the_normalisation_that_is_planned_anew(tiny_run) -> None:
    experiment = compose("train", [f"data.root='{tiny_run.data}'", f"trainer.initial='{tiny_run.run}'"])
    same, _ = begun_by(experiment, spatial_dims=3, num_channels=1)
    other, _ = begun_by(experiment, spatial_dims=3, num_channels=2)
    assert same.data.plan.normalisation == ("ct",) and other.data.plan.normalisation is None
    assert other.data.plan.spacing_mm == same.data.plan.spacing_mm is not None
