"""Several folds: ordinary runs with one plan and one preparation, going on, and the cross-validation over them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from medseg.bundle import BundleInfo, checkpoint_path, load_bundle
from medseg.config import compose, resumed
from medseg.data.splits import read_split
from medseg.errors import MedsegError
from medseg.formats import open_label, write_image, write_label
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.reports.crossvalidation import CrossValidation, print_crossvalidation, read_evaluation
from medseg.reports.evaluation import Evaluation, Row, evaluate_pair
from medseg.training import beginning
from medseg.training.folds import read_folds
from medseg.training.loop import Loop
from medseg.training.train import TrainResult, train
from medseg.volume import Grid, Volume

TINY = (
    "data.split.num_folds=3",
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,16,16]",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.max_steps=2",
    "trainer.num_validations=1",
    "trainer.log_steps=1",
    "trainer.overlay_cases=1",
)


@dataclass(frozen=True)
class FoldedRun:
    run: Path
    data: Path
    result: TrainResult
    said: str


def write_data(root: Path, num_cases: int = 6, rare: tuple[int, ...] = ()) -> Path:
    """Small volumes with a block of class 1, in some a block of class 2, of slightly different spacings."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for n in range(num_cases):
        grid = Grid((12, 20, 20), np.diag([-2.0 - 0.1 * n, -1.0, 1.0, 1.0]))
        label = np.zeros(grid.shape, dtype=np.uint8)
        label[2:8, 4:12, 5 : 8 + n] = 1
        if n in rare:
            label[9:11, 14:18, 14:18] = 2
        image = np.random.default_rng(n).normal(size=(1, *grid.shape)) + 3 * label
        write_image(root / "images" / f"c{n}.nii.gz", Volume(image.astype(np.float32), grid))
        write_label(root / "labels" / f"c{n}.nii.gz", Volume(label, grid))
    return root


def run(data: Path, folder: Path, *overrides: str) -> tuple[TrainResult, str]:
    experiment = compose("train", [f"data.root='{data}'", *TINY, *overrides])
    log = folder.parent / f"{folder.name}.txt"
    with log.open("w") as file:
        result = train(experiment, folder, Console(file=file, width=120))
    return result, log.read_text()


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> FoldedRun:
    folder = tmp_path_factory.mktemp("folds")
    data = write_data(folder / "data", rare=(0, 3))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = beginning.survey
        patch.setattr(beginning, "survey", lambda *a, **k: calls.append(1) or original(*a, **k))
        result, said = run(data, folder / "run", "folds=all")
    assert len(calls) == 1  # read once for all folds
    return FoldedRun(folder / "run", data, result, said)


def test_each_fold_is_an_ordinary_run(folded: FoldedRun) -> None:
    members = read_folds(folded.run)["members"]
    assert members == ["fold_0", "fold_1", "fold_2"]
    validated: list[str] = []
    for number, name in enumerate(members):
        folder = folded.run / name
        files = {"bundle.json", "checkpoints", "config.yaml", "split.json", "plan.yaml", "survey.json", "history.csv"}
        assert files | {"validation", "model_card.md"} <= {p.name for p in folder.iterdir()}
        split = read_split(folder / "split.json")
        assert sorted(split.train + split.val) == [f"c{n}" for n in range(6)] and f"fold {number} of 3" in split.rule
        validated += split.val
        load_bundle(folder)
        again = resumed(folder, [])
        assert (again.fold, again.folds, again.data.root) == (number, None, str(folded.data))
    assert sorted(validated) == [f"c{n}" for n in range(6)]
    splits = json.loads((folded.run / "splits_final.json").read_text())
    assert [row["val"] for row in splits] == [list(read_split(folded.run / m / "split.json").val) for m in members]


def test_one_plan_of_all_cases_and_it_says_so(folded: FoldedRun) -> None:
    plans = [BundleInfo.read(folded.run / name).plan for name in read_folds(folded.run)["members"]]
    assert plans[0] == plans[1] == plans[2]
    assert max(plans[0].spacing_mm) == pytest.approx(2.25)  # the median of all six: no fold's own
    assert "one plan for all folds, from all 6 cases" in plans[0].reasons["spacing_mm"]
    assert yaml.safe_load((folded.run / "plan.yaml").read_text())["spacing_mm"] == list(plans[0].spacing_mm)


def test_a_class_that_one_side_lacks_is_said(tmp_path: Path) -> None:
    """Blocks of three neighbours are the smallest: c0 and c1, which have it, stay together."""
    data = write_data(tmp_path / "data", rare=(0, 1))
    lost = []
    for fold in range(2):
        quick = ("data.split.num_folds=2", "trainer.max_steps=1", "trainer.final_predictions=false")
        _, said = run(data, tmp_path / f"run{fold}", f"fold={fold}", *quick)
        split = read_split(tmp_path / f"run{fold}" / "split.json")
        lost.append({"c0", "c1"} <= set(split.val))
        assert ("no training case has class_2" in said) is lost[-1]
        assert ("no validation case has class_2" in said) is not lost[-1]
    assert {*lost} == {True, False}


def test_the_cross_validation_scores_every_case_once(folded: FoldedRun) -> None:
    folder = folded.run / "crossvalidation"
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {f"c{n}" for n in range(6)} and len(rows) == 12
    labels = BundleInfo.read(folded.run / "fold_0").labels
    means = {}
    for row in rows:
        fold = folded.run / f"fold_{row['fold']}"
        assert row["case"] in read_split(fold / "split.json").val
        predicted = open_label(fold / "validation" / f"{row['case']}.nii.gz")
        reference = open_label(folded.data / "labels" / f"{row['case']}.nii.gz")
        values = {r.class_name: r.values["dice"] for r in evaluate_pair(predicted, reference, labels)}
        dice = values[row["class"]]
        assert (np.isnan(dice) and row["dice"] == "") or float(row["dice"]) == pytest.approx(dice, abs=1e-5)
        means.setdefault(row["case"], []).append(dice)
    expected = np.mean([np.nanmean(values) for values in means.values()])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["all_cases"]["(foreground)"]["mean"] == pytest.approx(expected)
    assert folded.result.evaluation is not None and folded.result.evaluation.mean("dice") == pytest.approx(expected)
    assert folded.result.steps == 6
    text = (folder / "crossvalidation.md").read_text()
    assert "| class | fold 0 | fold 1 | fold 2 | all cases |" in text and "Worst cases" in text
    assert "cross-validation" in folded.said and "fold 1: 2 of 3" in folded.said
    assert not list(folder.glob("*.nii.gz"))


def test_an_interrupted_run_goes_on_with_the_fold_that_is_not_done(folded: FoldedRun, tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        original, steps = Loop.train_step, []

        def stop(self, *arguments):
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return original(self, *arguments)

        patch.setattr(Loop, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folded.data, target, "folds=[2,0]")
    assert f"resume={target}" in (tmp_path / "run.txt").read_text()
    content = read_folds(target)
    assert (content["members"], list(content["finished"])) == (["fold_2", "fold_0"], ["fold_2"])
    before = checkpoint_path(target / "fold_2", "latest").read_bytes()
    log = tmp_path / "again.txt"
    with log.open("w") as file:
        result = train(resumed(target, []), target, Console(file=file, width=120))
    assert "done before" in log.read_text()
    assert checkpoint_path(target / "fold_2", "latest").read_bytes() == before
    assert result.steps == 4 and list(read_folds(target)["finished"]) == ["fold_0", "fold_2"]
    evaluation = result.evaluation
    assert "| fold 2 | 2 |" in (target / "model_card.md").read_text()
    expected = {i for n in (0, 2) for i in read_split(folded.run / f"fold_{n}" / "split.json").val}
    assert evaluation is not None and set(evaluation.cases) == expected
    for number in (0, 2):  # the same as in one go
        ours, theirs = (load_bundle(f / f"fold_{number}").model.state_dict() for f in (target, folded.run))
        assert all((ours[k] == theirs[k]).all() for k in ours)


def test_splits_of_nnunet_and_what_folds_refuse(folded: FoldedRun, tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["c0", "c1"], "val": ["c2"]}, {"train": ["c2", "c1"], "val": ["c0"]}]))
    quick = ("trainer.max_steps=1", "trainer.final_predictions=false")
    run(folded.data, tmp_path / "a", f"data.split.file='{path}'", "fold=1", *quick)
    split = read_split(tmp_path / "a" / "split.json")
    assert (split.train, split.val) == (("c1", "c2"), ("c0",))
    surveyed = json.loads((tmp_path / "a" / "survey.json").read_text())["cases"]
    assert {case["case_id"] for case in surveyed} == {"c0", "c1", "c2"}
    events = b"".join(p.read_bytes() for p in (tmp_path / "a" / "tensorboard").rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in events

    _, said = run(folded.data, tmp_path / "b", f"data.split.file='{path}'", "folds=all", *quick)
    assert read_folds(tmp_path / "b")["members"] == ["fold_0", "fold_1"]
    assert not (tmp_path / "b" / "crossvalidation").exists() and "done: 2 folds" in said

    path.write_text(json.dumps([{"train": ["c1"], "val": ["c2"]}, {"train": ["c0"], "val": ["c2"]}]))
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*several folds.*c2"):
        run(folded.data, tmp_path / "c", f"data.split.file='{path}'", "folds=all")
    path.write_text(json.dumps({"train": ["c1"], "val": ["c2"]}))
    with pytest.raises(MedsegError, match="one split"):
        run(folded.data, tmp_path / "d", f"data.split.file='{path}'", "folds=all")
    with pytest.raises(MedsegError, match=r"(?s)E_NO_CASES.*at least two patients"):
        run(folded.data, tmp_path / "e", "folds=all", "data.split.num_folds=7")
    assert not (tmp_path / "e" / "survey.json").exists()
    rows = "\n".join(f"c{n},images/c{n}.nii.gz,labels/c{n}.nii.gz,{'val' if n else 'train'}" for n in range(3))
    (tmp_path / "manifest.csv").write_text(f"case,image,label,split\n{rows}")
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*there are no folds"):
        run(folded.data, tmp_path / "f", "folds=all", f"data.manifest='{tmp_path / 'manifest.csv'}'")


@pytest.mark.parametrize(
    "overrides",
    [
        ["folds=all", "fold=1"],
        ["folds=all", "data.split.validation=[a]"],
        ["folds=[0,1]", "trainer.overfit_cases=1"],
        ["folds=[0,0]"],
        ["folds=[]"],
        ["folds=[5]"],
        ["fold=5"],
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str]) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*fold"):
        compose("train", overrides)


def row(case: str, name: str, dice: float) -> Row:
    return Row(case, name, State.PRESENT if dice else State.MISSED, {"dice": dice, "hd95": 3.0})


def test_the_table_by_hand(tmp_path: Path) -> None:
    labels = Labels.from_mapping({"liver|lobe": 1, "spleen": 2})
    folds = {
        0: Evaluation((row("a", "liver|lobe", 0.9), row("a", "spleen", 0.5)), labels),
        3: Evaluation(tuple(row(c, n, d) for c, n, d in (("b", "liver|lobe", 0.7), ("b", "spleen", 0.0))), labels),
    }
    result = CrossValidation(folds)
    assert result.table() == [
        ["class", "fold 0", "fold 3", "all cases", "n", "missed"],
        ["liver|lobe", "0.900", "0.700", "0.800 ± 0.141", "2", "0"],
        ["spleen", "0.500", "0.000", "0.250 ± 0.354", "2", "1"],
        ["mean", "0.700", "0.350", "0.525 ± 0.247", "2", "1"],
    ]
    assert result.ranked() == [("b", pytest.approx(0.35)), ("a", pytest.approx(0.7))]
    result.write(tmp_path)
    assert "| liver\\|lobe | 0.900 | 0.700 |" in (tmp_path / "crossvalidation.md").read_text()
    back = read_evaluation(tmp_path, labels)
    assert back.rows == result.pooled.rows
    with (tmp_path / "said.txt").open("w") as file:
        print_crossvalidation(result, Console(file=file, width=100))
    assert "b 0.350 (fold 3)" in (tmp_path / "said.txt").read_text()


def test_an_evaluation_that_is_not_there(tmp_path: Path) -> None:
    labels = Labels.from_mapping({"a": 1})
    with pytest.raises(MedsegError, match="E_RUN"):
        read_evaluation(tmp_path, labels)
    (tmp_path / "metrics.json").write_text('{"definitions": {"unheard": ""}, "cases": []}')
    with pytest.raises(MedsegError, match="E_RUN"):
        read_evaluation(tmp_path, labels)
