"""What a notebook shows of a case to scroll through: the layers of the viewer, and the figures in its place."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medseg.labels import IGNORE_INDEX, Labels
from medseg.reports import viewer
from medseg.reports.browse import ValidationCase
from medseg.volume import Grid, Volume

AFFINE = np.array([[-0.8, 0, 0, 30], [0, 0.9, 0, -20], [0, 0, 2.5, 11], [0, 0, 0, 1.0]])
SHAPE = (10, 12, 6)


@pytest.fixture
def case() -> ValidationCase:
    """A liver (file value 7) that is found too far to one side, and a spleen (9) that is taken for it in one voxel."""
    labels = Labels.from_mapping({"background": 0, "liver": 7, "spleen": 9})
    grid = Grid(SHAPE, AFFINE)
    reference, predicted = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[2:5, 2:8, 1:4], predicted[3:6, 2:8, 1:4] = 7, 7
    reference[8, 8:10, 4] = predicted[8, 8:10, 4] = 9
    predicted[8, 8, 4] = 7
    image = np.random.default_rng(0).integers(-200, 300, (1, *SHAPE)).astype(np.int16)
    return ValidationCase(
        "case", Volume(image, grid, modality="CT"), Volume(reference, grid), Volume(predicted, grid), labels
    )


def opened(layer: dict) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(layer["data"])


def test_errors_by_kind(case: ValidationCase) -> None:
    errors = viewer.error_map(case)
    assert np.bincount(errors.ravel()).tolist()[1:] == [18, 18, 1]  # too much, missed, other class
    assert (errors[5, 2:8, 1:4] == 1).all() and (errors[2, 2:8, 1:4] == 2).all() and errors[8, 8, 4] == 3


def test_a_prediction_with_flipped_axes_is_turned(case: ValidationCase) -> None:
    flipped = case.predicted.reoriented("RAS")
    assert not np.array_equal(flipped.grid.affine, AFFINE)
    turned = ValidationCase("case", case.image, case.reference, flipped, case.labels)
    assert np.array_equal(viewer.error_map(turned), viewer.error_map(case))


def test_layers_are_the_case_where_it_lies(case: ValidationCase) -> None:
    uncertainty = Volume(np.linspace(0, 1, np.prod(SHAPE), dtype=np.float16).reshape(SHAPE), case.image.grid)
    layers = {layer["name"].removesuffix(".nii"): layer for layer in viewer.viewer_layers(case, uncertainty)}
    assert list(layers) == ["image", "reference", "prediction", "errors", "uncertainty"]
    for layer in layers.values():
        assert np.allclose(opened(layer).affine, AFFINE)
    assert np.array_equal(np.asarray(opened(layers["image"]).dataobj), case.image.array[0])
    assert opened(layers["image"]).get_data_dtype() == np.int16
    assert set(np.unique(np.asarray(opened(layers["reference"]).dataobj))) == {0, 1, 2}  # classes, not file values
    assert np.array_equal(np.asarray(opened(layers["errors"]).dataobj), viewer.error_map(case))
    assert layers["reference"]["colours"]["labels"] == ["background", "liver", "spleen"]
    assert layers["reference"]["colours"]["A"] == [0, 255, 255]
    assert len(viewer.viewer_layers(case)) == 4


def test_large_volumes_are_thinned_and_stay_in_place(case: ValidationCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MAX_VOXELS", 100)
    image = opened(viewer.viewer_layers(case)[0])
    assert image.shape == (5, 6, 3)
    world = image.affine @ [4, 5, 2, 1]
    assert np.allclose(world, AFFINE @ [8, 10, 4, 1])


def test_what_is_ignored_is_no_error(case: ValidationCase) -> None:
    labels = Labels.from_mapping({"background": 0, "liver": 7, "spleen": 9, "ignore": 255})
    case.reference.array[5] = 255
    ignoring = ValidationCase("case", case.image, case.reference, case.predicted, labels)
    assert labels.to_index(case.reference.array)[5, 0, 0] == IGNORE_INDEX
    assert np.bincount(viewer.error_map(ignoring).ravel()).tolist()[1:] == [0, 18, 1]


def test_a_viewer_only_where_somebody_looks(case: ValidationCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in viewer.FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    assert not viewer.has_front_end() and viewer.case_viewer(case) is None
    pytest.importorskip("ipyniivue")
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert viewer.has_front_end()
    sliders, shown = viewer.case_viewer(case).children
    assert [widget.description for widget in sliders.children] == [
        "image", "reference", "prediction", "errors", "reload"
    ]  # fmt: skip
    sliders.children[3].value = 0.7
    assert list(shown.volumes) == []  # a front end without a canvas would not draw them
    shown.set_state({"_canvas_attached": True})
    first = list(shown.volumes)
    assert [volume.opacity for volume in first] == pytest.approx([1, 0, 0.45, 0.7])
    sliders.children[1].value = 0.4
    assert first[1].opacity == pytest.approx(0.4)
    sliders.children[4].click()
    again = list(shown.volumes)
    assert not {volume.id for volume in first} & {volume.id for volume in again}  # drawn twice, it loses its colours
    assert [volume.opacity for volume in again] == pytest.approx([1, 0.4, 0.45, 0.7])
    assert again[0].colormap_label is None
    assert again[2].colormap_label.labels == ["background", "liver", "spleen"]
    assert again[2].colormap_label.lut[:4] == [0, 0, 0, 0] and again[2].colormap_label.lut[7] == 255


def test_slices_of_uncertainty(case: ValidationCase) -> None:
    heat = np.zeros(SHAPE, np.float16)
    heat[..., 2] = 1
    figure = viewer.uncertainty_figure(case, Volume(heat, case.image.grid), [2, 4])
    shown = [[np.asarray(image.get_array()) for image in ax.images] for ax in figure.axes[:6]]
    assert shown[2][1].max() == shown[2][1].min() == 1 and shown[3][1].max() == 0
    assert (shown[4][1][..., 3] > 0).sum() == 12  # errors of the first slice: 6 too much, 6 missed
    assert (shown[5][1][..., 3] > 0).sum() == 1
