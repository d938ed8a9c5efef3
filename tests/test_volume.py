from __future__ import annotations

import numpy as np
import pytest

from medseg.errors import Code, MedsegError
from medseg.label_values import integer_values, smallest_integer_type
from medseg.labels import Labels
from medseg.volume import Grid, Volume


def oblique_affine(spacing: tuple[float, float, float] = (0.7, 1.3, 4.1)) -> np.ndarray:
    """A rotation about all three axes, a left-handed axis, three spacings and an odd origin."""
    a, b, c = np.deg2rad([17.0, -23.0, 8.0])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rx @ ry @ rz @ np.diag([-spacing[0], spacing[1], spacing[2]])
    affine[:3, 3] = 13.7, -41.2, 99.9
    return affine


SHAPE = (3, 5, 7)


def test_spacing_and_direction_stand_in_array_order() -> None:
    grid = Grid(SHAPE, oblique_affine())
    np.testing.assert_allclose(grid.spacing_mm, (0.7, 1.3, 4.1))
    assert grid.orientation == "LAS"
    np.testing.assert_allclose(grid.direction * grid.spacing_mm, grid.affine[:3, :3])


def test_world_and_index_are_inverse_and_follow_the_affine() -> None:
    grid = Grid(SHAPE, oblique_affine())
    index = np.array([[0, 0, 0], [2, 4, 6], [1.25, 3.5, 0.1]])
    np.testing.assert_allclose(grid.to_world([0, 0, 0]), (13.7, -41.2, 99.9))
    np.testing.assert_allclose(grid.to_world([1, 0, 0]) - grid.to_world([0, 0, 0]), grid.affine[:3, 0])
    np.testing.assert_allclose(grid.to_index(grid.to_world(index)), index, atol=1e-12)
    assert grid.corners().shape == (8, 3)


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "PIR", "ASL", "LPS"])
def test_reoriented_keeps_every_voxel_in_its_place(orientation: str) -> None:
    grid = Grid(SHAPE, oblique_affine())
    # each voxel carries its own world coordinates, so array and affine must move together
    world = grid.to_world(np.stack(np.indices(SHAPE), axis=-1))
    volume = Volume(np.moveaxis(world, -1, 0), grid)
    turned = volume.reoriented(orientation)
    assert turned.grid.orientation == orientation
    expected = turned.grid.to_world(np.stack(np.indices(turned.grid.shape), axis=-1))
    np.testing.assert_allclose(np.moveaxis(turned.array, 0, -1), expected, atol=1e-9)
    back = turned.oriented_as(grid)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_array_equal(back.grid.affine, grid.affine)


def test_model_order_has_slices_first_and_rows_downwards() -> None:
    grid = Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]))  # RAS
    turned = Volume(np.arange(120).reshape(4, 5, 6), grid).reoriented()
    assert turned.grid.shape == (6, 5, 4)
    assert turned.array[0, 0, 0] == np.arange(120).reshape(4, 5, 6)[3, 4, 0]  # right, anterior, inferior corner


def test_oriented_as_refuses_another_place() -> None:
    grid = Grid(SHAPE, oblique_affine())
    shifted = oblique_affine()
    shifted[0, 3] += 5
    with pytest.raises(MedsegError, match=r"origin shifted by \(5, 0, 0\) mm") as caught:
        Volume(np.zeros(SHAPE), grid).oriented_as(Grid(SHAPE, shifted))
    assert caught.value.code is Code.GRID


def test_pictures_are_not_turned() -> None:
    volume = Volume(np.arange(6).reshape(1, 2, 3), Grid.of_picture((2, 3)))
    np.testing.assert_array_equal(volume.reoriented().array, volume.array)
    assert volume.grid.orientation == ""


def test_difference_in_words() -> None:
    grid = Grid(SHAPE, oblique_affine())
    assert grid.difference(Grid(SHAPE, oblique_affine().astype(np.float32))) is None
    assert grid.difference(Grid((3, 5, 8), oblique_affine())) == "shape (3, 5, 7) against (3, 5, 8)"
    assert "frame RAS against pixel" in str(grid.difference(Grid.of_picture((3, 5))))
    assert "spacing (0.7, 1.3, 4.1) against (0.7, 1.3, 4.5) mm" in str(
        grid.difference(Grid(SHAPE, oblique_affine((0.7, 1.3, 4.5))))
    )
    mirrored = oblique_affine()
    mirrored[:3, 0] *= -1
    assert "orientation LAS against RAS" in str(grid.difference(Grid(SHAPE, mirrored)))


def test_resampled_keeps_the_outer_edges() -> None:
    grid = Grid((4, 6, 8), oblique_affine())
    finer = grid.resampled((8, 6, 4))
    np.testing.assert_allclose(finer.spacing_mm, (0.35, 1.3, 8.2))
    np.testing.assert_allclose(finer.to_world([-0.5, -0.5, -0.5]), grid.to_world([-0.5, -0.5, -0.5]))
    np.testing.assert_allclose(finer.to_world([7.5, 5.5, 3.5]), grid.to_world([3.5, 5.5, 7.5]))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a: a.__setitem__((slice(0, 3), 1), 0), Code.AFFINE),
        (lambda a: a.__setitem__((0, 0), np.nan), Code.AFFINE),
        (lambda a: a.__setitem__((slice(0, 3), 2), a[:3, 2] + 0.2 * a[:3, 0]), Code.SHEAR),
    ],
)
def test_untrustworthy_affines_are_refused(change, code: Code) -> None:
    affine = oblique_affine()
    change(affine)
    with pytest.raises(MedsegError) as caught:
        Grid(SHAPE, affine)
    assert caught.value.code is code


def test_array_must_fit_its_grid() -> None:
    with pytest.raises(MedsegError) as caught:
        Volume(np.zeros((7, 5, 3)), Grid(SHAPE, np.eye(4)))
    assert caught.value.code is Code.GRID


def test_labels_map_values_to_indices_and_back() -> None:
    labels = Labels.from_mapping({"edema": [2, 5], "core": 4})
    assert labels.names == ("background", "edema", "core")
    array = np.array([[0, 2, 4], [5, 0, 4]], dtype=np.float32)
    np.testing.assert_array_equal(labels.to_index(array), [[0, 1, 2], [1, 0, 2]])
    np.testing.assert_array_equal(labels.to_values(np.array([0, 1, 2])), [0, 2, 4])
    assert Labels.from_mapping(labels.to_json()) == labels
    with pytest.raises(MedsegError, match=r"ids \[-1, 3\]") as caught:
        labels.to_index(np.array([0, 3, -1]))
    assert caught.value.code is Code.LABEL


def test_rest_takes_every_other_value() -> None:
    labels = Labels.from_mapping({"nucleus": "rest"})
    np.testing.assert_array_equal(labels.to_index(np.array([0, 7, 300])), [0, 1, 1])
    np.testing.assert_array_equal(labels.to_values(np.array([0, 1])), [0, 1])


def test_membrane_named_background_with_another_value() -> None:
    labels = Labels.from_mapping({"background": 255, "membrane": 0})
    np.testing.assert_array_equal(labels.to_index(np.array([255, 0])), [0, 1])


def test_nearly_integers_are_rounded_and_others_refused() -> None:
    np.testing.assert_array_equal(integer_values(np.array([1.0000001, 1.9995])), [1, 2])
    for wrong in (0.5, np.nan, np.inf):
        with pytest.raises(MedsegError) as caught:
            integer_values(np.array([0.0, wrong]))
        assert caught.value.code is Code.LABEL


@pytest.mark.parametrize(
    ("values", "name"),
    [([0, 255], "uint8"), ([-1, 5], "int8"), ([0, 256], "uint16"), ([-1, 200], "int16"), ([0, 2**33], "int64")],
)
def test_smallest_integer_type(values: list[int], name: str) -> None:
    assert smallest_integer_type(np.array(values)) == np.dtype(name)


def test_the_rest_is_written_as_a_value_of_its_own() -> None:
    labels = Labels.from_mapping({"background": 0, "nucleus": "rest", "border": 1})
    assert labels.written_values() == (0, 2, 1)
    indices = labels.to_index(np.array([0, 1, 7, 300]))
    assert indices.tolist() == [0, labels.names.index("border"), labels.names.index("nucleus"), 1]
    assert np.array_equal(labels.to_index(labels.to_values(indices)), indices)
