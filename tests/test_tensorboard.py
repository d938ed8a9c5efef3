"""What TensorBoard gets besides curves, read back from the files that it reads."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyRun
from PIL import Image
from rich.console import Console

from medseg.bundle import BundleInfo, load_bundle
from medseg.config import resumed
from medseg.data.prepared import PreparedCase
from medseg.errors import MedsegError
from medseg.explain.maps import feature_maps
from medseg.training import pictures
from medseg.training.journal import TENSORBOARD_FOLDER, Journal
from medseg.training.pictures import Pictures, conclude_board, hyperparameters, patch_of, spread
from medseg.volume import Grid


def events_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / TENSORBOARD_FOLDER), size_guidance={"images": 0}).Reload()


def a_case(case_id: str = "one", shape: tuple[int, ...] = (20, 30, 30), seed: int = 0) -> PreparedCase:
    """A case with a small structure 1 and a larger structure 2."""
    image = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32))
    label = torch.zeros(shape, dtype=torch.uint8)
    label[2:4, 2:4, 2:4], label[12:18, 20:26, 5:11] = 1, 2
    locations = [label.eq(i).nonzero().to(torch.int32).numpy() for i in range(6)]
    return PreparedCase(case_id, image, label, Grid(shape, np.eye(4)), [locations[0][:0], *locations[1:]])


@pytest.fixture
def looking(tiny_run: TinyRun) -> SimpleNamespace:
    """The network of the tiny run, what it is, and how it was trained."""
    bundle, experiment = load_bundle(tiny_run.run), resumed(tiny_run.run, [])
    return SimpleNamespace(model=bundle.model, info=bundle.info, experiment=experiment)


def drawn(looking: SimpleNamespace, run: Path, **trainer: object):
    """The events of one validation of two cases."""
    config = dataclasses.replace(looking.experiment.trainer, overlay_cases=0, **trainer)
    cases = [a_case("one"), a_case("two", seed=1)]
    drawing = Pictures(config, looking.info, cases, cases, torch.device("cpu"), "fp32")
    with Journal(run, Console(file=io.StringIO()), []) as journal:
        for step in (3, 6):
            drawing.draw(journal, looking.model, {}, step)
    return events_of(run)


def test_a_run_has_filters_maps_and_its_row_of_the_sweep(tiny_run: TinyRun) -> None:
    events = events_of(tiny_run.run)
    images = events.Tags()["images"]
    assert sorted(tag.partition("/")[0] for tag in images) == ["filters", "maps", "maps", "maps", "maps", "validation"]
    (case,) = {tag.split("/")[1] for tag in images if tag.startswith("maps/")}
    assert {tag.split("/")[2] for tag in images if tag.startswith("maps/")} == {
        "image", "encoder.0", "encoder.2", "decoder.1"
    }  # fmt: skip
    assert len(events.Images("filters/encoder.0.block.0.0.convolution")) == 2  # validations
    assert len(events.Images(f"maps/{case}/encoder.2")) == 2 and len(events.Images(f"maps/{case}/image")) == 1
    assert events.Tags()["histograms"] == []
    for voxels in (1, 4):  # and the divisor
        shares = [scalar.value for scalar in events.Scalars(f"equivariance/moved by {voxels}")]
        assert len(shares) == 2 and all(0 < share <= 1 for share in shares)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    written = content.session_start_info.hparams
    assert written["model.name"].string_value == "unet" and written["trainer.max_steps"].number_value == 10
    assert not any(str(tiny_run.data) in value.string_value for value in written.values())
    with (tiny_run.run / "validation" / "metrics.csv").open(newline="") as file:
        rows = [(row["case"], float(row["dice"])) for row in csv.DictReader(file) if row["dice"]]
    means = [np.mean([dice for case, dice in rows if case == name]) for name in {case for case, _ in rows}]
    assert events.Scalars("Final/Dice")[0].value == pytest.approx(np.mean(means), abs=1e-4)


def test_the_projector_holds_every_case_once(tiny_run: TinyRun) -> None:
    folder = tiny_run.run / TENSORBOARD_FOLDER
    lines = (folder / "00000" / "bottleneck" / "metadata.tsv").read_text().splitlines()
    assert lines[0] == "case\tside\tDice"
    rows = [line.split("\t") for line in lines[1:]]
    assert len({row[0] for row in rows}) == 4 and [row[1] for row in rows] == ["validation"] * 2 + ["training"] * 2
    assert all(row[2] for row in rows[:2]) and not any(row[2] for row in rows[2:])
    vectors = np.loadtxt(folder / "00000" / "bottleneck" / "tensors.tsv")
    assert vectors.shape == (4, BundleInfo.read(tiny_run.run).model["widths"][-1]) and np.isfinite(vectors).all()
    with Image.open(folder / "00000" / "bottleneck" / "sprite.png") as sprite:
        assert sprite.size == (2 * pictures.THUMBNAIL,) * 2
    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 1 and str(tiny_run.run.parent) not in config


def test_maps_are_of_the_patch_around_the_largest_structure(looking: SimpleNamespace, tmp_path: Path) -> None:
    patch = patch_of(a_case(), (8, 16, 16))
    image, label = a_case().cut((11, 12, 0), (8, 16, 16))
    assert torch.equal(patch.image, image) and (label == 2).sum() == 6**3
    assert patch.share == pytest.approx((15 - 11 + 0.5) / 8)
    nothing = PreparedCase("x", image, label, Grid((8, 16, 16), np.eye(4)), [np.zeros((0, 3), np.int32)] * 3)
    assert patch_of(nothing, (4, 8, 8)).image.shape == (1, 4, 8, 8)
    events = drawn(looking, tmp_path, map_cases=1)
    (record,) = [e for e in events.Images("maps/one/encoder.2") if e.step == 6]
    maps = feature_maps(looking.model, patch_of(a_case(), looking.info.plan.patch_size).image, ["encoder.2"])
    assert min(record.width, record.height) > 1 and len(maps["encoder.2"]) == 16


def test_histograms_only_where_asked(looking: SimpleNamespace, tmp_path: Path) -> None:
    events = drawn(looking, tmp_path, map_cases=0, histograms=True)
    names = {f"weights/{name}" for name, _ in looking.model.named_parameters()}
    assert set(events.Tags()["histograms"]) == names and events.Tags()["images"] == []
    name, weight = next(looking.model.named_parameters())
    value = events.Histograms(f"weights/{name}")[0].histogram_value
    assert value.num == weight.numel() and value.max == pytest.approx(float(weight.detach().max()))


def test_drawing_changes_nothing(looking: SimpleNamespace, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in looking.model.state_dict().items()}
    looking.model.train()
    torch.manual_seed(3)
    drawn(looking, tmp_path, map_cases=2)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after) and looking.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in looking.model.state_dict().items())


def test_a_network_that_cannot_be_followed_ends_no_run(
    looking: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(pictures, "map_places", refuse)
    events = drawn(looking, tmp_path, map_cases=1)
    assert events.Tags()["images"] == []
    said = io.StringIO()
    trainer = dataclasses.replace(looking.experiment.trainer, embedding_cases=5)
    experiment = dataclasses.replace(looking.experiment, trainer=trainer)
    drawing = Pictures(trainer, looking.info, [], [a_case()], torch.device("cpu"), "fp32")
    monkeypatch.setattr(pictures, "load_bundle", lambda *_, **__: looking)
    conclude_board(tmp_path, experiment, looking.info, drawing, None, best_dice=0.5, console=Console(file=said))
    assert "no projector for TensorBoard: not on this device" in said.getvalue()
    assert events_of(tmp_path).Scalars("Final/best validation Dice")[0].value == 0.5


def test_time_bounds_the_projector(looking: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [a_case(str(i), seed=i) for i in range(6)]
    drawing = Pictures(looking.experiment.trainer, looking.info, cases[:5], cases[5:], torch.device("cpu"), "fp32")
    monkeypatch.setattr(pictures, "load_bundle", lambda *_, **__: looking)

    def rows(number: int) -> list[str]:
        trainer = dataclasses.replace(looking.experiment.trainer, embedding_cases=number)
        experiment = dataclasses.replace(looking.experiment, trainer=trainer)
        conclude_board(tmp_path, experiment, looking.info, drawing, None, best_dice=math.nan, console=Console())
        found = list((tmp_path / TENSORBOARD_FOLDER).glob("*/bottleneck/metadata.tsv"))
        return [line.split("\t")[0] for line in found[0].read_text().splitlines()[1:]] if found else []

    assert rows(0) == []
    assert rows(3) == ["5", "0", "2"]  # validation first, then spread over those that train
    assert rows(100) == ["5", "0", "1", "2", "3", "4"]
    monkeypatch.setattr(pictures, "EMBEDDING_SECONDS", -1.0)
    shutil.rmtree(tmp_path / TENSORBOARD_FOLDER)
    assert rows(100) == []


def test_hyperparameters_are_plain_and_hold_no_place(looking: SimpleNamespace) -> None:
    optimizer = {**looking.experiment.optimizer, "lr": 0.003, "betas": None}
    found = hyperparameters(dataclasses.replace(looking.experiment, optimizer=optimizer), looking.info)
    assert found["optimizer.lr"] == 0.003 and found["optimizer.betas"] == "none"
    assert found["plan.patch_size"] == "16×24×24" and found["trainer.initial"] == "none"
    assert all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in found.values())


def test_cases_are_spread() -> None:
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(2), 5) == [0, 1] and spread(range(4), 0) == []


@pytest.mark.parametrize("key", ["overlay_cases", "map_cases", "embedding_cases"])
def test_negative_numbers_are_refused(looking: SimpleNamespace, key: str) -> None:
    with pytest.raises(MedsegError, match=f"trainer.{key}"):
        dataclasses.replace(looking.experiment.trainer, **{key: -1})
