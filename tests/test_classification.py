"""Classification from folders to predictions: what is found, divided and seen, training, predict, evaluate."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from medseg.bundle import BundleInfo, checkpoint_path
from medseg.classification.bundle import is_classifier, load_classifier
from medseg.classification.cases import find_classified, find_images
from medseg.classification.division import divide
from medseg.classification.evaluation import CHOSEN_BEFORE, CROSS_FITTED, thresholds_for
from medseg.classification.images import ImageCase, open_image
from medseg.classification.loop import ClassificationLoop, batch_indices, inverse_shares, parameter_groups
from medseg.classification.predict import known_images, read_predictions
from medseg.classification.preparation import facts_of, survey_images
from medseg.classification.scoring import compare
from medseg.classification.sight import Sight, plan_sight
from medseg.classification.train import ClassificationResult, train
from medseg.cli import main
from medseg.config import compose, resumed
from medseg.data.cases import find_cases, find_inputs
from medseg.data.splits import SplitConfig
from medseg.errors import MedsegError
from medseg.formats import Reading, write_image
from medseg.models.classifiers import CLASSIFIERS
from medseg.volume import Grid, Volume

QUICK = [
    "model.widths=[4,8]",
    "trainer.device=cpu",
    "trainer.max_steps=12",
    "trainer.batch_size=8",
    "trainer.num_validations=2",
    "trainer.log_steps=2",
    "trainer.worst_cases=1",
]
READING = Reading(channels=True)


def disc(path: Path, number: int, *, is_ring: bool, shape: tuple[int, int] = (24, 32)) -> None:
    """A grey picture with a disc or a ring."""
    random = np.random.default_rng(number + 1000 * is_ring)
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(y - random.uniform(9, 15), x - random.uniform(10, 20))
    inside = (radius < 7) & ((radius > 4) | (not is_ring))
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.clip(random.normal(60, 10, shape) + 90 * inside, 0, 255)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders below train, val and test, with a mask that is no image."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 10), ("val", 6), ("test", 4)):
        for name in ("disc", "ring"):
            for number in range(count):
                path = root / split / name / f"{split}_{name} ({number}).png"
                disc(path, number + {"train": 0, "val": 100, "test": 200}[split], is_ring=name == "ring")
    disc(root / "train" / "disc" / "train_disc (0)_mask.png", 0, is_ring=False)
    return root


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassificationResult, str]:
    """A run of a few steps, and what it said."""
    run = tmp_path_factory.mktemp("runs") / "run"
    said = run.parent / "said.txt"
    with said.open("w", encoding="utf-8") as file:
        result = train(compose("classification", [f"data.root={pictures}", *QUICK]), run, Console(file=file, width=120))
    return result, said.read_text(encoding="utf-8")


def test_class_folders_below_splits_are_found_without_masks(pictures: Path) -> None:
    found = find_classified(pictures)
    assert found.classes == ("disc", "ring") and len(found.cases) == 40
    assert Counter(case.split for case in found.cases) == {"train": 20, "val": 12, "test": 8}
    assert "1 masks beside the images (train_disc (0)_mask.png)" in found.left_out[0]
    assert len(find_images([pictures / "test"]).cases) == 8


def test_a_table_names_classes_patients_and_splits(pictures: Path, tmp_path: Path) -> None:
    disc(tmp_path / "images" / "a.png", 0, is_ring=False)
    disc(tmp_path / "images" / "b.png", 1, is_ring=True)
    table = tmp_path / "list.csv"
    table.write_text("Image;Diagnosis;Subject;Split\nimages/a.png;ill;P1;train\nimages/b.png;well;P2;test\n")
    found = find_classified(table)
    assert [(c.case_id, c.class_name, c.patient, c.split) for c in found.cases] == [
        ("a", "ill", "P1", "train"), ("b", "well", "P2", "test")
    ]  # fmt: skip
    assert find_classified(table, ["well", "ill"]).classes == ("well", "ill")
    for text, words in {
        "image,class\nimages/a.png,x\nimages/c.png,y\n": "1 of 2 images are not there",
        "image,split\nimages/a.png,train\n": "lacks the columns image and class",
        "image,class,label\nimages/a.png,x,x\n": "several columns mean the class",
        "image,class,split\nimages/a.png,x,later\nimages/b.png,y,train\n": "unknown split",
        "image,class\nimages/a.png,x\nimages/b.png,x\n": "no number of classes",
        "image,class\nimages/a.png\n": "more or fewer fields",
        f"image,class\nimages/a.png,x\n{'y' * 300}.png,y\n": "1 of 2 images are not there",
    }.items():
        table.write_text(text)
        with pytest.raises(MedsegError, match=words):
            find_classified(table)


def test_paths_that_are_too_long_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / ("y" * 300)
    for call in (
        lambda: find_classified(path),
        lambda: find_images([path]),
        lambda: find_cases(path),
        lambda: find_inputs([path]),
    ):
        with pytest.raises(MedsegError, match="E_MISSING"):
            call()


def test_arrays_as_medmnists(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {f"{s}_images": random.integers(0, 255, (6, 8, 8, 3), dtype=np.uint8) for s in ("train", "val", "test")}
    labels = {f"{s}_labels": (np.arange(6) % 2)[:, None].astype(np.uint8) for s in ("train", "val", "test")}
    np.savez(tmp_path / "set.npz", **arrays, **labels)
    found = find_classified(tmp_path / "set.npz", ["well", "ill"])
    assert found.classes == ("well", "ill") and Counter(c.split for c in found.cases)["val"] == 6
    image = open_image(found.cases[1], READING)
    assert np.array_equal(image.array, np.moveaxis(arrays["test_images"][1], -1, 0).astype(np.float32))
    with pytest.raises(MedsegError, match="no places in the list of classes"):
        find_classified(tmp_path / "set.npz", ["well"])
    np.savez(tmp_path / "multi.npz", train_images=arrays["train_images"], train_labels=np.zeros((6, 14), np.uint8))
    with pytest.raises(MedsegError, match="do not fit each other"):
        find_classified(tmp_path / "multi.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:500])
    with pytest.raises(MedsegError, match="E_TRUNCATED"):
        find_classified(tmp_path / "cut.npz")


def test_folds_keep_patients_and_equal_images_together(tmp_path: Path) -> None:
    for number in range(40):
        disc(tmp_path / ("disc" if number % 2 else "ring") / f"i{number:02d}.png", number, is_ring=number % 2 == 0)
    (tmp_path / "ring" / "copy.png").write_bytes((tmp_path / "ring" / "i38.png").read_bytes())
    cases = find_classified(tmp_path).cases
    facts, bad = survey_images(cases, READING, threads=1)
    assert not bad
    class_of = {case.case_id: case.class_name for case in cases}
    seen: list[str] = []
    for fold in range(5):
        split, remarks = divide(cases, SplitConfig(), 0, fold, facts)
        assert ("copy" in split.val) == ("i38" in split.val)
        assert {class_of[i] for i in split.val} == {"disc", "ring"} and 5 <= len(split.val) <= 12
        assert "1 images occur more than once, on one side" in remarks[0] and "no patient is known" in split.rule
        seen += split.val
    assert sorted(seen) == sorted(class_of)
    named = [replace(case, patient=f"p{n // 4}") for n, case in enumerate(cases)]
    split, _ = divide(named, SplitConfig(), 0, 0, facts)
    patient_of = {case.case_id: case.patient for case in named}
    assert not {patient_of[i] for i in split.train} & {patient_of[i] for i in split.val}


def test_equal_images_on_two_sides_of_a_given_split_are_told(pictures: Path) -> None:
    cases = [*find_classified(pictures).cases]
    facts, _ = survey_images(cases, READING, threads=1)
    twin = next(case for case in cases if case.split == "train")
    cases.append(replace(twin, case_id="twin", split="test", class_name="ring"))
    facts["twin"] = facts[twin.case_id]
    split, remarks = divide(cases, SplitConfig(), 0, 0, facts)
    assert split.rule == "as the data state it" and "twin" in split.test
    assert "on two sides of the given split (test and train" in remarks[0] and "two classes" in remarks[1]


def test_pictures_are_seen_with_their_aspect_kept() -> None:
    array = np.zeros((1, 40, 20), np.float32)
    array[:, 8:32, 4:16] = 200  # a box of twice its width
    sight = Sight((20, 20), 1, "rescale")
    seen = sight.prepare(Volume(array, Grid.of_picture((40, 20))), where="a")[0]
    assert seen.shape == (20, 20) and not seen[:, :5].any() and not seen[:, 15:].any()
    height, width = (seen > 0.4).any(axis=1).sum(), (seen > 0.4).any(axis=0).sum()
    assert height == 2 * width == 12
    colour = np.stack([array[0], 0 * array[0], 0 * array[0]])
    grey = sight._channels(colour, "a")
    assert grey.max() == pytest.approx(0.299 * 200) and len(grey) == 1
    imagenet = Sight((40, 20), 3, "imagenet").prepare(Volume(array, Grid.of_picture((40, 20))), where="a")
    assert imagenet[:, 0, 0] == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    scored = Sight((40, 20), 1, "z-score").prepare(Volume(array, Grid.of_picture((40, 20))), where="a")
    assert scored.mean() == pytest.approx(0, abs=1e-5) and scored.std() == pytest.approx(1, abs=1e-4)
    with pytest.raises(MedsegError, match="E_CHANNELS"):
        sight.prepare(Volume(np.zeros((2, 8, 8), np.float32), Grid.of_picture((8, 8))), where="a")


def test_volumes_are_seen_in_mm() -> None:
    def volume(spacing: float, length: int) -> Volume:
        values = np.zeros((1, length, length, length), np.float32)
        box = slice(length // 4, 3 * length // 4)
        values[0, box, box, box] = 100
        return Volume(values, Grid((length,) * 3, np.diag([spacing, spacing, spacing, 1.0])))

    sight = Sight((16, 16, 16), 1, "rescale", spacing_mm=(4.0, 4.0, 4.0))
    fine, coarse = (sight.prepare(v, where="a")[0] for v in (volume(1.0, 64), volume(2.0, 32)))
    assert fine.shape == (16, 16, 16) and np.abs(fine - coarse).mean() < 0.02
    assert (fine > 0.5).sum() == 8**3  # 32 mm at 4 mm
    wide = Sight((8, 8, 8), 1, "rescale", spacing_mm=(4.0, 4.0, 4.0)).prepare(volume(1.0, 64), where="a")[0]
    assert (wide > 0.5).all()  # cut about the middle
    with pytest.raises(MedsegError, match="E_MODEL.*kind"):
        sight.prepare(Volume(np.zeros((1, 8, 8), np.float32), Grid.of_picture((8, 8))), where="a")


def test_what_is_seen_is_planned_from_the_images(tmp_path: Path) -> None:
    disc(tmp_path / "a.png", 0, is_ring=False, shape=(300, 448))
    facts = facts_of(ImageCase("a", tmp_path / "a.png"), READING)
    plan = {"spacing_mm": None, "channels": "auto", "normalisation": "auto", "expects_imagenet": False}
    seen = plan_sight([facts], size=None, smallest={2: (16, 16)}, **plan)  # type: ignore[arg-type]
    assert (seen.size, seen.num_channels, seen.normalisation) == ((152, 224), 1, "z-score")
    assert seen == Sight(**{**seen.to_json(), "size": tuple(seen.to_json()["size"])})
    pretrained = plan_sight([facts], size=(64, 64), smallest={}, **{**plan, "expects_imagenet": True})  # type: ignore[arg-type]
    assert (pretrained.size, pretrained.normalisation) == ((64, 64), "imagenet")
    ct = plan_sight([replace(facts, modality="CT")], size=None, smallest={}, **plan)  # type: ignore[arg-type]
    assert ct.normalisation == "dataset" and ct.intensity[0][0] < ct.intensity[0][2] < ct.intensity[0][1]
    with pytest.raises(MedsegError, match="the images are 2D"):
        plan_sight([facts], size=(8, 8, 8), smallest={}, **plan)  # type: ignore[arg-type]


def test_batches_show_each_image_once_before_any_again() -> None:
    drawn = torch.cat([batch_indices(10, 4, 7, step) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert torch.equal(batch_indices(10, 4, 7, 3), drawn[12:16])
    assert not torch.equal(drawn[:10], torch.cat([batch_indices(10, 4, 8, step) for step in range(3)])[:10])
    assert inverse_shares(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2])


def test_the_head_has_its_own_rate_and_what_is_frozen_none() -> None:
    settings = {"name": "cnn", "widths": [4, 8], "frozen_stages": 1}
    model = CLASSIFIERS.build(settings, in_channels=1, num_classes=2, spatial_dims=2)
    groups, optimizer = parameter_groups(model, {"name": "adamw", "lr": 0.01}, 0.1, torch.device("cpu"))
    assert [group["lr"] for group in groups] == [pytest.approx(0.001), 0.01] and optimizer["lr"] == 0.01
    trained = {id(p) for group in groups for p in group["params"]}
    (first, second), head = [stage for _, stage in model.stages[:2]], model.stages[-1][1]
    assert not {id(p) for p in first.parameters()} & trained
    assert {id(p) for p in second.parameters()} | {id(p) for p in head.parameters()} == trained


def test_a_run_holds_everything_about_it(trained: tuple[ClassificationResult, str], pictures: Path) -> None:
    result, said = trained
    run = result.run
    assert "as the data state it" in said and "left out   1 masks" in said and "cnn" in said
    assert result.steps == 12 and result.test is not None and len(result.test.cases) == 8
    for name in ("bundle.json", "config.yaml", "split.json", "survey.json", "history.csv", "curves.png",
                 "operating_points.json", "model_card.md", "report.html", "manifest.json",
                 "test/predictions.csv", "test/metrics.json", "validation/roc.csv", "test/confusion.csv"):  # fmt: skip
        assert (run / name).is_file(), name
    assert len(list((run / "test" / "worst").glob("*.png"))) == 1
    for path in run.rglob("*"):
        if path.is_file() and path.name != "places.yaml":
            assert str(pictures).encode() not in path.read_bytes(), f"{path.name} holds a path"
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in ("ROC curves", "Calibration", "Grad-CAM", "Model card", "sensitivity&gt;=0.95", "data:image/jpeg"):
        assert words in page
    card = (run / "model_card.md").read_text(encoding="utf-8")
    assert "Not a medical device" in card and "AUC ring" in card and "train | 10 | 10" in card
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert any(row["val_auc"] for row in rows) and any(row["train_loss"] for row in rows)
    thresholds = json.loads((run / "operating_points.json").read_text())["thresholds"]["ring"]
    used = {row.point: row.threshold for row in result.test.decisions if row.point != "most probable"}
    assert used == thresholds


def test_predict_and_evaluate_are_what_the_run_says(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, test = trained[0].run, trained[0].test
    assert test is not None
    main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "out"), "--device", "cpu"])
    rows = {row["case"]: row for row in csv.DictReader((tmp_path / "out" / "predictions.csv").open())}
    for case, shares in zip(test.cases, test.probabilities, strict=True):
        assert float(rows[case]["probability_ring"]) == pytest.approx(shares[1], abs=2e-3)
    main(["evaluate", str(tmp_path / "out"), str(pictures / "test"), "-o", str(tmp_path / "scores"), "--report"])
    found = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    stated = json.loads((run / "test" / "metrics.json").read_text())
    assert found["auc"]["ring"]["value"] == pytest.approx(stated["auc"]["ring"]["value"], abs=0.07)
    assert found["thresholds"].startswith("chosen on other images") and (tmp_path / "scores" / "report.html").is_file()
    assert "sensitivity" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "out")])
    assert "predictions in this folder already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "more"), "--preview"])
    assert "does not take --preview" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "out"), str(pictures / "test"), "--instances"])
    assert "classification does not take --instances" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "out"), str(pictures / "val")])
    assert "12 of 12 references have no prediction" in capsys.readouterr().err


def test_bad_images_end_prediction_or_are_left_out(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next((pictures / "test" / "disc").glob("*.png"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(good.read_bytes())
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:60])
    command = ["predict", str(trained[0].run), str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        main([*command, "--on-bad-case", "skip"])
    assert ended.value.code == 3 and "left out   cut: E_TRUNCATED" in capsys.readouterr().out
    description = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert description["left_out"]["cut"]["code"] == "E_TRUNCATED" and description["task"] == "classification"


def test_a_run_goes_on_as_if_it_had_never_stopped(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary, run = ClassificationLoop.vary, tmp_path / "run"

    def until(loop: ClassificationLoop, image: Tensor, target: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if step == 8:  # two after the validation that saved
            raise ConnectionAbortedError
        return vary(loop, image, target, step)

    with monkeypatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(ClassificationLoop, "vary", until)
        train(compose("classification", [f"data.root={pictures}", *QUICK]), run, Console(quiet=True))
    again = train(resumed(run, []), run, Console(quiet=True))
    assert again.steps == 12
    for checkpoint in ("latest", "best"):
        ours = load_classifier(run, checkpoint=checkpoint).model.state_dict()
        theirs = load_classifier(trained[0].run, checkpoint=checkpoint).model.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    disc(tmp_path / "elsewhere.png", 77, is_ring=True)
    moved = next((pictures / "train" / "ring").glob("*.png"))
    before = moved.read_bytes()
    try:
        moved.write_bytes((tmp_path / "elsewhere.png").read_bytes())
        with pytest.raises(MedsegError, match="1 of the run's 40 images are not there any more, or have changed"):
            train(resumed(run, []), run, Console(quiet=True))
    finally:
        moved.write_bytes(before)


def test_a_run_that_ended_before_its_first_checkpoint_begins_with_its_weights_again(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begins = [f"model.weights={trained[0].run}", "model.frozen_stages=2", "trainer.max_steps=2", "trainer.report=false"]
    train(compose("classification", [f"data.root={pictures}", *QUICK, *begins]), run, Console(quiet=True))
    for path in checkpoint_path(run, "best").parent.glob("*.safetensors"):
        path.unlink()
    train(resumed(run, []), run, Console(quiet=True))
    given = load_classifier(trained[0].run).model.state_dict()
    found = load_classifier(run).model.state_dict()
    frozen = [name for name in given if name.startswith("backbone.")]
    assert frozen and all(torch.equal(found[name], given[name]) for name in frozen)


def test_no_threshold_is_scored_on_the_images_that_it_was_chosen_on(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[0].run
    disc(tmp_path / "new" / "disc" / "new (0).png", 501, is_ring=False)
    disc(tmp_path / "new" / "ring" / "new (1).png", 502, is_ring=True)
    renamed = tmp_path / "renamed" / "ring" / "other name.png"  # a validation image by another name
    renamed.parent.mkdir(parents=True)
    shutil.copy(next((pictures / "val" / "ring").glob("*.png")), renamed)
    shutil.copytree(tmp_path / "new" / "disc", tmp_path / "renamed" / "disc")
    for data, sides, is_other, words in (
        (pictures / "val", {"val"}, False, "12 of 12 images validated the training"),
        (pictures / "train", {"train"}, True, "20 of 20 images trained the network"),
        (pictures / "test", {"test"}, True, ""),
        (tmp_path / "new", {"new"}, True, ""),
        (tmp_path / "renamed", {"new", "val"}, False, "1 of 2 images validated the training"),
    ):
        out = tmp_path / "out" / data.name
        main(["predict", str(run), str(data), "-o", str(out), "--device", "cpu"])
        description = json.loads((out / "predictions.json").read_text())
        assert set(description["sides"].values()) == sides
        evaluation = compare(read_predictions(out), find_classified(data).cases, skip_missing=False, console=Console())
        assert (evaluation.thresholds is not None) is is_other
        assert evaluation.how_chosen == (CHOSEN_BEFORE if is_other else CROSS_FITTED)
        assert words in " ".join(evaluation.remarks) and bool(evaluation.remarks) is bool(words)
        assert evaluation.to_json()["remarks"] == list(evaluation.remarks)
    out, data = tmp_path / "out" / "test", pictures / "test"
    description = json.loads((out / "predictions.json").read_text())
    (out / "predictions.json").write_text(json.dumps({**description, "sides": None}))
    capsys.readouterr()
    main(["evaluate", str(out), str(data)])
    said = capsys.readouterr().out
    assert "is not known" in said and "tenth" in said


def test_an_image_on_two_sides_is_known_as_the_one_that_thresholds_were_chosen_on(
    trained: tuple[ClassificationResult, str], tmp_path: Path
) -> None:
    for name in ("split.json", "survey.json"):
        shutil.copy(trained[0].run / name, tmp_path / name)
    split, survey = (json.loads((tmp_path / name).read_text()) for name in ("split.json", "survey.json"))
    digest = {row["case_id"]: row["sha256"] for row in survey["cases"]}
    assert {known_images(tmp_path)[digest[i]] for i in split["test"]} == {"test"}  # type: ignore[index]
    for row in survey["cases"]:
        if row["case_id"] == split["test"][0]:
            row["sha256"] = digest[split["val"][0]]
    (tmp_path / "survey.json").write_text(json.dumps(survey))
    assert known_images(tmp_path)[digest[split["val"][0]]] == "val"  # type: ignore[index]
    assert thresholds_for(["a", "b"], {"ring": {"youden": 0.5}}, {"a": "test", "b": "val"})[0] is None
    (tmp_path / "survey.json").unlink()
    assert known_images(tmp_path) is None


def test_test_images_that_also_validate_are_not_scored_with_the_thresholds_of_the_run(tmp_path: Path) -> None:
    for number, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        for name in ("disc", "ring"):
            disc(tmp_path / "data" / split / name / f"{name}{number}.png", number, is_ring=name == "ring")
    shutil.copy(tmp_path / "data" / "val" / "disc" / "disc2.png", tmp_path / "data" / "test" / "disc" / "twin.png")
    quick = [*QUICK, "trainer.max_steps=1", "trainer.num_validations=1"]
    result = train(compose("classification", [f"data.root={tmp_path / 'data'}", *quick]), tmp_path / "run",
                   Console(quiet=True))  # fmt: skip
    assert result.test is not None and result.test.how_chosen == CROSS_FITTED
    assert "1 of 5 images validated the training" in result.test.remarks[0]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "1 of 5 images validated the training" in page and "No choice was made on them" not in page


@pytest.mark.parametrize(
    "options",
    [["--step", "0.5"], ["--no-skip"], ["--compile", "off"], ["--no-postprocess"], ["--query", "Modality=CT"]],
)
def test_options_of_segmentation_are_refused(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        main(["predict", str(trained[0].run), str(pictures / "test"), "-o", str(tmp_path / "out"), *options])
    said = capsys.readouterr().err
    assert "classification does not take" in said and options[0] in said and not (tmp_path / "out").exists()


def test_prediction_lists_the_masks_that_it_leaves_out(
    trained: tuple[ClassificationResult, str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures / "train" / "disc"
    main(["predict", str(trained[0].run), str(folder), "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert "left out   1 masks beside the images (train_disc (0)_mask.png)" in capsys.readouterr().out


def test_other_verbs_say_what_such_a_run_is(
    trained: tuple[ClassificationResult, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_classifier(trained[0].run) and not is_classifier(tmp_path)
    with pytest.raises(MedsegError, match="classifies whole images"):
        BundleInfo.read(trained[0].run)
    with pytest.raises(SystemExit):
        main(["export", str(trained[0].run), "-o", str(tmp_path / "model.zip")])
    assert "classifies whole images" in capsys.readouterr().err
    main(["verify", str(trained[0].run)])
    assert " ok" in capsys.readouterr().out


def test_volumes_are_classified(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    grid = Grid((12, 14, 10), np.diag([2.0, 2.0, 3.0, 1.0]))
    for number in range(12):
        values = random.normal(0, 1, (1, *grid.shape)).astype(np.float32)
        name = "bright" if number % 2 else "dark"
        values[:, 4:8, 4:8, 3:7] += 6 if name == "bright" else -6
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "data" / name / f"v{number:02d}.nii.gz", Volume(values, grid))
    overrides = [f"data.root={tmp_path / 'data'}", *QUICK, "trainer.max_steps=4", "data.split.num_folds=3"]
    result = train(compose("classification", overrides), tmp_path / "run", Console(quiet=True))
    sight = load_classifier(result.run).info.sight
    assert sight.spacing_mm == (3.0, 2.0, 2.0) and sight.size == (8, 16, 12)  # slices first
    assert len(result.validation.cases) == 4 and result.test is None
    assert (result.run / "report.html").is_file()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["trainer.devices=2"], "one process"),
        (["trainer.operating_points=[best]"], "not understood"),
        (["trainer.label_smoothing=1"], "between 0 and 1"),
        (["data.positive=tumour"], "one of two classes"),
        (["data.classes=[disc, tumour]"], "classes that no image has"),
        (["data.size=[2, 2]"], "no images as small"),
        (["data.root=null"], "no data were named"),
        (["model=resnet18", "model.weights=nowhere.pth", "data.size=[32, 32]"], "no such file of weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pictures: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(MedsegError, match=words):
        train(
            compose("classification", [f"data.root={pictures}", *QUICK[1:], *overrides]),
            tmp_path / "run",
            Console(quiet=True),
        )


def test_real_images(real_data: Path) -> None:
    found = find_classified(real_data / "classification" / "busi")
    assert found.classes == ("benign", "malignant", "normal") and len(found.cases) == 150
    arrays = find_classified(real_data / "classification" / "pneumonia" / "pneumoniamnist.npz", ["normal", "pneumonia"])
    assert Counter(case.split for case in arrays.cases) == {"train": 3882, "val": 524, "test": 624}


def test_a_folder_of_slices_is_one_case(real_data: Path, tmp_path: Path) -> None:
    series = sorted(path for path in (real_data / "dicom" / "series" / "hippocrop_dicom").rglob("*") if path.is_dir())
    slices = [path for path in series if any(file.is_file() for file in path.iterdir())][:2]
    for name, folder in zip(("a", "b"), slices, strict=True):
        shutil.copytree(folder, tmp_path / name / f"scan_{name}")
    found = find_classified(tmp_path)
    assert [(case.case_id, case.class_name) for case in found.cases] == [("scan_a", "a"), ("scan_b", "b")]
    facts, bad = survey_images(found.cases, READING, threads=1)
    assert not bad and all(len(one.shape) == 3 and one.modality == "MR" for one in facts.values())
    assert [case.case_id for case in find_images([tmp_path / "a" / "scan_a"]).cases] == ["scan_a"]


def test_a_few_images_can_be_learnt_by_heart(pictures: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={pictures}", *QUICK, "trainer.overfit_cases=2", "trainer.max_steps=2", "augment=none"]
    result = train(compose("classification", overrides), tmp_path / "run", Console(quiet=True))
    assert len(result.validation.cases) == 4 and result.test is None
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["train"] == split["val"] and split["rule"].startswith("overfitting")
