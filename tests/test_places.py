"""Where a run's data lie is written for its owner alone: paths may hold patients' names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from medseg.config import compose, resumed
from medseg.errors import MedsegError
from medseg.models import MODELS
from medseg.models.classifiers import CLASSIFIERS
from medseg.training.experiment import CONFIG_FILE, PLACES_FILE, Experiment, without_places, write_config

SECRET = "/clinic/zqCanaryXj"
OVERRIDES = [
    f"data.root={SECRET}",
    f"data.manifest={SECRET}/m.csv",
    f"data.store={SECRET}/store",
    f"trainer.initial={SECRET}/run",
    f"plan={SECRET}/plan",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_config(compose("train", OVERRIDES), tmp_path)
    (tmp_path / "bundle.json").write_text("{}")
    return tmp_path


def test_the_configuration_can_be_handed_on(run: Path) -> None:
    assert SECRET not in (run / CONFIG_FILE).read_text()
    values = yaml.safe_load((run / CONFIG_FILE).read_text())
    assert values["data"]["root"] is None and values["data"]["on_bad_case"] == "error"
    places = yaml.safe_load((run / PLACES_FILE).read_text())
    assert set(places) == {"data.root", "data.manifest", "data.store", "trainer.initial", "plan"}
    assert (run / PLACES_FILE).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in run.iterdir()) == sorted(["bundle.json", CONFIG_FILE, PLACES_FILE])


def test_a_run_goes_on_with_its_places(run: Path) -> None:
    experiment = resumed(run, [])
    assert experiment == dataclasses.replace(compose("train", OVERRIDES), resume=str(run))
    with pytest.raises(MedsegError, match="keeps its configuration"):
        resumed(run, ["data.root=elsewhere"])


def test_a_run_that_came_without_its_places_is_told_where_its_data_are(run: Path) -> None:
    (run / PLACES_FILE).unlink()
    assert resumed(run, []).data.root is None
    assert resumed(run, ["data.root=/elsewhere"]).data.root == "/elsewhere"
    with pytest.raises(MedsegError, match="keeps its configuration"):
        resumed(run, ["data.labels={a: 1}"])


def test_every_key_that_takes_a_path_is_a_place() -> None:
    """A new one must be added: the words of its description tell."""
    found = {
        (*above, field.name)
        for above, cls in (((), Experiment), (("data",), "DataConfig"), (("trainer",), "SegmentationTrainerConfig"))
        for field in dataclasses.fields(cls if isinstance(cls, type) else _class(cls))
        if field.name in ("root", "manifest", "store", "initial", "plan", "resume", "file", "folder", "path")
        and str(field.type).startswith("str")
    }
    found |= {
        ("model", field.name)
        for registry in (MODELS, CLASSIFIERS)
        for name in registry.names()
        for field in dataclasses.fields(registry.part(name).config)
        if field.name in ("weights", "classifier") and str(field.type).startswith("str")
    }
    assert found | {("data", "split", "file")} == set(Experiment.places)


def _class(name: str) -> type:
    from medseg.training import experiment

    cls: type = getattr(experiment, name)
    return cls


def test_an_automatic_store_is_no_place() -> None:
    values, places = without_places(compose("train", ["data.root=/a"]))
    assert values["data"]["store"] == "auto" and places == {"data.root": "/a"}


@pytest.mark.parametrize("text", ["[1, 2]", "a: &a [*a]", "data.root: [", "data.root: {a: 1}", "", "\x00"])
def test_damaged_places_are_refused(run: Path, text: str) -> None:
    (run / PLACES_FILE).write_text(text)
    try:
        resumed(run, [])
    except MedsegError as error:
        assert error.code == "E_CONFIG"
    else:
        assert text == ""


def test_words_that_stand_where_paths_may_are_none(tmp_path: Path) -> None:
    stated = compose("train", ["data.root=x", "model=unet_resnet", "model.weights=imagenet"])
    assert stated.model["weights"] == "imagenet"
    values, places = without_places(stated)
    assert values["model"]["weights"] == "imagenet" and "model.weights" not in places
    stated = compose("train", ["data.root=x", "model=unet_resnet", f"model.weights={SECRET}/w.pth"])
    write_config(stated, tmp_path)
    (tmp_path / "bundle.json").write_text("{}")
    assert SECRET not in (tmp_path / CONFIG_FILE).read_text()
    assert resumed(tmp_path, []).model["weights"] == f"{SECRET}/w.pth"
    table = compose("train", ["data.root=x", "model=fcn", "model.classifier={name: cnn}"])
    assert without_places(table)[0]["model"]["classifier"] == {"name": "cnn"}
