"""The computed data set: the same from one seed, different from case to case, and in its place in space as DICOM."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.errors import Code, MedsegError
from medseg.formats import open_label, open_volume
from medseg.phantom import PhantomData, make_phantom, write_dicom_series, write_phantoms
from medseg.phantom_anatomy import LABELS
from medseg.volume import Grid, Volume

NUM_TRAIN = 7
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PhantomData:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), num_train=NUM_TRAIN, seed=3, size=0.5)


def oblique_volume(orientation: str = "LPS") -> Volume:
    """Every voxel has another value; three sizes, three spacings, turned about all axes."""
    turn = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.7, 1.1, 2.5)
    affine[:3, 3] = (31.25, -47.5, 12.125)
    array = np.arange(4 * 6 * 5, dtype=np.int16).reshape(1, 4, 6, 5) * 7 - 400
    return Volume(array, Grid((4, 6, 5), affine)).reoriented(orientation)


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (make_phantom(seed, 1, size=0.5) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert a.array.tobytes() == b.array.tobytes()
        assert a.grid.affine.tobytes() == b.grid.affine.tobytes()
    assert first[0].array.tobytes() != other[0].array.tobytes()


def test_cases_differ_in_size_spacing_direction_and_body() -> None:
    cases = [make_phantom(0, number) for number in range(1, 5)]
    grids = [image.grid for image, _ in cases]
    assert len({grid.shape for grid in grids}) > 1
    assert len({grid.spacing_mm for grid in grids}) == 4
    assert len({grid.direction.tobytes() for grid in grids}) == 4
    volumes_ml = [
        np.bincount(label.array.ravel(), minlength=6)[1:] * abs(np.linalg.det(label.grid.affine[:3, :3])) / 1000
        for _, label in cases
    ]
    assert (np.ptp(volumes_ml, axis=0) > 0.05 * np.mean(volumes_ml, axis=0)).all()
    for grid in grids:
        assert grid.orientation == "RAS"
        assert all(low <= n <= high for n, (low, high) in zip(grid.shape, ((64, 84), (56, 72), (28, 40)), strict=True))
        assert grid.spacing_mm[2] > 1.5 * grid.spacing_mm[0]
        assert np.abs(grid.direction - np.eye(3)).max() > 0.01, "the axes must not be those of the world"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_organs_lie_where_a_radiologist_looks_for_them(number: int) -> None:
    """RAS: the liver to the right, the spleen to the left, the spine at the back, the aorta left in front of it."""
    _, label = make_phantom(0, number)
    centre = {
        name: label.grid.to_world(np.argwhere(label.array == index)).mean(axis=0)
        for index, name in enumerate(LABELS.names)
    }
    right, front = 0, 1
    assert centre["liver"][right] > centre["spine"][right] + 10
    assert centre["spleen"][right] < centre["spine"][right] - 15
    assert centre["aorta"][right] < centre["spine"][right]
    assert min(centre[name][front] for name in LABELS.foreground if name != "spine") > centre["spine"][front]


def test_no_threshold_separates_the_organs() -> None:
    image, label = make_phantom(0, 1)
    liver, spleen = (image.array[0][label.array == LABELS.names.index(name)] for name in ("liver", "spleen"))
    assert abs(np.median(liver) - np.median(spleen)) < 20
    outside = image.array[0][label.array == 0]
    low, high = np.percentile(np.concatenate([liver, spleen]), (5, 95))
    assert ((outside > low) & (outside < high)).sum() > spleen.size, "other tissue looks the same"


def test_orientation_permutes_the_same_case() -> None:
    image, label = make_phantom(0, 1, size=0.5)
    turned, turned_label = make_phantom(0, 1, size=0.5, orientation="SPL")
    assert turned.grid.orientation == turned_label.grid.orientation == "SPL"
    index = np.argwhere(label.array == 3)[0]
    there = np.rint(turned.grid.to_index(label.grid.to_world(index))).astype(int)
    assert turned_label.array[tuple(there)] == 3
    assert turned.array[0][tuple(there)] == image.array[0][tuple(index)]


def test_training_set_has_the_layout_of_nnunet(written: PhantomData) -> None:
    description = json.loads((written.train / "dataset.json").read_text())
    assert description["numTraining"] == NUM_TRAIN
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5}
    assert description["channel_names"] == {"0": "CT"}
    images = sorted((written.train / "imagesTr").iterdir())
    labels = sorted((written.train / "labelsTr").iterdir())
    assert len(images) == NUM_TRAIN
    assert [p.name.replace("_0000", "") for p in images] == [p.name for p in labels]
    orientations = set()
    for image_path, label_path in zip(images, labels, strict=True):
        image, label = nib.load(image_path), nib.load(label_path)
        assert np.allclose(image.affine, label.affine, atol=1e-4)
        assert set(np.unique(np.asarray(label.dataobj))) == set(range(6)), "every case holds every class"
        orientations.add("".join(nib.aff2axcodes(image.affine)))
    assert len(orientations) >= 5


def test_held_out_series_and_reference_share_their_grid(written: PhantomData) -> None:
    (case,) = written.test_cases
    image = open_volume(written.test / case)
    label = open_label(written.test_labels / f"{case}.nii.gz")
    assert image.grid.difference(label.grid) is None
    assert image.modality == "CT"
    true_image, true_label = make_phantom(3, NUM_TRAIN + 1, size=0.5, orientation="LPS")
    assert image.grid.difference(true_image.grid) is None
    np.testing.assert_array_equal(image.array, true_image.array)
    np.testing.assert_array_equal(label.array, true_label.array)


def test_training_cases_read_back(written: PhantomData) -> None:
    image = open_volume(written.train / "imagesTr" / "phantom_003_0000.nii.gz")
    label = open_label(written.train / "labelsTr" / "phantom_003.nii.gz")
    orientation = image.grid.orientation
    true_image, true_label = make_phantom(3, 3, size=0.5, orientation=orientation)
    assert image.grid.difference(true_image.grid) is None
    np.testing.assert_array_equal(image.array, true_image.array)
    np.testing.assert_array_equal(label.array, true_label.array)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_dicom_slices_put_voxels_where_the_standard_says(tmp_path: Path, modality: str) -> None:
    """Equation C.7.6.2.1-1 of PS3.3 by hand, for every voxel of every slice."""
    volume = oblique_volume()
    paths = write_dicom_series(tmp_path, volume, modality=modality)
    assert len(paths) == volume.grid.shape[2]
    for k, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        position, orientation = (
            np.array(value, dtype=float) for value in (dataset.ImagePositionPatient, dataset.ImageOrientationPatient)
        )
        between_rows, between_columns = (float(s) for s in dataset.PixelSpacing)
        rows, columns = np.meshgrid(np.arange(dataset.Rows), np.arange(dataset.Columns), indexing="ij")
        lps = (
            position
            + orientation[:3] * between_columns * columns[..., None]
            + orientation[3:] * between_rows * rows[..., None]
        )
        index = volume.grid.to_index(lps * (-1, -1, 1))
        np.testing.assert_allclose(index, np.rint(index), atol=1e-6)
        i, j, slices = np.moveaxis(np.rint(index).astype(int), -1, 0)
        assert (slices == k).all()
        values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        assert dataset.pixel_array.dtype == np.int16
        np.testing.assert_allclose(values, volume.array[0][i, j, k], atol=0.02 if modality == "MR" else 1e-9)


@pytest.mark.parametrize("orientation", ["LPS", "PSL", "SLP", "RAS"])
def test_dicom_series_agrees_with_highdicom(tmp_path: Path, orientation: str) -> None:
    volume = oblique_volume(orientation)
    paths = write_dicom_series(tmp_path, volume)
    theirs = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    to_theirs = np.linalg.inv(LPS_TO_RAS @ theirs.affine) @ volume.grid.affine
    np.testing.assert_allclose(to_theirs, np.rint(to_theirs), atol=1e-6)
    for index in ((0, 0, 0), (1, 2, 3), tuple(n - 1 for n in volume.grid.shape)):
        there = np.rint(to_theirs @ (*index, 1)).astype(int)[:3]
        assert theirs.array[tuple(there)] == volume.array[0][index]


def test_dicom_uids_follow_the_seed(tmp_path: Path) -> None:
    def uids(folder: str, uid_seed: str, patient_id: str = "a") -> tuple[set[str], set[str]]:
        paths = write_dicom_series(tmp_path / folder, oblique_volume(), uid_seed=uid_seed, patient_id=patient_id)
        datasets = [pydicom.dcmread(path) for path in paths]
        return {d.SeriesInstanceUID for d in datasets}, {d.SOPInstanceUID for d in datasets}

    series, instances = uids("one", "1")
    assert len(series) == 1
    assert len(instances) == oblique_volume().grid.shape[2]
    assert all(pydicom.uid.UID(uid).is_valid for uid in series | instances)
    assert uids("again", "1") == (series, instances)
    for other in (uids("other", "2"), uids("patient", "1", patient_id="b")):
        assert not (other[0] & series or other[1] & instances)


def test_dicom_names_nobody(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_dicom_series(tmp_path, oblique_volume(), series_uid="1.2.3")[0])
    assert str(dataset.PatientName) == "PHANTOM^DEMO"
    assert dataset.SeriesInstanceUID == "1.2.3"
    assert dataset.SOPClassUID == pydicom.uid.CTImageStorage


def test_dicom_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    volume = oblique_volume()
    too_bright = dataclasses.replace(volume, array=np.full(volume.array.shape, 40000, dtype=np.int32))
    unknown = dataclasses.replace(volume, array=np.full(volume.array.shape, np.nan, dtype=np.float32))
    two_channels = dataclasses.replace(volume, array=np.concatenate([volume.array, volume.array]))
    for wrong, modality, code in (
        (too_bright, "CT", Code.OUTPUT),
        (unknown, "CT", Code.OUTPUT),
        (two_channels, "CT", Code.CHANNELS),
        (volume, "US", Code.UNSUPPORTED),
    ):
        with pytest.raises(MedsegError) as caught:
            write_dicom_series(tmp_path / "none", wrong, modality=modality)
        assert caught.value.code == code
    assert not (tmp_path / "none").exists()


def test_progress_counts_all_cases(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_phantoms(tmp_path, num_train=2, size=0.3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
