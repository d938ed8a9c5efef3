"""Folders of predictions against references: matching, labels, means, files and tables."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from rich.console import Console

from medseg.cli.evaluate import evaluate as evaluate_verb
from medseg.errors import MedsegError
from medseg.formats import write_label
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.reports.comparison import compare, read_metrics
from medseg.reports.evaluation import FOREGROUND, Evaluation, Row, evaluate_folders, evaluate_pair
from medseg.reports.tables import print_evaluation
from medseg.statistics import bootstrap_means
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 7})
AFFINE = np.array([[-0.8, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
SHAPE = (9, 8, 7)


def organs(*, spleen: bool = True, shift: int = 0) -> NDArray[np.uint8]:
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[1 + shift : 4 + shift, 1:6, 1:5] = 1
    if spleen:
        array[6:8, 2:6, 2:6] = 7
    return array


def volume(array: NDArray[np.uint8], affine: NDArray[np.float64] = AFFINE) -> Volume:
    return Volume(array, Grid(array.shape, affine))


def save(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_label(path, volume(array) if array.ndim == 3 else Volume(array, Grid.of_picture(array.shape)))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """a: perfect; b: liver shifted, spleen missed; c: spleen in neither."""
    predicted, reference = tmp_path / "pred", tmp_path / "ref"
    for case, truth, guess in (
        ("a", organs(), organs()),
        ("b", organs(), organs(spleen=False, shift=1)),
        ("c", organs(spleen=False), organs(spleen=False)),
    ):
        save(reference / f"{case}_seg.nii.gz", truth)
        save(predicted / f"{case}.nii.gz", guess)
    return predicted, reference


def values(evaluation: Evaluation, case: str, class_name: str) -> Row:
    return next(r for r in evaluation.rows if (r.case, r.class_name) == (case, class_name))


def test_means_count_what_was_missed_and_leave_out_what_is_absent(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(*folders, labels=LABELS)
    liver, spleen, foreground = evaluation.summary
    shifted = 2 / 3
    assert evaluation.cases == ("a", "b", "c")
    assert values(evaluation, "b", "liver").values["dice"] == pytest.approx(shifted)
    assert liver.statistics["dice"].mean == pytest.approx((1 + shifted + 1) / 3)
    assert liver.statistics["dice"].median == 1
    assert liver.statistics["dice"].std == pytest.approx(statistics.stdev([1, shifted, 1]))
    assert (spleen.statistics["dice"].mean, spleen.statistics["dice"].n) == (0.5, 2)
    assert spleen.counts == {State.PRESENT: 1, State.MISSED: 1, State.SPURIOUS: 0, State.ABSENT: 1}
    assert foreground.class_name == FOREGROUND
    assert evaluation.case_means("dice") == pytest.approx({"a": 1, "b": shifted / 2, "c": 1})
    assert foreground.statistics["dice"].mean == pytest.approx((1 + shifted / 2 + 1) / 3)
    assert evaluation.mean("dice") == foreground.statistics["dice"].mean
    assert evaluation.mean("dice", "spleen") == 0.5
    assert "specificity" not in foreground.statistics


def test_missing_a_structure_improves_no_mean(tmp_path: Path) -> None:
    """Whichever found structure is left out of a prediction, no mean that ranks becomes better."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(3):
        truth = organs()
        guess = np.where(rng.random(SHAPE) < 0.25, rng.choice([0, 1, 7], SHAPE), truth).astype(np.uint8)
        cases.append((guess, truth))
    cases.append((organs(), organs(spleen=False)))

    def evaluate(changed: int | None = None, value: int = 0) -> Evaluation:
        rows = []
        for index, (guess, truth) in enumerate(cases):
            guess = np.where(guess == value, 0, guess).astype(np.uint8) if index == changed else guess
            rows += evaluate_pair(volume(guess), volume(truth), LABELS, case=str(index))
        return Evaluation(tuple(rows), LABELS)

    before = evaluate()
    for changed, value, name in [(i, v, n) for i in range(3) for v, n in ((1, "liver"), (7, "spleen"))]:
        after = evaluate(changed, value)
        for m in before.metrics:
            for entry in (name, FOREGROUND) if m.better else ():
                worse = after.mean(m.name, entry) - before.mean(m.name, entry)
                assert (worse <= 0) if m.better == "higher" else (worse >= 0), (m.name, entry)


def test_a_reference_without_a_prediction_is_refused_or_counted(folders: tuple[Path, Path]) -> None:
    predicted, reference = folders
    (predicted / "a.nii.gz").unlink()
    with pytest.raises(MedsegError, match=r"E_MISSING: 1 × reference without a prediction(.*\n)*.*got: +a\b"):
        evaluate_folders(predicted, reference, labels=LABELS)
    evaluation = evaluate_folders(predicted, reference, labels=LABELS, missing="count")
    assert values(evaluation, "a", "liver").state is State.MISSED
    assert evaluation.mean("dice", "spleen") == 0
    assert len(evaluation.cases) == 3


def test_a_prediction_without_a_reference_is_refused(folders: tuple[Path, Path]) -> None:
    predicted, reference = folders
    (reference / "b_seg.nii.gz").unlink()
    for policy in ("error", "count"):
        with pytest.raises(MedsegError, match="E_MISSING: 1 × prediction without a reference"):
            evaluate_folders(predicted, reference, labels=LABELS, missing=policy)  # type: ignore[arg-type]


def test_two_files_of_other_names(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(folders[0] / "b.nii.gz", folders[1] / "a_seg.nii.gz", labels=LABELS)
    assert evaluation.cases == ("a",)
    assert values(evaluation, "a", "spleen").state is State.MISSED
    with pytest.raises(MedsegError, match="a folder with a folder"):
        evaluate_folders(folders[0], folders[1] / "a_seg.nii.gz")
    with pytest.raises(MedsegError, match="E_MISSING: there is no such"):
        evaluate_folders(folders[0] / "nothing", folders[1])


def test_duplicate_ids_and_empty_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save(folders[0] / "a_mask.nii.gz", organs())
    with pytest.raises(MedsegError, match=r"E_DUPLICATE_ID(.*\n)*.*a\.nii\.gz and a_mask\.nii\.gz"):
        evaluate_folders(*folders, labels=LABELS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedsegError, match="E_NO_CASES"):
        evaluate_folders(folders[0] / "..", tmp_path / "empty")


def test_labels_from_predictions_json_else_from_the_references(folders: tuple[Path, Path]) -> None:
    assert evaluate_folders(*folders).labels.to_json() == {"background": 0, "label_1": 1, "label_7": 7}
    table = {"other": 1, "labels": {"background": 0, "liver": 1, "spleen": 7}}
    (folders[0] / "predictions.json").write_text(json.dumps(table))
    assert evaluate_folders(*folders).labels == LABELS
    assert evaluate_folders(folders[0] / "a.nii.gz", folders[1] / "a_seg.nii.gz").labels == LABELS
    (folders[0] / "predictions.json").write_text("{")
    with pytest.raises(MedsegError, match=r"E_LABEL(.*\n)*.*predictions\.json"):
        evaluate_folders(*folders)


def test_labels_from_a_dataset_json_beside_predictions_or_references(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """As nnU-Net has it: in the data set's folder above its labels, and in its folder of predictions."""
    description = {"labels": {"background": 0, "liver": 1, "spleen": 7}, "channel_names": {"0": "CT"}}
    above = folders[1].parent / "dataset.json"
    above.write_text(json.dumps(description))
    assert evaluate_folders(*folders).labels == LABELS
    assert evaluate_folders(folders[0] / "a.nii.gz", folders[1] / "a_seg.nii.gz").labels == LABELS
    above.unlink()
    (folders[1] / "predictions.json").write_text(json.dumps(description))  # as medseg convert leaves it
    assert evaluate_folders(*folders).labels == LABELS
    description["labels"] = {"background": 0, "hepar": 1, "lien": 7}
    (folders[0] / "dataset.json").write_text(json.dumps(description))
    assert evaluate_folders(*folders).labels.foreground == ("hepar", "lien")
    (folders[0] / "dataset.json").write_text("{")
    with pytest.raises(MedsegError, match=r"E_CONFIG(.*\n)*.*dataset\.json"):
        evaluate_folders(*folders)


def test_values_that_no_class_claims(folders: tuple[Path, Path]) -> None:
    odd = organs()
    odd[0, 0, 0] = 9
    save(folders[0] / "c.nii.gz", odd)
    with pytest.raises(MedsegError, match=r"E_LABEL(.*\n)*.*c \(prediction\)(.*\n)*.*\[9\]"):
        evaluate_folders(*folders, labels=LABELS)


def test_flipped_axes_are_the_same_prediction() -> None:
    truth, guess = volume(organs()), volume(organs(shift=1))
    expected = evaluate_pair(guess, truth, LABELS)
    turned = evaluate_pair(guess.reoriented("PIR"), truth, LABELS)
    assert [r.values for r in turned] == [pytest.approx(r.values, nan_ok=True) for r in expected]


def test_other_grids_are_refused_with_both() -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 4
    with pytest.raises(MedsegError, match=r"E_GRID(.*\n)*.*x1(.*\n)*.*spacing 0.8 × 1.5 × 3 mm(.*\n)*.*origin shifted"):
        evaluate_pair(volume(organs(), moved), volume(organs()), LABELS, case="x1")
    picture = Volume(np.ones((4, 4), np.uint8), Grid.of_picture((4, 4)))
    with pytest.raises(MedsegError, match="E_GRID"):
        evaluate_pair(picture, volume(organs()), LABELS)


def test_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    evaluation = evaluate_folders(
        *folders, labels=LABELS, tolerance_mm=1.0, num_threads=2, progress=lambda n, of: done.append((n, of))
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    out = tmp_path / "new" / "out"
    evaluation.write(out)
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "metrics.json", "summary.csv"]

    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["class"], r["state"]) for r in rows][2:5] == [
        ("b", "liver", "present"),
        ("b", "spleen", "missed"),
        ("c", "liver", "present"),
    ]
    assert rows[5]["dice"] == rows[5]["hd95_mm"] == ""
    diagonal = math.hypot(9 * 0.8, 8 * 1.5, 7 * 3.0)
    assert float(rows[3]["hd95_mm"]) == pytest.approx(diagonal, rel=1e-5)
    assert float(rows[0]["reference_volume_ml"]) == pytest.approx(60 * 0.8 * 1.5 * 3 / 1000)

    with (out / "summary.csv").open(newline="") as file:
        summary = {(r["class"], r["metric"]): r for r in csv.DictReader(file)}
    spleen = summary["spleen", "dice"]
    assert (spleen["mean"], spleen["n"], spleen["num_missed"], spleen["num_absent"]) == ("0.5", "2", "1", "1")

    document = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert document["tolerance_mm"] == 1.0
    assert document["summary"]["spleen"]["num_missed"] == 1
    assert document["summary"][FOREGROUND]["metrics"]["dice"]["mean"] == evaluation.mean("dice")
    assert document["cases"][5]["dice"] is None
    assert "TP" in document["definitions"]["dice"]
    assert str(tmp_path) not in json.dumps(document)


def test_an_unwritable_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate_folders(*folders, labels=LABELS)
    (tmp_path / "file").write_text("")
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        evaluation.write(tmp_path / "file" / "out")


def test_pictures_are_measured_in_pixels(tmp_path: Path) -> None:
    truth, guess = np.zeros((12, 10), np.uint8), np.zeros((12, 10), np.uint8)
    truth[2:6, 2:6] = guess[2:6, 4:8] = 255
    save(tmp_path / "ref" / "x.png", truth)
    save(tmp_path / "pred" / "x_mask.tif", guess)
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    evaluation.write(tmp_path / "out")
    row = next(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert (row["reference_volume_px"], row["hd95_px"], row["dice"]) == ("16", "2", "0.5")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["tolerance_px"] == 2.0
    save(tmp_path / "ref" / "y.nii.gz", organs())
    save(tmp_path / "pred" / "y.nii.gz", organs())
    labels = Labels.from_mapping({"background": 0, "thing": [255, 1, 7]})
    with pytest.raises(MedsegError, match="E_MIXED"):
        evaluate_folders(tmp_path / "pred", tmp_path / "ref", labels=labels)


def test_the_table_fits_100_columns_and_warns_of_missed_structures(folders: tuple[Path, Path]) -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    print_evaluation(evaluate_folders(*folders, labels=LABELS), console)
    text = console.export_text()
    assert "…" not in text
    spleen = next(line for line in text.splitlines() if line.startswith("spleen"))
    mean = next(line for line in text.splitlines() if line.startswith("mean"))
    assert mean.split()[1] == "0.778"
    assert spleen.split()[1:3] == ["0.500", "±0.707"]
    assert spleen.split()[-3:] == ["2", "1", "0"]
    worst = text[text.index("worst cases") :].splitlines()[3].split()
    assert worst == ["b", "0.333", "spleen", "0.000", "missed"]


def test_real_references_are_perfect_against_themselves(real_data: Path) -> None:
    reference = sorted((real_data / "segmentation" / "hippocampus" / "labels").glob("*.nii.gz"))[0]
    evaluation = evaluate_folders(reference, reference)
    assert evaluation.mean("dice") == evaluation.mean("surface_dice") == 1
    assert evaluation.mean("hd95") == 0


# --- whose the cases are ---


@pytest.fixture
def scans_of_two(tmp_path: Path) -> tuple[Path, Path]:
    """Six cases of two patients; within a patient nothing differs."""
    (tmp_path / "data").mkdir()
    for number in range(6):
        save(tmp_path / "data" / "labels" / f"c{number}.nii.gz", organs())
        save(tmp_path / "pred" / f"c{number}.nii.gz", organs(shift=number % 2))
    return tmp_path / "pred", tmp_path / "data" / "labels"


def table_of(path: Path, header: str = "case,patient", rows: str = "{case},{patient}") -> Path:
    lines = [rows.format(case=f"c{number}", patient=("Ann", "Bo")[number % 2]) for number in range(6)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_intervals_are_over_patients_where_a_table_names_them(scans_of_two: tuple[Path, Path], tmp_path: Path) -> None:
    by_case = evaluate_folders(*scans_of_two, labels=LABELS)
    assert not by_case.patients and by_case.intervals[FOREGROUND, "dice"].num_patients == 6
    table = table_of(tmp_path / "whose.csv", "id;Subject", "{case}_seg.nii.gz;{patient}")
    scores = tmp_path / "scores"
    done = CliRunner().invoke(
        evaluate_verb,
        [*map(str, scans_of_two), "--labels", str(LABELS.to_json()), "--patients", str(table), "-o", str(scores)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and "6 cases of 2 patients" in done.output
    document = json.loads((scores / "metrics.json").read_text())
    assert document["patients"] == {f"c{number}": number % 2 for number in range(6)}
    assert "2 patients" in document["warning"] and "Ann" not in (scores / "metrics.json").read_text()
    # the interval that the patients' means alone give: within a patient nothing differs
    dice = [row["dice"] for row in document["cases"] if row["class"] == "liver"]
    (expected,) = bootstrap_means(dice[:2])
    found = document["summary"]["liver"]["metrics"]["dice"]
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    case_interval = by_case.intervals["liver", "dice"]
    assert found["high"] - found["low"] > 1.1 * (case_interval.high - case_interval.low)
    # what medseg compare reads of it
    compared = compare(read_metrics(scores), read_metrics(scores))
    assert (compared.units, compared.num_patients) == ("patients", 2)


@pytest.mark.parametrize("place", ["data/manifest.csv", "data/labels/manifest.csv", "data/manifest.json"])
def test_the_manifest_of_the_references_names_the_patients(
    scans_of_two: tuple[Path, Path], tmp_path: Path, place: str
) -> None:
    table_of(
        tmp_path / "m.csv", "case,image,label,patient", "{case},images/{case}.nii.gz,labels/{case}.nii.gz,{patient}"
    )
    if place.endswith(".json"):
        rows = list(csv.DictReader((tmp_path / "m.csv").open()))
        (tmp_path / "m.csv").write_text(json.dumps({"cases": rows}))
    (tmp_path / "m.csv").rename(tmp_path / place)
    evaluation = evaluate_folders(*scans_of_two, labels=LABELS)
    assert evaluation.patients == {f"c{number}": ("Ann", "Bo")[number % 2] for number in range(6)}
    assert evaluation.intervals["liver", "dice"].num_patients == 2


def test_bids_names_tell_the_patients(tmp_path: Path) -> None:
    for case in ("sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_T1w"):
        save(tmp_path / "ref" / f"{case}.nii.gz", organs())
    evaluation = evaluate_folders(tmp_path / "ref", tmp_path / "ref", labels=LABELS)
    assert set(evaluation.patients.values()) == {"sub-01", "sub-02"}
    assert evaluation.intervals["liver", "dice"].num_patients == 2


def test_a_table_of_patients_that_leaves_questions_is_refused(scans_of_two: tuple[Path, Path], tmp_path: Path) -> None:
    table = table_of(tmp_path / "whose.csv")
    text = table.read_text()
    table.write_text(text.replace("c4,Ann\n", ""))
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING: the patient of 1 cases.*whose.csv.*c4"):
        evaluate_folders(*scans_of_two, labels=LABELS, patients=table)
    table.write_text(text + "c4.nii.gz,Bo\n")
    with pytest.raises(MedsegError, match=r"(?s)E_DUPLICATE_ID.*two patients.*c4"):
        evaluate_folders(*scans_of_two, labels=LABELS, patients=table)
    with pytest.raises(MedsegError, match=r"E_MISSING: there is no such table"):
        evaluate_folders(*scans_of_two, labels=LABELS, patients=tmp_path / "none.csv")
    table.write_text('{"a": 1}')
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING.*case,patient"):
        evaluate_folders(*scans_of_two, labels=LABELS, patients=table)
    with pytest.raises(MedsegError, match=r"E_CONFIG: the manifest is no list"):
        evaluate_folders(*scans_of_two, labels=LABELS, patients=table.rename(tmp_path / "whose.json"))
