"""`medseg select`: the ranking and what is chosen, the folder that it makes, and which runs cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from medseg.bundle import FOLDS_FILE, BundleInfo, checkpoint_path, load_bundle, read_checkpoint, write_checkpoint
from medseg.cli import cli, main
from medseg.data.splits import read_split, write_split
from medseg.errors import MedsegError
from medseg.formats import open_label, open_volume
from medseg.formats.nifti_names import names_in
from medseg.inference.averaging import decode_mean
from medseg.inference.ensemble import Ensemble
from medseg.inference.members import configurations_of
from medseg.inference.postprocess import POSTPROCESSING_FILE
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.labels import Labels
from medseg.reports.evaluation import FOREGROUND, Evaluation, evaluate_pair
from medseg.reports.ranking import CHANCE, Candidate, Difference, Ranking
from medseg.training.selection import read_sources

SINGLE, OTHER, PAIR = Candidate("unet", (0,), 5), Candidate("2d", (1,), 5), Candidate("unet + 2d", (0, 1), 10)


def ranking(*dice: np.ndarray) -> Ranking:
    """Of SINGLE, OTHER and PAIR from the Dice of each case, one structure."""
    cases = [f"c{i:02}" for i in range(len(dice[0]))]
    return Ranking.of([SINGLE, OTHER, PAIR], np.stack(dice)[..., None], cases, ["liver"])


@pytest.fixture
def base() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.7, 0.9, 30)


def test_a_pair_is_chosen_where_it_is_better_in_nearly_all_cases(base: np.ndarray) -> None:
    result = ranking(base, base - 0.02, base + np.linspace(0.001, 0.02, 30))
    assert result.chosen == PAIR and [c.name for c in result.candidates] == ["unet + 2d", "unet", "2d"]
    assert "the best with fewer models, unet, is lower by 0.0105, more than chance" in result.reason


def test_the_simpler_one_is_chosen_where_the_gain_may_be_chance(base: np.ndarray) -> None:
    gain = np.linspace(-0.02, 0.022, 30)
    result = ranking(base, base - 0.02, base + gain)
    assert result.candidates[0] == PAIR and result.chosen == SINGLE
    difference = result.differences[1]
    assert difference.p > CHANCE and (difference.better, difference.worse) == (16, 14)
    assert difference.mean == pytest.approx(gain.mean())
    assert "may be chance" in result.reason and "10 models instead of 5" in result.reason


def test_few_cases_never_prove_a_gain() -> None:
    """With five cases the smallest p of the test is 1/16."""
    few = np.linspace(0.5, 0.6, 5)
    assert ranking(few, few - 0.1, few + 0.1).chosen == SINGLE
    six = np.linspace(0.5, 0.6, 6)
    assert ranking(six, six - 0.1, six + 0.1).chosen == PAIR


def test_of_equally_many_models_the_better_one(base: np.ndarray) -> None:
    gain = np.linspace(-0.02, 0.022, 30)
    assert ranking(base, base + gain, base - 0.1).chosen == OTHER


def test_equal_ones(base: np.ndarray) -> None:
    result = ranking(base, base, base)
    assert result.chosen == SINGLE and result.candidates == (SINGLE, OTHER, PAIR)
    assert result.differences[2] == Difference(0.0, 0, 0, 1.0)


def test_the_test_is_wilcoxons() -> None:
    """All signs of the ranks counted out, and cases that lack a Dice left out."""
    best = np.array([0.9, 0.8, 0.85, 0.7, np.nan, 0.6, 0.75])
    other = np.array([0.7, 0.81, 0.8, 0.6, 0.5, 0.57, np.nan])
    difference = Difference.of(best, other)
    values = (best - other)[~np.isnan(best - other)]
    ranks = stats.rankdata(np.abs(values))
    observed = ranks[values > 0].sum()
    signs = np.array(np.meshgrid(*[[0, 1]] * len(values))).reshape(len(values), -1)
    sums = ranks @ signs
    p = min(1, 2 * min((sums >= observed).mean(), (sums <= observed).mean()))
    assert difference.p == pytest.approx(p)
    assert (difference.better, difference.worse) == (4, 1) and difference.mean == pytest.approx(values.mean())


def test_means_are_those_of_an_evaluation() -> None:
    """Structures absent from a case are left out of its mean, and each case weighs the same."""
    dice = np.array([[[0.5, np.nan], [0.9, 0.7], [np.nan, np.nan]]])
    result = Ranking.of([SINGLE], dice, ["a", "b", "c"], ["liver", "spleen"])
    assert result.means == [{"liver": pytest.approx(0.7), "spleen": 0.7, FOREGROUND: pytest.approx(0.65)}]
    content = result.to_json()
    assert content["candidates"][0]["cases"] == {"a": [0.5, None], "b": [0.9, 0.7], "c": [None, None]}
    assert json.dumps(content, allow_nan=False)
    assert "| **unet** | 5 | 0.7000 | 0.7000 | 0.6500 |" in result.markdown()


def shaken(run: Path, target: Path, seed: int) -> None:
    """A copy of a run whose weights are a little others."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("tensorboard", "validation", "postprocessing.*"))
    path = checkpoint_path(target, "best")
    tensors, metadata = read_checkpoint(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.startswith("model.") and tensor.is_floating_point():
            tensors[name] = tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    write_checkpoint(path, tensors, metadata)


def cross_validation(run: Path, target: Path, seed: int = 0) -> Path:
    """A run of two folds made of copies of one run: fold 1 validates on what fold 0 trained on."""
    target.mkdir(parents=True)
    for name in ("config.yaml", "places.yaml"):
        shutil.copy(run / name, target)
    split = read_split(run / "split.json")
    for fold, (train, val) in enumerate([(split.train, split.val), (split.val, split.train)]):
        shaken(run, target / f"fold_{fold}", 2 * seed + fold)
        write_split(target / f"fold_{fold}" / "split.json", dataclasses.replace(split, train=train, val=val))
    (target / FOLDS_FILE).write_text(json.dumps({"members": ["fold_0", "fold_1"]}))
    return target


@pytest.fixture
def runs(tiny_run, tmp_path: Path) -> tuple[Path, Path]:
    """Two configurations of two folds; the second sees the scans at another spacing."""
    one = cross_validation(tiny_run.run, tmp_path / "runs" / "one", 0)
    two = cross_validation(tiny_run.run, tmp_path / "runs" / "two", 1)
    for fold in two.glob("fold_*"):
        info = BundleInfo.read(fold)
        spacing = tuple(1.3 * s for s in info.plan.spacing_mm)
        dataclasses.replace(info, plan=dataclasses.replace(info.plan, spacing_mm=spacing)).write(fold)
    return one, two


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["select", *map(str, arguments)])
    assert isinstance(result.exception, MedsegError), result.output
    return str(result.exception)


def test_from_runs_to_an_ensemble_that_predicts(tiny_run, runs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "best"
    arguments = ["select", *map(str, runs), "-o", str(out), "--device", "cpu", "--precision", "fp32"]
    main(arguments)
    said = capsys.readouterr().out
    content = json.loads((out / "selection.json").read_text())
    assert {p.name for p in out.iterdir()} == {
        "ensemble.json",
        "postprocessing.json",
        "postprocessing.md",
        "selection.json",
        "selection.md",
        "validation",
    }
    assert f"chosen: {content['chosen']}" in said and content["reason"] in " ".join(said.split())
    candidates = {c["name"]: c for c in content["candidates"]}
    assert set(candidates) == {"one", "two", "one + two"} and content["num_cases"] == 4
    assert candidates["one + two"]["num_models"] == 4
    # Four cases prove nothing: the better of the single ones
    assert content["chosen"] == max(("one", "two"), key=lambda name: candidates[name]["dice"][FOREGROUND])

    # The numbers are those of what each fold's model says of the cases that it has not seen
    labels = BundleInfo.read(runs[0] / "fold_0").labels
    for name, members in (("one", runs[:1]), ("two", runs[1:]), ("one + two", runs)):
        rows = []
        for fold in ("fold_0", "fold_1"):
            predictors = [Predictor(load_bundle(run / fold), WindowConfig()) for run in members]
            for case in read_split(runs[0] / fold / "split.json").val:
                scan = open_volume(tiny_run.data / "imagesTr" / f"{case}_0000.nii.gz")
                parts = [p.logits_of(scan) for p in predictors]
                predicted = predictors[0].in_file_values(
                    decode_mean(parts, [1 / len(parts)] * len(parts), labels, scan.grid)
                )
                reference = open_label(tiny_run.data / "labelsTr" / f"{case}.nii.gz")
                rows += evaluate_pair(predicted, reference, labels, case=case)
                if name == content["chosen"]:
                    written = out / "validation" / f"{case}.nii.gz"
                    assert np.array_equal(open_label(written).array, predicted.array)
                    assert names_in(nibabel.load(written).header.extensions[0].content)[1] == "liver"
        evaluation = Evaluation(tuple(rows), labels)
        assert candidates[name]["dice"][FOREGROUND] == pytest.approx(evaluation.mean("dice"))
        assert candidates[name]["dice"]["liver"] == pytest.approx(evaluation.mean("dice", "liver"))

    decided = json.loads((out / POSTPROCESSING_FILE).read_text())
    assert decided["num_cases"] == 4
    assert decided["dice"]["liver"]["before"] == pytest.approx(candidates[content["chosen"]]["dice"]["liver"])
    (configuration,) = configurations_of(out)
    assert configuration.folder.resolve().name == content["chosen"] and len(configuration.members) == 2
    main(["predict", str(out), str(tiny_run.dicom), "-o", str(tmp_path / "labels"), "--device", "cpu"])
    assert "ensemble: 2 models" in capsys.readouterr().out

    assert "E_OUTPUT: there is an ensemble already" in refused(*runs, "-o", out)
    main([*arguments, "--overwrite"])
    assert json.loads((out / "selection.json").read_text())["chosen"] == content["chosen"]


def test_a_pair_that_wins_predicts_as_a_pair(runs: tuple[Path, Path], tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("medseg.reports.ranking.CHANCE", 2.0)  # every difference counts
    scores = iter(np.tile([0.1, 0.2, 0.3], 4))
    monkeypatch.setattr("medseg.training.selection._dice", lambda *rest: [next(scores)] * 5)
    out = tmp_path / "best"
    main(["select", *map(str, runs), "-o", str(out), "--device", "cpu"])
    assert json.loads((out / "selection.json").read_text())["chosen"] == "one + two"
    ensemble = Ensemble.from_run(out, device="cpu")
    assert [p.num_models for p in ensemble.predictors] == [2, 2]
    assert "mean of their probabilities of 2 plans" in ensemble.describe()[0]
    scan = open_volume(sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0])
    assert ensemble.predict(scan).grid.difference(scan.grid) is None


def test_runs_without_folds(tiny_run, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        shaken(tiny_run.run, tmp_path / name, seed)
    out = tmp_path / "best"
    main(["select", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(out), "--device", "cpu"])
    content = json.loads((out / "selection.json").read_text())
    assert content["num_cases"] == 2 and len(content["candidates"]) == 3


def test_the_same_name_in_two_places(tiny_run, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        shaken(tiny_run.run, tmp_path / name / "run", seed)
    names = [s.name for s in read_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == ["a/run", "b/run"]  # and not the folders above, which may tell whose data they hold


def test_runs_that_cannot_be_compared(runs: tuple[Path, Path], tiny_run, tmp_path: Path) -> None:
    one, two = runs
    out = tmp_path / "out"
    assert "E_CONFIG: there is nothing to compare" in refused(one, "-o", out)
    assert "E_CONFIG: there is nothing to compare" in refused(one, one, "-o", out)
    assert "E_RUN: there is no such run" in refused(one, tmp_path / "nowhere", "-o", out)
    message = refused(one, tiny_run.run, "-o", out)
    assert "E_MODEL: the runs were not trained and validated on the same cases" in message
    assert "2 fold(s) with 4 validation cases" in message and "1 fold(s) with 2" in message

    table = two / "fold_0" / "split.json"
    split = read_split(table)
    write_split(table, dataclasses.replace(split, train=split.train[:1]))
    assert "divided into other folds or with other training cases" in refused(one, two, "-o", out)
    write_split(table, dataclasses.replace(split, train=split.train + split.val))
    assert "E_LEAK" in refused(one, two, "-o", out)
    write_split(table, split)

    info = BundleInfo.read(two / "fold_1")
    changed = Labels.from_mapping({**info.labels.to_json(), "liver": 77})
    dataclasses.replace(info, labels=changed).write(two / "fold_1")
    assert "these models have other classes: liver differ" in refused(one, two, "-o", out)
    info.write(two / "fold_1")

    places = (two / "places.yaml").read_text()
    (two / "places.yaml").write_text(places.replace(str(tiny_run.data), str(tmp_path / "moved")))
    message = refused(one, two, "-o", out)
    assert "read their cases from other places" in message and "--data FOLDER" in message
    (tmp_path / "moved").mkdir()
    assert "E_NO_CASES" in refused(one, two, "-o", out, "--data", tmp_path / "moved")
    (out / "something").mkdir(parents=True)
    assert "E_OUTPUT: the folder holds something else" in refused(one, two, "-o", out, "--data", tiny_run.data)


def test_unfinished_folds_are_refused(runs: tuple[Path, Path]) -> None:
    table = {"members": ["fold_0", "fold_1"], "finished": {"fold_0": {}}}
    (runs[1] / FOLDS_FILE).write_text(json.dumps(table))
    with pytest.raises(MedsegError, match=r"(?s)E_RUN: not all folds of this run are finished.*fold_1.*resume="):
        read_sources(runs)


def test_an_ensemble_is_no_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "ensemble.json").write_text("{}")
    with pytest.raises(MedsegError, match="E_RUN: this is an ensemble"):
        read_sources([runs[0], tmp_path / "ensemble"])


def test_a_case_that_is_gone(runs: tuple[Path, Path], tiny_run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    case = read_split(runs[0] / "fold_0" / "split.json").val[0]
    for folder in ("imagesTr", "labelsTr"):
        for path in (data / folder).glob(f"{case}*"):
            path.unlink()
    message = refused(*runs, "-o", tmp_path / "out", "--data", data)
    assert "E_MISSING" in message and case in message and not (tmp_path / "out").exists()


def test_runs_are_named_by_as_little_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    from medseg.training.selection import _short_names

    assert _short_names([tmp_path / "a" / "unet", tmp_path / "b" / "fusionnet"]) == ["unet", "fusionnet"]
    assert _short_names([tmp_path / "a" / "unet", tmp_path / "b" / "unet"]) == ["a/unet", "b/unet"]
