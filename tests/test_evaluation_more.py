"""`medseg evaluate` on probabilities and on maps of instances, and how it reads files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from peak import IMPORT
from PIL import Image
from scipy import ndimage

from medseg.cli.evaluate import evaluate as evaluate_verb
from medseg.errors import MedsegError
from medseg.formats import Reading, nifti, open_channels, open_volume, write_label
from medseg.formats.shares import write_shares
from medseg.labels import Labels
from medseg.reports.belonging import patients_by_case
from medseg.reports.calibrated import NEAR_MM, Probabilities, Shares, calibrated
from medseg.reports.evaluation import evaluate_folders
from medseg.torchvision_compat import prepare_torchvision
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2})
GRID = Grid((30, 24, 8), np.diag([-1.0, 2.0, 3.0, 1.0]))


def run(*arguments: object) -> str:
    done = CliRunner().invoke(evaluate_verb, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# --- probabilities ---


def shares_of(p: NDArray[np.float32], grid: Grid = GRID, classes: Labels | None = None) -> Shares:
    return Shares(len(p), iter([Volume(channel, grid) for channel in p]), classes)


def probabilities_of(seed: int, num: int = 3, shape: tuple[int, ...] = GRID.shape) -> NDArray[np.float32]:
    logits = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(num, *shape)), (0, *[1.5] * len(shape)))
    return torch.from_numpy(12 * logits).softmax(0).numpy()


def reference_of(probabilities: NDArray[np.float32], seed: int) -> NDArray[np.uint8]:
    """Drawn from the probabilities where they are less sure than the network says, and nothing near the border."""
    noise = np.random.default_rng(seed + 100).gumbel(size=probabilities.shape)
    drawn = np.argmax(np.log(probabilities + 1e-9) / 2 + noise, axis=0).astype(np.uint8)
    inside = np.zeros(drawn.shape, dtype=bool)
    inside[(slice(14, 18), *[slice(6, 8)] * (drawn.ndim - 1))] = True
    return np.where(inside, drawn, 0).astype(np.uint8)


def ece_by_the_papers_program(p: NDArray[np.float32], truth: NDArray[np.uint8]) -> float:
    """A sum of masked means over the edges of the bins, as in Guo et al.'s own program."""
    confidence, error = p.max(0), 0.0
    right = p.argmax(0) == truth
    for low, high in pairwise(np.linspace(0, 1, 16)):
        within = (confidence > low) & (confidence <= high)
        if within.any():
            error += abs(confidence[within].mean(dtype=float) - right[within].mean()) * within.mean()
    return float(error)


def ece_voxel_by_voxel(p: NDArray[np.float32], truth: NDArray[np.uint8]) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for values, true in zip(p.reshape(len(p), -1).T, truth.ravel(), strict=True):
        bins.setdefault(int(np.ceil(values.max() * 15)), []).append((float(values.max()), values.argmax() == true))
    gaps = [len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values()]
    return float(sum(gaps) / truth.size)


@pytest.fixture
def predicted(tmp_path: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Two cases with references, labels and probabilities on flipped axes; beside the predictions their table."""
    cases = {}
    for number, case in enumerate(("a", "b")):
        p = probabilities_of(number)
        truth = reference_of(p, number)
        for folder, volume in (
            ("ref", Volume(LABELS.to_values(truth), GRID)),
            ("out", Volume(LABELS.to_values(p.argmax(0).astype(np.uint8)), GRID)),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_label(tmp_path / folder / f"{case}.nii.gz", volume)
        (tmp_path / "out" / "probabilities").mkdir(exist_ok=True)
        write_shares(tmp_path / "out" / "probabilities" / f"{case}.nii.gz", Volume(p, GRID).reoriented("RPI"))
        cases[case] = (p, truth)
    (tmp_path / "out" / "predictions.json").write_text(json.dumps({"labels": LABELS.to_json()}))
    return cases


def test_calibration_from_the_command_line(predicted, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    text = run(tmp_path / "out", tmp_path / "ref", "--probabilities", tmp_path / "out" / "probabilities", "-o", out,
               "--report")  # fmt: skip
    assert "calibration" in text and "calibration.csv" in text
    rows = {row["case"]: row for row in csv.DictReader((out / "calibration.csv").open())}
    margin = [int(np.ceil(NEAR_MM / spacing)) for spacing in GRID.spacing_mm]
    for case, (p, truth) in predicted.items():
        assert float(rows[case]["ece"]) == pytest.approx(ece_by_the_papers_program(p, truth), abs=1e-4)
        assert float(rows[case]["ece"]) == pytest.approx(ece_voxel_by_voxel(p, truth), abs=1e-4)
        found = [(axis.min(), axis.max() + 1) for axis in np.nonzero(truth)]
        box = tuple(slice(max(0, low - m), high + m) for (low, high), m in zip(found, margin, strict=True))
        assert truth[box].size < truth.size
        near = ece_by_the_papers_program(p[(slice(None), *box)], truth[box])
        assert float(rows[case]["ece_near"]) == pytest.approx(near, abs=1e-4)
        assert int(rows[case]["num_voxels_near"]) == truth[box].size
    document = json.loads((out / "metrics.json").read_text())["calibration"]
    assert document["scan"]["mean_ece"] == pytest.approx(
        np.mean([float(row["ece"]) for row in rows.values()]), rel=1e-5
    )
    assert "Guo" in document["definition"]
    together = [np.concatenate([predicted[case][i].reshape(3, -1) if i == 0 else predicted[case][i].ravel()
                for case in ("a", "b")], axis=-1) for i in (0, 1)]  # fmt: skip
    assert document["scan"]["pooled_ece"] == pytest.approx(ece_by_the_papers_program(*together), abs=1e-4)
    assert sum(document["scan"]["bins"]["num_voxels"]) == 2 * predicted["a"][1].size
    page = (out / "report.html").read_text()
    assert "<h2>Calibration</h2>" in page and 'aria-label="reliability diagram"' in page


def test_without_probabilities_nothing_is_said_of_them(predicted, tmp_path: Path) -> None:
    assert "calibration" not in run(tmp_path / "out", tmp_path / "ref", "-o", tmp_path / "scores", "--report")
    assert not (tmp_path / "scores" / "calibration.csv").exists()
    assert "calibration" not in json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert "Calibration" not in (tmp_path / "scores" / "report.html").read_text()


def test_one_file_of_each(predicted, tmp_path: Path) -> None:
    evaluation = evaluate_folders(
        tmp_path / "out" / "a.nii.gz",
        tmp_path / "ref" / "a.nii.gz",
        probabilities=tmp_path / "out" / "probabilities" / "a.nii.gz",
    )
    assert evaluation.calibrations["a"].scan.ece == pytest.approx(ece_by_the_papers_program(*predicted["a"]), abs=1e-4)


def test_regions_are_a_question_each() -> None:
    labels = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": 2, "ignore": 9})
    p = probabilities_of(3)[:2]
    values = np.random.default_rng(0).choice([0, 1, 2, 9], GRID.shape).astype(np.uint8)
    found = calibrated(shares_of(p), Volume(values, GRID), labels, "x").scan
    counted = values != 9
    whole, core = (
        (np.stack([1 - share, share])[:, counted], np.isin(values, of)[counted].astype(np.uint8))
        for share, of in zip(p, ([1, 2], [2]), strict=True)
    )
    both = [np.concatenate(parts, axis=-1) for parts in zip(whole, core, strict=True)]
    assert found.counts.sum() == 2 * counted.sum()
    assert found.ece == pytest.approx(ece_by_the_papers_program(*both), abs=1e-5)  # type: ignore[arg-type]


def test_pictures_have_a_file_for_each_class(tmp_path: Path) -> None:
    p = probabilities_of(5, shape=(32, 40))
    grid = Grid.of_picture((32, 40))
    for index, share in enumerate(p):
        write_shares(tmp_path / f"x_1_{index:03d}.png", Volume(share, grid))
    read = Probabilities(tmp_path).read("x_1")
    assert read.number == 3
    np.testing.assert_allclose(np.stack([channel.array for channel in read.channels]), p, atol=1e-5)
    (tmp_path / "coloured").mkdir()
    for index in range(2):
        colours = np.zeros((32, 40, 3), np.uint8)
        colours[..., 0] = 200
        Image.fromarray(colours).save(tmp_path / "coloured" / f"x_{index:03d}.png")
    with pytest.raises(MedsegError, match=r"(?s)E_CHANNELS.*x_000.png.*3 channels"):
        list(Probabilities(tmp_path / "coloured").read("x").channels)
    truth = reference_of(p, 5)
    found = calibrated(Probabilities(tmp_path).read("x_1"), Volume(LABELS.to_values(truth), grid), LABELS, "x_1")
    assert found.scan.ece == pytest.approx(ece_by_the_papers_program(p, truth), abs=1e-4)


def test_what_are_no_probabilities_of_these_cases_is_refused(predicted, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "probabilities"
    other = Labels.from_mapping({"background": 0, "one": 1, "two": 2, "three": 3})
    with pytest.raises(MedsegError, match=r"(?s)E_LABEL.*4: background, one, two, three.*3 channels.*--labels"):
        evaluate_folders(tmp_path / "out", tmp_path / "ref", labels=other, probabilities=folder)
    with pytest.raises(MedsegError, match=r"E_CONFIG: these are no probabilities"):
        evaluate_folders(tmp_path / "out" / "a.nii.gz", tmp_path / "ref" / "a.nii.gz", labels=LABELS,
                         probabilities=scans_in(tmp_path))  # fmt: skip
    (folder / "b.nii.gz").unlink()
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING: there are no probabilities.*where: +b\b.*--probabilities"):
        evaluate_folders(tmp_path / "out", tmp_path / "ref", probabilities=folder)
    moved = shares_of(predicted["a"][0], Grid(GRID.shape, GRID.affine @ np.diag([1.5, 1, 1, 1])))
    with pytest.raises(MedsegError, match="E_GRID"):
        calibrated(moved, Volume(LABELS.to_values(predicted["a"][1]), GRID), LABELS, "a")


SWAPPED = "{background: 0, spleen: 2, liver: 1}"
"""The classes of the model, which `LABELS` has in their order, in another order."""


def test_the_order_of_the_classes_is_that_of_the_model(predicted, tmp_path: Path) -> None:
    """What `--labels` or a dataset.json declares may be in another order than the channels."""
    folder, scores = tmp_path / "out" / "probabilities", tmp_path / "scores"
    expected = [ece_by_the_papers_program(*predicted[case]) for case in ("a", "b")]
    for place in (folder, tmp_path / "out" / "probabilities" / "a.nii.gz"):
        predictions, references = (tmp_path / name / (place.name if place.is_file() else "") for name in ("out", "ref"))
        run(predictions, references, "--probabilities", place, "--labels", SWAPPED, "-o", scores)
        found = [float(row["ece"]) for row in csv.DictReader((scores / "calibration.csv").open())]
        assert found == pytest.approx(expected[: len(found)], abs=1e-4)
    # Of the folder alone nobody knows the classes, but the label maps came of them
    folder.rename(tmp_path / "moved")
    arguments = (tmp_path / "out", tmp_path / "ref", "--probabilities", tmp_path / "moved", "--labels")
    with pytest.raises(
        MedsegError, match=r"(?s)E_LABEL.*another order.*spleen, liver.*liver, spleen.*predictions.json"
    ):
        run(*arguments, SWAPPED)
    run(*arguments, "{background: 0, liver: 1, spleen: 2}")
    (tmp_path / "moved" / "predictions.json").write_text('{"labels": {"background": 0, "liver": 1, "vein": 3}}')
    with pytest.raises(MedsegError, match=r"(?s)E_LABEL.*other classes.*'vein': 3"):
        run(*arguments, SWAPPED)


def test_the_order_of_regions_is_that_of_the_model() -> None:
    model = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": 2, "regions_class_order": [1, 2]})
    table = Labels.from_mapping({"background": 0, "core": 2, "whole": [1, 2], "regions_class_order": [2, 1]})
    values = np.zeros(GRID.shape, np.uint8)
    values[5:25, 4:20], values[10:20, 8:14] = 1, 2
    truth, p = Volume(values, GRID), np.stack([values > 0, values == 2]).astype(np.float32)
    assert calibrated(shares_of(p, classes=model), truth, table, "x", predicted=truth).scan.ece == 0
    assert calibrated(shares_of(p), truth, model, "x", predicted=truth).scan.ece == 0
    with pytest.raises(MedsegError, match=r"(?s)E_LABEL.*another order"):
        calibrated(shares_of(p), truth, table, "x", predicted=truth)


def test_a_part_of_the_classes_was_written(predicted, tmp_path: Path) -> None:
    """`predict --classes spleen`: the table and the label maps have a class less than the probabilities."""
    p, truth = predicted["a"]
    table = {"background": [0, 1], "spleen": 2}
    (tmp_path / "out" / "predictions.json").write_text(json.dumps({"labels": table}))
    written = np.where(p.argmax(0) == 2, 2, 0).astype(np.uint8)
    write_label(tmp_path / "out" / "a.nii.gz", Volume(written, GRID))
    run(tmp_path / "out", tmp_path / "ref", "--probabilities", tmp_path / "out" / "probabilities", "-o",
        tmp_path / "scores", "--labels", "{background: 0, liver: 1, spleen: 2}")  # fmt: skip
    row = next(csv.DictReader((tmp_path / "scores" / "calibration.csv").open()))
    assert float(row["ece"]) == pytest.approx(ece_by_the_papers_program(p, truth), abs=1e-4)


def test_a_case_without_a_prediction_is_counted_beside_the_mean_ece(predicted, tmp_path: Path) -> None:
    arguments = (tmp_path / "out", tmp_path / "ref", "--probabilities", tmp_path / "out" / "probabilities", "-o",
                 tmp_path / "scores")  # fmt: skip
    assert "cases)" not in run(*arguments) and "of 2 cases" not in run(*arguments)
    (tmp_path / "out" / "b.nii.gz").unlink()
    assert "in 1 of 2 cases" in " ".join(run(*arguments, "--missing", "count", "--report").split())
    rows = list(csv.DictReader((tmp_path / "scores" / "calibration.csv").open()))
    assert [(row["case"], row["ece"] != "", row["num_voxels"]) for row in rows] == [
        ("a", True, str(np.prod(GRID.shape))), ("b", False, "0")
    ]  # fmt: skip
    document = json.loads((tmp_path / "scores" / "metrics.json").read_text())["calibration"]
    assert (document["num_cases"], document["scan"]["n"], document["near"]["n"]) == (2, 1, 1)
    assert document["scan"]["mean_ece"] == pytest.approx(float(rows[0]["ece"]), rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 1000, 5760, 2**22])
def test_channels_in_turn_are_those_of_the_volume(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "CHUNK_VOXELS", chunk)
    p = probabilities_of(0)
    write_shares(tmp_path / "x.nii.gz", Volume(p, GRID))
    number, channels = open_channels(tmp_path / "x.nii.gz")
    assert number == 3
    expected = open_volume(tmp_path / "x.nii.gz", Reading(channels=True)).array
    np.testing.assert_array_equal(np.stack([channel.array for channel in channels]), expected)
    content = bytearray((tmp_path / "x.nii.gz").read_bytes())
    content[-6] ^= 1  # of the checksum
    (tmp_path / "x.nii.gz").write_bytes(content)
    with pytest.raises(MedsegError, match="E_TRUNCATED"):
        list(open_channels(tmp_path / "x.nii.gz")[1])
    p[2, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(p, 0, -1), GRID.affine), tmp_path / "y.nii")
    with pytest.raises(MedsegError, match=r"(?s)E_NONFINITE.*1 of 17280"):
        list(open_channels(tmp_path / "y.nii")[1])


PEAK_PROGRAM = (
    IMPORT
    + """
from pathlib import Path
from medseg.formats import nifti
from medseg.metrics import calibration
from medseg.reports.evaluation import evaluate_folders

nifti.CHUNK_VOXELS = calibration._VOXELS_PER_CHUNK = 2**17  # what a chunk takes is the same for every scan
for name in sys.argv[2:]:
    before, folder = peak_bytes(), Path(sys.argv[1], name)
    found = evaluate_folders(folder / "out", folder / "ref", names=("dice",), probabilities=folder / "probabilities")
    print(found.calibrations["x"].scan.ece, peak_bytes() - before)
"""
)


def test_memory_does_not_grow_with_the_number_of_classes(tmp_path: Path) -> None:
    num, shapes = 24, {"small": (8, 8, 8), "large": (128, 128, 96)}
    for name, shape in shapes.items():
        grid = Grid(shape, np.eye(4))
        truth = (np.indices(shape).sum(0) // 16 % num).astype(np.uint8)
        for folder in ("out", "ref"):
            (tmp_path / name / folder).mkdir(parents=True)
            write_label(tmp_path / name / folder / "x.nii.gz", Volume(truth, grid))
        (tmp_path / name / "probabilities").mkdir()
        p = np.empty((num, *shape), np.float16)
        for index, channel in enumerate(p):
            channel[:] = np.where(truth == index, 0.75, 0.25 / (num - 1))
        write_shares(tmp_path / name / "probabilities" / "x.nii.gz", Volume(p, grid))
        (tmp_path / name / "out" / "predictions.json").write_text(
            json.dumps({"labels": {f"class {index}": index for index in range(num)}})
        )
    done = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path), *shapes], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    ece, grown = map(float, done.stdout.splitlines()[-1].split())
    assert ece == pytest.approx(0.25, abs=1e-3)
    voxels = float(np.prod(shapes["large"]))
    # whole, the channels take 4 bytes for each voxel and class, and it was 3.7 times that
    assert grown < 40 * voxels < 0.5 * 4 * num * voxels, f"{grown / voxels:.1f} bytes for each voxel"


def scans_in(folder: Path) -> Path:
    image = nibabel.Nifti1Image(np.full((*GRID.shape, 3), 40.0, np.float32), GRID.affine)
    nibabel.save(image, folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


# --- instances ---


def nuclei(seed: int, shape: tuple[int, int] = (60, 64)) -> NDArray[np.uint16]:
    """Discs that touch each other, with numbers in no order."""
    rng = np.random.default_rng(seed)
    array = np.zeros(shape, np.uint16)
    y, x = np.indices(shape)
    for number, value in enumerate(rng.permutation(np.arange(1, 20)) * 37):
        centre = (10 + 12 * (number // 5), 8 + 12 * (number % 5))
        array[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= rng.integers(20, 49)] = value
    return array


@pytest.fixture
def instances(tmp_path: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    reference, prediction = nuclei(0), nuclei(1)
    prediction[30:36] = 0
    for folder, array in (("ref", reference), ("pred", prediction)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "x.png")
    return prediction, reference


def test_instances_of_the_files_agree_with_monai_and_with_brute_force(instances, tmp_path: Path) -> None:
    prepare_torchvision()
    from monai.metrics import compute_panoptic_quality

    run(tmp_path / "pred", tmp_path / "ref", "--instances", "-o", tmp_path / "out")
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (row,) = document["cases"]
    assert row["class"] == "object" and document["labels"] == {"background": 0, "object": "rest"}
    dense = [np.unique(array, return_inverse=True)[1].reshape(array.shape).astype(np.int64) for array in instances]
    maps = [torch.from_numpy(array) for array in dense]
    for name in ("pq", "sq", "rq"):
        assert row[name] == pytest.approx(float(compute_panoptic_quality(*maps, metric_name=name)), rel=1e-4)
    ious, (ours, theirs) = [], instances
    for p in np.unique(ours)[1:]:
        for r in np.unique(theirs)[1:]:
            iou = ((ours == p) & (theirs == r)).sum() / ((ours == p) | (theirs == r)).sum()
            ious += [iou] if iou > 0.5 else []
    num = len(np.unique(ours)) - 1, len(np.unique(theirs)) - 1
    assert len(ious) > 3 and row["rq"] == pytest.approx(2 * len(ious) / sum(num))
    assert row["sq"] == pytest.approx(np.mean(ious))
    both = (ours > 0) & (theirs > 0)
    assert row["dice"] == pytest.approx(2 * both.sum() / ((ours > 0).sum() + (theirs > 0).sum()))


def test_what_counts_lesions_counts_instances(instances, tmp_path: Path) -> None:
    names = "reference_lesions,lesion_sensitivity,pq"
    run(tmp_path / "pred", tmp_path / "ref", "--instances", "--metrics", names, "-o", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]
    ours, theirs = instances
    numbers = np.unique(theirs)[1:]
    assert row["reference_lesions"] == len(numbers)
    assert row["lesion_sensitivity"] == np.mean([(ours[theirs == number] > 0).any() for number in numbers])
    labels = Labels.from_mapping({"nucleus": "rest"})
    (joined,) = evaluate_folders(
        tmp_path / "pred", tmp_path / "ref", labels=labels, names=("pq", "reference_lesions")
    ).rows
    assert joined.values["reference_lesions"] < len(numbers), "without --instances those that touch are one"


def test_instances_without_a_number_and_several_classes(instances, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_LABEL: the references hold too many|E_LABEL.*--instances"):
        evaluate_folders(tmp_path / "pred", tmp_path / "ref", labels=LABELS, instances=True)
    ignored = int(np.unique(instances[1])[1])
    labels = Labels.from_mapping({"background": 0, "nucleus": "rest", "ignore": ignored})
    (row,) = evaluate_folders(
        tmp_path / "pred", tmp_path / "ref", labels=labels, names=("reference_lesions",), instances=True
    ).rows
    assert row.values["reference_lesions"] == len(np.unique(instances[1])) - 2 and row.class_name == "nucleus"


def test_a_missed_and_an_empty_case(tmp_path: Path) -> None:
    for folder, arrays in (("ref", (nuclei(0), np.zeros((8, 8), np.uint16))), ("pred", (nuclei(0) * 0,) * 2)):
        (tmp_path / folder).mkdir()
        for name, array in zip("ab", arrays, strict=True):
            Image.fromarray(array if name == "a" else np.zeros((8, 8), np.uint16)).save(
                tmp_path / folder / f"{name}.png"
            )
    missed, empty = evaluate_folders(tmp_path / "pred", tmp_path / "ref", names=("pq", "dice"), instances=True).rows
    assert missed.values == {"pq": 0, "dice": 0} and all(np.isnan(list(empty.values.values())))


# --- reading ---


def test_files_whose_forms_disagree(tmp_path: Path) -> None:
    array = np.zeros((5, 6, 7), np.uint8)
    array[1:3, 1:4, 1:5] = 1
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.set_sform(np.diag([2.0, 2, 2, 1]), 1)
        image.set_qform(np.diag([1.0, 1, 1, 1]), 1)
        nibabel.save(image, tmp_path / folder / "x.nii.gz")
    with pytest.raises(MedsegError, match="--form"):
        evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert evaluate_folders(tmp_path / "pred", tmp_path / "ref", reading=Reading(form="sform")).mean("dice") == 1
    run(tmp_path / "pred", tmp_path / "ref", "--form", "qform", "-o", tmp_path / "out", "--report")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]
    assert row["reference_volume_ml"] == pytest.approx(24 / 1000)


def test_the_manifest_of_a_run_is_no_table_of_patients(tmp_path: Path) -> None:
    """`medseg evaluate OUT RUN/validation`: beside the references lies medseg's own list of files and digests."""
    (tmp_path / "validation").mkdir()
    (tmp_path / "manifest.json").write_text('{"format": "1", "files": {"plan.yaml": {"sha256": ""}}}', encoding="utf-8")
    assert patients_by_case(["a"], tmp_path / "validation") == {}
    (tmp_path / "manifest.json").write_text('[{"case": "a", "patient": "p"}]', encoding="utf-8")
    assert patients_by_case(["a"], tmp_path / "validation") == {"a": "p"}
