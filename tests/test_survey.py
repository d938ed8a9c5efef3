from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.data import survey as module
from medseg.data.cases import find_cases
from medseg.data.facts import Survey
from medseg.data.summary import summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.labels import Labels

SHAPE = (6, 5, 4)
LPS = np.diag([-2.0, -3.0, 4.0, 1.0])


def volume(root: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray = LPS) -> None:
    for folder, array in (("images", image), ("labels", label)):
        (root / folder).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), root / folder / f"{name}.nii.gz")


def picture(root: Path, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for folder, array in (("images", image), ("labels", label)):
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(array).save(root / folder / f"{name}.png")


def scan(*values: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """An image that is 10 times its label, and a label with one voxel of each value."""
    label = np.zeros(shape, dtype=np.int16)
    label.ravel()[: len(values)] = values
    return (label * 10.0).astype(np.float32), label


def look(root: Path, declared: dict[str, Any] | None = None, **options: Any) -> Survey:
    return survey(find_cases(root), declared, num_threads=2, **options)


def refused(code: Code, root: Path, declared: dict[str, Any] | None = None, **options: Any) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        look(root, declared, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def test_facts_of_each_case(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1, 1, 2))
    volume(tmp_path, "b", *scan(1, shape=(4, 9, 4)), affine=np.diag([-2.0, -3.0, 2.0, 1.0]))
    volume(tmp_path, "c", *scan(2, shape=(6, 7, 8)))
    found = look(tmp_path)
    a, b, _ = found.cases
    assert [case.case_id for case in found.cases] == ["a", "b", "c"]
    assert (a.shape, a.spacing_mm, a.orientation, a.modality) == (SHAPE, (2, 3, 4), "LPS", None)
    assert (a.label_voxels, b.label_voxels) == ((117, 2, 1), (143, 1, 0))
    assert (found.spatial_dims, found.num_channels, found.channel_names) == (3, 1, ("channel 0",))
    assert found.labels == Labels(("background", "class_1", "class_2"), ((0,), (1,), (2,)))
    assert found.labels_from == "values found"
    # axes of the model: superior, posterior, left
    assert found.median_shape == (4, 7, 6)
    assert found.median_spacing_mm == (4, 3, 2)


def test_intensities_are_of_the_foreground(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(-1000, 1, (12, 12, 12)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[2:8, 2:8, 2:8] = 1
    inside = np.linspace(0, 100, 216, dtype=np.float32)
    image[label == 1] = inside
    volume(tmp_path, "a", image, label)
    (stats,) = look(tmp_path).cases[0].intensity
    assert stats.num_foreground == 216
    assert (stats.mean, stats.std) == pytest.approx((inside.mean(), inside.std()), rel=1e-5)
    assert (stats.p00_5, stats.p50, stats.p99_5) == pytest.approx(np.percentile(inside, (0.5, 50, 99.5)), rel=1e-5)
    assert (stats.minimum, stats.maximum) == pytest.approx((image.min(), 100))


def test_an_empty_label_is_counted_and_left_out_of_the_pooled_statistics(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(3, 3))
    volume(tmp_path, "empty", np.full(SHAPE, 7, np.float32), np.zeros(SHAPE, np.uint8))
    found = look(tmp_path)
    empty = found.cases[1]
    assert empty.label_voxels == (120, 0)
    assert (empty.intensity[0].num_foreground, empty.intensity[0].mean) == (0, 7)
    assert (found.intensity[0].mean, found.intensity[0].num_foreground) == (30, 2)
    assert (found.intensity[0].minimum, found.intensity[0].maximum) == (0, 30)


def test_the_sample_is_bounded_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.arange(8000, dtype=np.float32).reshape(20, 20, 20)
    volume(tmp_path, "a", image, np.ones(image.shape, np.uint8))
    whole = look(tmp_path).cases[0].intensity[0]
    assert whole.mean == pytest.approx(3999.5)
    monkeypatch.setattr(module, "SAMPLE_VOXELS", 500)
    first, second = (look(tmp_path).cases[0].intensity[0] for _ in range(2))
    assert first == second
    assert first.mean != whole.mean
    assert first.mean == pytest.approx(whole.mean, rel=0.1)
    assert (first.maximum, first.num_foreground) == (7999, 8000)


def test_a_background_that_is_not_zero(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(5, 5, 5))
    (case,) = look(tmp_path, {"background": 5, "inner": 0}).cases
    assert case.label_voxels == (3, 117)
    assert case.intensity[0].num_foreground == 117


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((255,), ("background", "foreground")),
        ((1,), ("background", "class_1")),
        ((4, 2), ("background", "class_2", "class_4")),
    ],
)
def test_names_of_undeclared_values(tmp_path: Path, values: tuple[int, ...], names: tuple[str, ...]) -> None:
    volume(tmp_path, "a", *scan(*values))
    assert look(tmp_path).labels.names == names


def test_declared_names_win_over_the_data_set_and_these_over_values(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1, 2))
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}})
    )
    found = look(tmp_path)
    assert (found.labels.foreground, found.labels_from) == (("liver", "spleen"), "dataset")
    assert found.channel_names == ("CT",)
    assert found.cases[0].modality == "CT"
    found = look(tmp_path, {"both": [1, 2]})
    assert (found.labels.foreground, found.labels_from) == (("both",), "data.labels")
    assert found.cases[0].label_voxels == (118, 2)


def test_regions_and_ignored_voxels_of_a_dataset_json(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1, 2, 2, 3))
    labels = {"background": 0, "a": [1, 2], "b": 2, "ignore": 3}
    table = {"channel_names": {"0": "T1"}, "labels": labels, "regions_class_order": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    found = look(tmp_path)
    assert found.labels.foreground == ("a", "b") and found.labels_from == "dataset"
    assert found.cases[0].label_voxels[1:] == (1, 2) and found.cases[0].ignored_voxels == 1
    assert found.cases[0].intensity[0].num_foreground == 3
    assert look(tmp_path, {"a": 1, "b": [2, 3]}).labels.regions == ()


def test_a_map_of_objects_asks_for_rest(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(*range(1, 70)))
    assert "rest" in str(refused(Code.LABEL, tmp_path).remedy)
    found = look(tmp_path, {"object": "rest"})
    assert found.cases[0].label_voxels == (51, 69)
    assert found.cases[0].intensity[0].num_foreground == 69


def test_negative_and_absent_classes(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(-1, 1))
    assert "negative" in refused(Code.LABEL, tmp_path).message
    volume(tmp_path, "a", *scan())
    refused(Code.LABEL, tmp_path)
    assert "no case has a voxel" in refused(Code.LABEL, tmp_path, {"x": 1}).message


def test_one_problem_comes_as_itself(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1))
    image, label = scan(1)
    volume(tmp_path, "b", image, label + np.float32(0.5))
    error = refused(Code.LABEL, tmp_path)
    assert (error.where, "1.5" in str(error.got)) == ("b", True)
    assert str(error.remedy).endswith("train without this case: data.on_bad_case=skip")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    image, label = scan(1)
    for n in range(23):
        volume(tmp_path, f"bad{n:02d}", image, label[:, :, 1:] if n else label * 7)
    volume(tmp_path, "good", image, label)
    error = refused(Code.LABEL, tmp_path, {"x": 1})
    assert "23 of 24 cases" in error.message
    text = str(error)
    assert "bad00: E_LABEL" in text
    assert "bad19: E_GRID" in text
    assert "bad20" not in text
    assert "and 3 more" in text
    assert str(error.remedy).endswith("train without these cases: data.on_bad_case=skip")


def test_bad_cases_can_be_left_out(tmp_path: Path) -> None:
    image, label = scan(1)
    volume(tmp_path, "bad", image, label[:, :, 1:])
    volume(tmp_path, "good", image, label)
    found = look(tmp_path, on_bad_case="skip")
    assert [case.case_id for case in found.cases] == ["good"]
    assert [(p.case_id, p.code) for p in found.quarantine] == [("bad", "E_GRID")]
    assert any("left out" in line and "bad" in line for line in summary_lines(found))
    volume(tmp_path, "good", image, label[:, :, 1:])
    assert "on_bad_case" not in str(refused(Code.GRID, tmp_path, on_bad_case="skip").remedy)
    assert "on_bad_case" not in str(refused(Code.GRID, tmp_path).remedy)  # nothing would be left


def test_pictures_beside_volumes_are_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        volume(tmp_path, name, *scan(1))
    picture(tmp_path, "p", np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8))
    assert refused(Code.MIXED, tmp_path).where == "p"


def test_colour_beside_grey(tmp_path: Path) -> None:
    grey, label = np.zeros((8, 7), np.uint8), np.zeros((8, 7), np.uint8)
    label[0] = 1
    for name in ("a", "b"):
        picture(tmp_path, name, np.stack([grey, grey + 1, grey + 2], axis=-1), label)
    found = look(tmp_path)
    assert (found.num_channels, found.spatial_dims, found.median_shape) == (3, 2, (8, 7))
    assert [s.mean for s in found.cases[0].intensity] == [0, 1, 2]
    picture(tmp_path, "c", grey, label)
    error = refused(Code.CHANNELS, tmp_path)
    assert (error.where, error.got) == ("c", "c: 1")


def test_a_volume_of_one_slice_is_3d(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1, shape=(6, 5, 1)))
    found = look(tmp_path)
    assert (found.spatial_dims, found.cases[0].shape) == (3, (6, 5, 1))


def test_progress_threads_and_errors_that_are_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        volume(tmp_path, name, *scan(1))
    steps: list[tuple[int, int]] = []
    look(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]

    def broken(*args: object, **kwargs: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise ZeroDivisionError

    monkeypatch.setattr(module, "load_image", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        look(tmp_path)
    assert "while reading case" in caught.value.__notes__[0]


def test_summary_and_json(tmp_path: Path) -> None:
    volume(tmp_path, "a", *scan(1, 1, 2))
    volume(tmp_path, "b", *scan(1, shape=(6, 7, 4)))
    found = look(tmp_path, {"tumour": 1, "core": 2, "never": 9})
    text = "\n".join(summary_lines(found))
    assert "2, 3D" in text
    assert "min 6 × 5 × 4, median 6 × 6 × 4, max 6 × 7 × 4" in text
    assert "2 × 3 × 4 mm" in text
    (tumour,) = (line for line in summary_lines(found) if "tumour" in line)
    assert tumour.split()[:4] == ["1", "tumour", "value", "1"]
    assert f"{100 * 3 / (120 + 168):.3g} % of voxels, in 2 of 2 cases" in tumour
    assert any("never" in line and "in 0 of 2 cases" in line for line in summary_lines(found))
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert table["labels"] == {"background": 0, "tumour": 1, "core": 2, "never": 9}
    assert table["cases"][1]["shape"] == [6, 7, 4]
    assert table["cases"][0]["intensity"][0]["mean"] == pytest.approx(40 / 3)


def test_no_paths_in_what_is_written_down_or_said(tmp_path: Path) -> None:
    root = tmp_path / "Jane Doe"
    root.mkdir()
    volume(root, "a", *scan(1))
    found = look(root)
    image, label = scan(1)
    volume(root, "a", image, label[:, :, 1:])
    written = json.dumps(found.to_json()) + "".join(summary_lines(found)) + str(refused(Code.GRID, root))
    assert "Jane" not in written


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "declared", "channels", "dims", "names"),
    [
        ("sts_mr", None, 1, 3, ("background", "class_1")),
        ("isbi2012_em", None, 1, 2, ("background", "foreground")),
        ("drive/training", None, 3, 2, ("background", "foreground")),
        ("dsb2018", {"nucleus": "rest"}, 3, 2, ("background", "nucleus")),
    ],
)
def test_real_folders(
    real_data: Path, name: str, declared: dict[str, Any] | None, channels: int, dims: int, names: tuple[str, ...]
) -> None:
    found = look(real_data / "segmentation" / name, declared)
    assert (found.num_channels, found.spatial_dims, found.labels.names) == (channels, dims, names)
