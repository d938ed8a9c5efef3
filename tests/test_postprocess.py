"""Largest components: what stays, when a step is kept, what is written, and that `predict` does it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from rich.console import Console
from scipy import ndimage

from medseg.data.cases import find_cases
from medseg.errors import MedsegError
from medseg.formats import write_image, write_label
from medseg.formats.nifti_names import names_in
from medseg.inference.components import boxes_of, outside_largest
from medseg.inference.ensemble import Ensemble
from medseg.inference.postprocess import (
    ALL_FOREGROUND,
    POSTPROCESSING_FILE,
    PostProcessing,
    choose_postprocessing,
)
from medseg.labels import IGNORE_INDEX, Labels
from medseg.metrics.case import measure_case
from medseg.training.postprocessing import postprocess_run
from medseg.volume import Grid, Volume

PEER = Path(__file__).resolve().parent.parent / ".peers" / "bin" / "python"
SHAPE = (24, 20, 16)
LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2})
Maps = dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]


def choose(cases: Maps, labels: Labels = LABELS) -> PostProcessing:
    return choose_postprocessing(sorted(cases), lambda case: cases[case], labels)


def blocks(*boxes: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Cubes of (class, first voxel along axis 0, its size, first along axis 1)."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    for index, start, size, row in boxes:
        array[start : start + size, row : row + size, 2 : 2 + size] = index
    return array


def outside_by_flooding(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same by growing each component from a seed, voxel by voxel, over all 3^n - 1 neighbours."""
    left, components = mask.copy(), []
    while left.any():
        grown = np.zeros_like(mask)
        grown[tuple(np.argwhere(left)[0])] = True
        while True:
            more = ndimage.maximum_filter(grown, size=3, mode="constant") & left
            if (more == grown).all():
                break
            grown = more
        components.append(grown)
        left &= ~grown
    largest = max((int(c.sum()) for c in components), default=0)
    smaller = [c for c in components if c.sum() < largest]
    return np.any(smaller, axis=0) if smaller else np.zeros_like(mask)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=st.booleans()))
def test_only_the_largest_component_stays(mask: NDArray[np.bool_]) -> None:
    indices = mask.astype(np.uint8) * 3
    removed = outside_largest(indices, [3], boxes_of(indices))
    expected = outside_by_flooding(mask)
    got = np.zeros_like(mask)
    if removed is not None:
        got[removed[0]] = removed[1]
    assert np.array_equal(got, expected)


def test_voxels_that_touch_at_a_corner_are_connected() -> None:
    indices = np.zeros((5, 5, 5), dtype=np.uint8)
    indices[1, 1, 1], indices[2, 2, 2] = 1, 2
    post = PostProcessing((ALL_FOREGROUND,))
    assert post.apply(indices, LABELS) is indices
    indices[4, 4, 4] = 1
    assert np.argwhere(post.apply(indices, LABELS)).tolist() == [[1, 1, 1], [2, 2, 2]]
    assert indices[4, 4, 4] == 1  # what came in stays as it was
    assert PostProcessing(("liver",)).apply(indices, LABELS) is indices  # of two equal ones both are the largest


NNUNET = """
import sys
import numpy as np
from nnunetv2.postprocessing import remove_connected_components
rule = remove_connected_components.remove_all_but_largest_component_from_segmentation
array = np.load(sys.argv[1])
np.savez(sys.argv[2], together=rule(array, [1, 2, 3]), **{f"c{i}": rule(array, i) for i in (1, 2, 3)})
"""


def test_agrees_with_nnunet(tmp_path: Path) -> None:
    """What nnU-Net's own function leaves of a map with many specks, for each class and all together."""
    if not PEER.exists():
        pytest.skip("nnU-Net is not installed: python scripts/make_peers.py")
    array = np.random.default_rng(0).choice(4, size=(30, 24, 20), p=[0.9, 0.04, 0.03, 0.03]).astype(np.uint8)
    np.save(tmp_path / "in.npy", array)
    files = [str(tmp_path / "in.npy"), str(tmp_path / "out.npz")]
    subprocess.run([str(PEER), "-c", NNUNET, *files], check=True, capture_output=True, timeout=300)
    labels = Labels.from_mapping({"background": 0, "c1": 1, "c2": 2, "c3": 3})
    with np.load(tmp_path / "out.npz") as theirs:
        for step, name in ((ALL_FOREGROUND, "together"), ("c1", "c1"), ("c2", "c2"), ("c3", "c3")):
            ours = PostProcessing((step,)).apply(array, labels)
            assert np.array_equal(ours, theirs[name]) and (ours != array).any()


def test_a_speck_is_removed() -> None:
    truth = blocks((1, 2, 6, 2), (2, 12, 4, 10))
    speck = blocks((1, 2, 6, 2), (2, 12, 4, 10), (1, 20, 2, 16))
    chosen = choose({"a": (speck, truth), "b": (truth, truth)})
    # All foreground together would take the spleen, which lies apart: not kept.
    assert chosen.steps == ("liver",)
    assert np.array_equal(chosen.apply(speck, LABELS), truth)
    why = {trial.step: trial for trial in chosen.trials}
    assert not why[ALL_FOREGROUND].kept and why["liver"].kept and not why["spleen"].kept
    assert "1 of 2 cases change" in why["liver"].reason and "nothing would change" in why["spleen"].reason
    assert chosen.before is not None and chosen.after is not None
    assert chosen.before["liver"] == pytest.approx((2 * 216 / (2 * 216 + 8) + 1) / 2) and chosen.after["liver"] == 1
    assert chosen.before["spleen"] == chosen.after["spleen"] == 1
    assert chosen.before[ALL_FOREGROUND] == pytest.approx((chosen.before["liver"] + 1) / 2)


def test_all_foreground_together() -> None:
    """Two structures that touch: what lies apart is wrong, whichever class it has."""
    truth = blocks((1, 2, 6, 2), (2, 8, 4, 2))
    wrong = blocks((1, 2, 6, 2), (2, 8, 4, 2), (2, 18, 3, 14), (1, 21, 2, 14))
    chosen = choose({"a": (wrong, truth), "b": (wrong, truth)})
    assert chosen.steps == (ALL_FOREGROUND,)  # after it nothing is left to the classes
    assert np.array_equal(chosen.apply(wrong, LABELS), truth)


def test_a_structure_of_two_parts_survives() -> None:
    """Two hippocampi, and a model that makes specks: to take one of the two costs far more than the specks."""
    truth = blocks((1, 2, 5, 2), (1, 2, 4, 12), (2, 12, 5, 2))
    made = blocks((1, 2, 5, 2), (1, 2, 4, 12), (2, 12, 5, 2), (1, 20, 1, 18))
    made[22, 2, 2] = 2
    chosen = choose({f"c{i}": (made, truth) for i in range(4)})
    assert chosen.steps == ("spleen",)
    trial = next(t for t in chosen.trials if t.step == "liver")
    assert not trial.kept and "no gain" in trial.reason and trial.after < trial.before


def test_a_gain_on_average_that_lowers_a_structure_is_not_kept() -> None:
    """Together with the specks of the liver the whole spleen goes in one of five cases."""
    truth = blocks((1, 2, 4, 2), (2, 6, 3, 2))
    apart = blocks((1, 2, 4, 2), (2, 18, 3, 12))
    specks = truth.copy()
    specks[14:19, 12:16, 3:6] = 1
    cases: Maps = {f"c{i}": (specks, truth) for i in range(4)}
    cases["apart"] = (apart, apart)
    chosen = choose(cases)
    trial = chosen.trials[0]
    assert trial.step == ALL_FOREGROUND and trial.after > trial.before
    assert not trial.kept and "but it lowers spleen" in trial.reason
    assert chosen.steps == ("liver",)


def test_an_absent_structure_that_was_found_is_no_loss() -> None:
    """Spurious voxels of a structure that the reference lacks score 0; without them the case is left out."""
    truth = blocks((1, 2, 6, 2))
    spurious = blocks((1, 2, 6, 2), (2, 18, 2, 14))
    both = blocks((1, 2, 6, 2), (2, 8, 4, 2))
    chosen = choose({"a": (spurious, truth), "b": (both, both)})
    assert chosen.steps == (ALL_FOREGROUND,)
    assert chosen.before is not None and chosen.after is not None
    assert chosen.before["spleen"] == 0.5 and chosen.after["spleen"] == 1


def test_one_structure_is_tried_once() -> None:
    labels = Labels.from_mapping({"background": 0, "cell": 1})
    truth = blocks((1, 2, 6, 2))
    chosen = choose({"a": (blocks((1, 2, 6, 2), (1, 18, 2, 14)), truth)}, labels)
    assert [t.step for t in chosen.trials] == [ALL_FOREGROUND] and chosen.steps == (ALL_FOREGROUND,)


def test_scores_are_those_of_the_metrics() -> None:
    """Before and after against `measure_case` on the maps themselves, with classes absent, missed and spurious."""
    rng = np.random.default_rng(0)
    grid = Grid((12, 12, 12), np.eye(4))
    labels = Labels.from_mapping({"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 9})
    cases: Maps = {}
    for i in range(6):
        smooth = ndimage.gaussian_filter(rng.normal(size=(4, *grid.shape)), (0, 2, 2, 2))
        truth = smooth.argmax(0).astype(np.uint8)
        made = (smooth + ndimage.gaussian_filter(rng.normal(size=smooth.shape), (0, 1, 1, 1))).argmax(0)
        made, truth = np.where(made == i, 0, made).astype(np.uint8), np.where(truth == i % 2, 0, truth)
        truth[:, :2] = IGNORE_INDEX
        cases[f"c{i}"] = (made, truth.astype(np.uint8))
    chosen = choose(cases, labels)

    def means(maps: Maps) -> dict[str, float]:
        table = np.array(
            [
                [r.values["dice"] for r in measure_case(p, t, grid, num_classes=4, names=["dice"])]
                for p, t in maps.values()
            ]
        )
        with np.errstate(invalid="ignore"):
            per_class = np.nanmean(table, axis=0)
            return {**dict(zip("abc", per_class, strict=True)), ALL_FOREGROUND: np.nanmean(np.nanmean(table, axis=1))}

    assert chosen.steps  # something helps on these, else the test says nothing of "after"
    assert chosen.before == pytest.approx(means(cases))
    assert chosen.after == pytest.approx(means({k: (chosen.apply(p, labels), t) for k, (p, t) in cases.items()}))


def test_regions_are_tried_one_on_the_other() -> None:
    labels = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": 2})
    truth = blocks((1, 2, 8, 2))
    truth[4:7, 4:7, 4:7] = 2
    made = truth.copy()
    made[18:20, 14:16, 2:4] = 2  # a false core outside is a false whole as well
    made[3, 3, 3] = 2  # and one inside of the whole, which the whole keeps
    made[2:7, 2:4, 2:4] = np.where(made[2:7, 2:4, 2:4] == 2, 2, 1)
    chosen = choose({"a": (made, truth), "b": (made, truth)}, labels)
    assert chosen.steps[0] == ALL_FOREGROUND
    done = chosen.apply(made, labels)
    assert (done[18:20] == 0).all()
    core = next(t for t in chosen.trials if t.step == "core")
    assert core.kept is ("core" in chosen.steps)


def test_nothing_to_do_and_nothing_there() -> None:
    empty = np.zeros(SHAPE, dtype=np.uint8)
    chosen = choose({"a": (empty, empty)})
    assert chosen.steps == () and chosen.before is not None and math.isnan(chosen.before["liver"])
    assert chosen.describe() == "none"
    assert PostProcessing().apply(empty, LABELS) is empty
    assert choose({}).steps == ()


def test_round_trip(tmp_path: Path) -> None:
    truth = blocks((1, 2, 6, 2))  # no spleen: its Dice is undefined
    chosen = choose({"a": (blocks((1, 2, 6, 2), (1, 18, 2, 14)), truth)})
    chosen.write(tmp_path)
    read = PostProcessing.read(tmp_path, LABELS)
    assert read.steps == chosen.steps and read.trials == chosen.trials and read.num_cases == 1
    assert read.describe() == chosen.describe() and "Dice of 1 validation case 0.9818 → 1.0000" in read.describe()
    text = (tmp_path / "postprocessing.md").read_text()
    assert "| liver | 0.9818 | 1.0000 |" in text and "| spleen | – | – |" in text
    assert "| all foreground | yes | mean Dice 0.9818 → 1.0000, no structure lower; 1 of 1 cases change |" in text
    assert PostProcessing.read(tmp_path / "nowhere", LABELS) == PostProcessing()


@pytest.mark.parametrize("change", [{"steps": ["kidney"]}, {"format": 99}, {"steps": 3}, {"dice": []}, None], ids=str)
def test_a_damaged_file(tmp_path: Path, change: dict[str, object] | None) -> None:
    PostProcessing(("liver",)).write(tmp_path)
    path = tmp_path / POSTPROCESSING_FILE
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MedsegError, match=r"(?s)E_RUN: the run's post-processing cannot be read.*--no-postprocess"):
        PostProcessing.read(tmp_path, LABELS)


def test_decided_from_files(tmp_path: Path) -> None:
    """Label values that are not indices, references stored with other axes than the predictions."""
    labels = Labels.from_mapping({"background": 0, "liver": 4, "spleen": 7})
    grid = Grid(SHAPE, np.diag([1.0, 1.5, 2.0, 1.0]))
    truth = Volume(labels.to_values(blocks((1, 2, 6, 2), (2, 8, 4, 2))), grid)
    made = Volume(labels.to_values(blocks((1, 2, 6, 2), (2, 8, 4, 2), (1, 20, 2, 16))), grid)
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("images", "labels"):
        (data / name).mkdir(parents=True)
    (run / "validation").mkdir(parents=True)
    for i in range(3):
        write_image(data / "images" / f"c{i}.nii.gz", Volume(np.zeros((1, *SHAPE)), grid))
        write_label(data / "labels" / f"c{i}.nii.gz", truth)
        write_label(run / "validation" / f"c{i}.nii.gz", made)
    cases = {case.case_id: case for case in find_cases(data).cases}
    console = Console(record=True, width=200)
    chosen = postprocess_run(run, [run / "validation"], cases, labels, console)
    assert chosen.steps == (ALL_FOREGROUND,) and PostProcessing.read(run, labels).steps == chosen.steps
    assert "only the largest component stays of: all foreground together" in console.export_text()
    (run / "validation" / "c1.nii.gz").unlink()
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING: 1 validation case\(s\) have no prediction.*c1"):
        postprocess_run(run, [run / "validation"], cases, labels, console)


def test_a_run_that_goes_on_keeps_nothing_of_its_former_end(tiny_run, tmp_path: Path) -> None:
    """Post-processing that was decided for other weights, pictures of cases that are not the worst any more."""
    from medseg.config import resumed
    from medseg.training.train import train

    run = tmp_path / "runs" / "run"
    shutil.copytree(tiny_run.run, run)
    stale = run / "validation" / "overlays" / "worst_somebody.png"
    stale.write_bytes(b"old")
    assert (run / POSTPROCESSING_FILE).is_file()
    with (tmp_path / "log.txt").open("w", encoding="utf-8") as log:
        train(resumed(run, ["trainer.postprocess=off"]), run, Console(file=log))
    assert not (run / POSTPROCESSING_FILE).exists() and not (run / "postprocessing.md").exists()
    assert not stale.exists() and any(stale.parent.iterdir())
    for label in (run / "validation").glob("*.nii.gz"):
        names = names_in(nibabel.load(label).header.extensions[0].content)
        table = json.loads((run / "validation" / "predictions.json").read_text())["labels"]
        assert names == {value: name for name, value in table.items() if value}


def test_training_decides_and_predict_does_it(tiny_run, tmp_path: Path) -> None:
    """What ten steps of training predict is full of specks."""
    content = json.loads((tiny_run.run / POSTPROCESSING_FILE).read_text())
    assert content["num_cases"] == 2 and len(content["trials"]) == 6
    metrics = json.loads((tiny_run.run / "validation" / "metrics.json").read_text())
    for name in ("liver", ALL_FOREGROUND):
        expected = metrics["summary"][name]["metrics"]["dice"]["mean"]
        assert content["dice"][name]["before"] == pytest.approx(expected)
    assert (tiny_run.run / "postprocessing.md").is_file()
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run, run, ignore=shutil.ignore_patterns("tensorboard", "validation"))
    PostProcessing((ALL_FOREGROUND,)).write(run)
    from medseg.formats import open_volume

    scan = open_volume(sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[0])
    done = Ensemble.from_run(run, device="cpu").predict_indices(scan).array
    plain = Ensemble.from_run(run, device="cpu", postprocess=False).predict_indices(scan).array
    _, num_before = ndimage.label(plain > 0, np.ones((3, 3, 3)))
    _, num_after = ndimage.label(done > 0, np.ones((3, 3, 3)))
    assert num_before > 1 and num_after == 1
    assert ((done == plain) | (done == 0)).all()
