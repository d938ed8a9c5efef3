from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medseg.errors import Code, MedsegError
from medseg.formats.dicom import irregular
from medseg.formats.dicom.irregular import plan_grid

Float = NDArray[np.float64]

AIR, TISSUE = -1000.0, 900.0
ROWS, COLUMNS = 44, 36
SPACING = (0.9, 1.4)  # between rows, between columns
ORIGIN = np.array([31.0, -47.0, 113.0])
OBLIQUE = Rotation.from_euler("xyz", (23, -38, 71), degrees=True)
EVEN = [2.0] * 12
GAPS = [2.0, 2.0, 4.0, 2.0, 6.0, 2.0, 2.0, 2.0, 2.0]
UNEVEN = [2.1] * 5 + [1.1] + [3.4] * 4
SIGMA = 3.0


def regularised(
    array: NDArray[np.float32],
    positions: Float,
    orientation: Float,
    spacing: tuple[float, float],
    *,
    where: object = None,
) -> tuple[NDArray[np.float32], Float, str]:
    """What `series` does with an irregular stack: plan from the headers, then resample; array, LPS affine, note."""
    plan = plan_grid((array.shape[1], array.shape[2]), positions, orientation, spacing, where=where)
    return irregular.resampled(array, plan), plan.affine_lps, plan.note


class Series:
    """A scan of Gaussian blobs at known places of the world, as irregular as asked for."""

    def __init__(
        self,
        steps: list[float],
        *,
        tilt: tuple[float, float] = (0, 0),
        rotation: Rotation = OBLIQUE,
        spacing: tuple[float, float] = SPACING,
    ) -> None:
        along_row, down_column, normal = rotation.apply(np.eye(3))
        heights = np.concatenate([[0.0], np.cumsum(steps)])
        drift = np.tan(np.radians(tilt))  # mm along a row and down a column for each mm of height
        self.orientation = np.stack([along_row, down_column])
        self.normal = normal
        self.spacing = spacing
        self.positions: Float = ORIGIN + np.outer(heights, normal + drift @ self.orientation)
        rows = np.arange(ROWS)[:, None, None] * spacing[0] * down_column
        columns = np.arange(COLUMNS)[None, :, None] * spacing[1] * along_row
        self.world: Float = self.positions[:, None, None] + rows + columns
        middle = self.world[len(heights) // 2, ROWS // 2, COLUMNS // 2]
        self.blobs: Float = middle + np.array([[0, 0, 0], [-11, -9, -5], [8, 11, 4]]) @ np.stack(
            [along_row, down_column, normal]
        )
        self.array = self.sampled(self.world).astype(np.float32)

    def sampled(self, world: Float) -> Float:
        """The grey value at places of the world."""
        values = np.full(world.shape[:-1], AIR)
        for blob in self.blobs:
            values += TISSUE * np.exp(-((world - blob) ** 2).sum(-1) / (2 * SIGMA**2))
        return values

    def mended(self) -> tuple[NDArray[np.float32], Float, str]:
        return regularised(self.array, self.positions, self.orientation, self.spacing)


def places(shape: tuple[int, ...], affine: Float) -> Float:
    """World coordinates of the voxels of an array (slices, rows, columns)."""
    k, j, i = np.indices(shape)
    world: Float = np.stack([i, j, k], axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    return world


def errors_in_voxels(array: NDArray[np.float32], affine: Float, blobs: Float) -> Float:
    """How far the centroid of each blob lies from its place, along the axes of the array, in voxels."""
    world = places(array.shape, affine)
    distances = []
    for blob in blobs:
        weights = np.clip(array - AIR, 0, None) * (((world - blob) ** 2).sum(-1) < (2.4 * SIGMA) ** 2)
        centroid = (weights[..., None] * world).sum((0, 1, 2)) / weights.sum()
        distances.append(np.abs(np.linalg.solve(affine[:3, :3], centroid - blob)))
    return np.array(distances)


def assert_regular(series: Series, array: NDArray[np.float32], affine: Float) -> None:
    """A rectangular grid with the orientation and pixel spacing of the slices, from the first slice to the last."""
    assert array.dtype == np.float32
    np.testing.assert_allclose(affine[:3, 0], series.orientation[0] * series.spacing[1], atol=1e-9)
    np.testing.assert_allclose(affine[:3, 1], series.orientation[1] * series.spacing[0], atol=1e-9)
    np.testing.assert_allclose(np.cross(affine[:3, 2], series.normal), 0, atol=1e-9)
    assert affine[:3, 2] @ series.normal > 0
    heights = [(p - affine[:3, 3]) @ series.normal for p in series.positions]
    np.testing.assert_allclose(heights[0], 0, atol=1e-9)
    np.testing.assert_allclose(heights[-1], (len(array) - 1) * np.linalg.norm(affine[:3, 2]))


@pytest.mark.parametrize("tilt", [(0, 0), (0, 18.5), (0, -18.5), (12, 0), (-12, 0), (9, -14)])
@pytest.mark.parametrize("steps", [EVEN, GAPS, UNEVEN], ids=["even", "gaps", "uneven"])
def test_landmarks_stay_in_place(steps: list[float], tilt: tuple[float, float]) -> None:
    series = Series(steps, tilt=tilt)
    array, affine, note = series.mended()
    assert_regular(series, array, affine)
    assert errors_in_voxels(array, affine, series.blobs).max() < 0.2
    assert bool(note) == (steps != EVEN or tilt != (0, 0))
    assert pytest.approx(array.min(), abs=1e-3) == AIR
    assert array.max() <= series.array.max()


def test_tilt_ignored_would_be_seen() -> None:
    """The measure of these tests can fail: the same slices stacked as if they were not shifted."""
    series = Series(EVEN, tilt=(0, 18.5))
    _, affine, _ = Series(EVEN).mended()
    assert errors_in_voxels(series.array, affine, series.blobs).max() > 0.5


@settings(max_examples=60, deadline=None)
@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    tilt=st.tuples(*[st.floats(-20, 20)] * 2),
    steps=st.one_of(
        st.lists(st.floats(1.0, 3.5), min_size=8, max_size=12),
        st.lists(st.sampled_from([1.5, 3.0]), min_size=8, max_size=12),
    ),
    spacing=st.tuples(*[st.floats(0.8, 1.5)] * 2),
)
def test_landmarks_stay_in_place_in_any_series(
    turn: tuple[float, float, float],
    tilt: tuple[float, float],
    steps: list[float],
    spacing: tuple[float, float],
) -> None:
    series = Series(steps, tilt=tilt, rotation=Rotation.from_euler("xyz", turn, degrees=True), spacing=spacing)
    array, affine, _ = series.mended()
    assert_regular(series, array, affine)
    reached = [b for b in series.blobs if _well_inside(b, array.shape, affine, series)]
    if reached:
        assert errors_in_voxels(array, affine, np.array(reached)).max() < 0.5
    assert len(array) - 1 <= irregular.MAX_SLICES_GROWTH * len(steps)


def _well_inside(blob: Float, shape: tuple[int, ...], affine: Float, series: Series) -> bool:
    """True where all slices near a blob hold it whole."""
    radius = 2.4 * SIGMA
    near = [p for p in series.positions if abs((p - blob) @ series.normal) < radius + 3.5]
    corner = np.array([[(blob - p) @ axis for axis in series.orientation] for p in near])
    extent = np.array([(COLUMNS - 1) * series.spacing[1], (ROWS - 1) * series.spacing[0]])
    height = (blob - affine[:3, 3]) @ series.normal
    top = (shape[0] - 1) * np.linalg.norm(affine[:3, 2])
    return bool((corner > radius).all() and (corner < extent - radius).all() and radius < height < top - radius)


@pytest.mark.parametrize("tilt", [(0, 25), (0, -25)])
def test_grey_values_of_tilted_slices(tilt: tuple[float, float]) -> None:
    """The splines give what the scanner would have measured there, to a hundredth of the contrast. Not so at edges of a
    slice, where the phantom is cut through a blob: what the splines guess behind them fades by 4 with each pixel."""
    series = Series(EVEN, tilt=tilt)
    array, affine, _ = series.mended()
    truth = series.sampled(places(array.shape, affine))
    measured, within = np.zeros(array.shape, bool), np.zeros(array.shape, bool)
    plan = plan_grid((ROWS, COLUMNS), series.positions, series.orientation, series.spacing)
    for k, shift in enumerate(plan.shifts):
        row, column = np.floor(shift + 0.5).astype(int)
        measured[k, row : row + ROWS, column : column + COLUMNS] = True
        within[k, row + 2 : row + ROWS - 2, column + 2 : column + COLUMNS - 2] = True
    assert 0.6 < measured.mean() < 0.95
    assert np.abs(array - truth)[within].max() < 0.01 * TISSUE
    assert (array[~measured] == series.array.min()).all()


def test_a_regular_series_is_left_alone() -> None:
    series = Series(EVEN)
    array, affine, note = series.mended()
    np.testing.assert_array_equal(array, series.array)
    np.testing.assert_allclose(affine[:3, 3], ORIGIN)
    assert note == ""


def test_missing_slices_are_interpolated_and_the_others_kept() -> None:
    series = Series(GAPS)
    array, affine, note = series.mended()
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(2.0)
    kept = np.rint(np.concatenate([[0], np.cumsum(GAPS)]) / 2).astype(int)
    np.testing.assert_array_equal(array[kept], series.array)
    missing = sorted(set(range(len(array))) - set(kept))
    assert missing == [3, 6, 7]
    np.testing.assert_allclose(array[3], (array[2] + array[4]) / 2, rtol=1e-5)
    np.testing.assert_allclose(array[6], (2 * array[5] + array[8]) / 3, rtol=1e-5)
    assert note == "resampled: slice spacing from 2 to 6 mm made 2 mm, 3 of 13 slices interpolated"


def test_a_step_of_two_scans_that_overlap_is_not_followed() -> None:
    """A head of 4 and 7 mm slices, 1.08 mm apart where the two scans meet (as dcm_qa_ct)."""
    steps = [4.0019] * 13 + [1.0811] + [6.9986] * 13
    plan = plan_grid((ROWS, COLUMNS), Series(steps).positions, Series(steps).orientation, SPACING)
    assert plan.step_mm == pytest.approx(4.0, abs=0.01)
    assert plan.shape == (37, ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1.0] * 10 + [5.0] * 40, 1.05),  # a finely scanned part keeps its spacing, but for the bound of 4 times
        ([0.1, 4.9] * 10, 0.625),  # pairs of slices: bounded
        ([1.0, 1.02, 0.95, 1.05, 0.98], 1.0),  # jitter: as many slices as before
        ([5.0, 10.0, 5.0], 5.0),
        ([3.0], 3.0),
    ],
)
def test_spacing(steps: list[float], expected: float) -> None:
    series = Series(steps)
    plan = plan_grid((ROWS, COLUMNS), series.positions, series.orientation, SPACING)
    assert plan.step_mm == pytest.approx(expected)
    assert sum(steps) == pytest.approx(plan.step_mm * (plan.shape[0] - 1))


def test_nothing_is_blended_with_what_nobody_measured() -> None:
    """A bright slice on black corners: values between are those of no tissue."""
    series = Series(UNEVEN, tilt=(0, 20))
    series.array[:] = 100
    series.array[0, 0, 0] = AIR  # the filling
    array, _, _ = series.mended()
    values = np.unique(np.delete(array, 0, axis=0))
    np.testing.assert_allclose(values, [AIR, 100], rtol=1e-5)


def test_where_one_slice_reaches_the_nearer_one_decides() -> None:
    """Three slices, and after a gap a brighter one that lies 5 rows further."""
    positions = np.array([[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 5, 12]], dtype=float)
    array = np.repeat(np.array([AIR, 100, 100, 200], np.float32), 60).reshape(4, 10, 6)
    result, _, _ = regularised(array, positions, np.eye(3)[:2], (1.0, 1.0))
    assert result.shape == (7, 15, 6)
    np.testing.assert_array_equal(result[3:, 0, 0], [100, AIR, AIR, AIR])
    np.testing.assert_array_equal(result[3:, 7, 0], [125, 150, 175, 200])
    np.testing.assert_array_equal(result[3:, 14, 0], [AIR, 200, 200, 200])


@pytest.mark.parametrize("fraction", [-0.5, -0.3, 0.1, 0.49])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_are_moved_by_cubic_splines(fraction: float, axis: int) -> None:
    plane = np.random.default_rng(1).normal(size=(11, 8)).astype(np.float32)
    shift = np.zeros(2)
    shift[axis] = fraction
    expected = ndimage.shift(plane.astype(np.float64), shift, order=3, mode="mirror")
    np.testing.assert_allclose(irregular._nudged(plane, fraction, axis), expected, atol=1e-5)


def test_no_value_leaves_the_range_of_the_slices() -> None:
    series = Series(EVEN, tilt=(7, 20))
    series.array[:] = np.random.default_rng(0).choice([AIR, 3000], series.array.shape)
    array, _, _ = series.mended()
    assert array.min() >= AIR
    assert array.max() <= 3000


def test_the_note_tells_the_angle() -> None:
    assert Series(EVEN, tilt=(0, -18.5)).mended()[2] == "resampled: gantry tilt of 18.5 degrees"
    note = Series(UNEVEN, tilt=(0, 18.5)).mended()[2]
    assert note.startswith("resampled: gantry tilt of 18.5 degrees, slice spacing from 1.1 to 3.4 mm made 2.")
    assert note.endswith(" slices interpolated")


def test_positions_written_with_few_digits_move_nothing() -> None:
    series = Series(GAPS)
    series.positions = series.positions.round(3)
    array, _, note = series.mended()
    np.testing.assert_array_equal(array[[0, 1, 2, 4]], series.array[:4])
    assert "tilt" not in note


def test_a_slight_shift_is_named_too() -> None:
    note = Series(GAPS, tilt=(0, 0.35)).mended()[2]
    assert note.startswith("resampled: gantry tilt of 0.35 degrees, ")


def test_thin_arrays() -> None:
    """One row, and two columns: the splines have hardly anything to stand on."""
    positions = ORIGIN + np.outer(np.arange(4), [0.4, 0.3, 2.0])
    array = np.arange(8, dtype=np.float32).reshape(4, 1, 2)
    result, affine, _ = regularised(array, positions, np.eye(3)[:2], (1.0, 1.0))
    assert result.shape == (4, 2, 3)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(affine[:3, 2], [0, 0, 2])


@pytest.mark.parametrize(
    ("positions", "code"),
    [
        ([[0, 0, 0]], Code.SPACING),
        ([], Code.SPACING),
        ([[0, 0, 0], [0, 0, 2], [0, 5, 2]], Code.SPACING),
        ([[0, 0, 4], [0, 0, 2]], Code.SPACING),
        ([[0, 0, 0], [0, 0, 2], [0, 0, 33]], Code.GAP),
        ([[0, 0, 0], [0, 0, 2], [0, 5e3, 4]], Code.LIMIT),
        ([[0, 0, 0], [0, 0, 2], [1e9, -1e9, 4]], Code.LIMIT),
    ],
)
def test_what_cannot_be_mended_is_refused(positions: list[list[float]], code: Code) -> None:
    array = np.zeros((len(positions), 10, 10), dtype=np.float32)
    with pytest.raises(MedsegError) as caught:
        regularised(array, np.array(positions, dtype=float).reshape(-1, 3), np.eye(3)[:2], (1.0, 1.0), where="1.2.3")
    assert caught.value.code is code
    assert caught.value.where == "1.2.3"
    assert caught.value.remedy


def test_the_limit_of_voxels_is_checked_before_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    series = Series(GAPS)
    monkeypatch.setattr(irregular, "MAX_VOXELS", 13 * ROWS * COLUMNS - 1)
    with pytest.raises(MedsegError, match="E_LIMIT"):
        series.mended()


def stored(folder: Path) -> tuple[NDArray[np.float32], Float, Float, tuple[float, float]]:
    """A real series, in the order of its positions: what `regularised` takes."""
    headers = [pydicom.dcmread(path) for path in folder.iterdir()]
    orientation = np.array(headers[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    headers.sort(key=lambda h: float(np.array(h.ImagePositionPatient, dtype=float) @ np.cross(*orientation)))
    array = np.stack([h.pixel_array * float(h.RescaleSlope) + float(h.RescaleIntercept) for h in headers])
    positions = np.array([h.ImagePositionPatient for h in headers], dtype=float)
    between_rows, between_columns = (float(v) for v in headers[0].PixelSpacing)
    return array.astype(np.float32), positions, orientation, (between_rows, between_columns)


@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "slices", "step", "rows_more", "words"),
    [
        ("dcm_qa_ct/GE", 37, 4.0025, 99, "tilt of 18.5 degrees"),
        ("dicom2nifti_cases/failing/gantrytilting/001", 4, 4.8515, 9, "tilt of 14 degrees"),
        ("dicom2nifti_cases/failing/sliceincrement/001", 5, 5.0, 0, "1 of 5 slices interpolated"),
        ("dicom2nifti_cases/failing/sliceincrement/002", 5, 0.7497, 2, "1 of 5 slices interpolated"),
    ],
)
def test_real_series(real_data: Path, case: str, slices: int, step: float, rows_more: int, words: str) -> None:
    array, positions, orientation, spacing = stored(real_data / "dicom" / "series" / case)
    result, affine, note = regularised(array, positions, orientation, spacing)
    assert result.shape == (slices, array.shape[1] + rows_more, array.shape[2])
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(step, abs=1e-3)
    assert words in note
    assert result.min() == array.min()
    assert result.max() <= array.max()


@pytest.mark.data
def test_a_real_head_stays_in_place(real_data: Path) -> None:
    """The centre of each measured slice that lies on a new slice, in mm; the scanner tilted it by 18.5 degrees."""
    array, positions, orientation, spacing = stored(real_data / "dicom" / "series" / "dcm_qa_ct" / "GE")
    plan = plan_grid((array.shape[1], array.shape[2]), positions, orientation, spacing)
    result = irregular.resampled(array, plan)
    frame = np.stack([orientation[0] * spacing[1], orientation[1] * spacing[0]], axis=1)
    taken = [(k, int(source)) for k, source in enumerate(plan.sources) if source == int(source)]
    assert len(taken) > 10
    for k, source in taken:
        found = _centre(result[k], plan.affine_lps[:3, 3] + k * plan.affine_lps[:3, 2], frame)
        assert np.linalg.norm(found - _centre(array[source], positions[source], frame)) < 0.1 * min(spacing)


def _centre(plane: NDArray[np.float32], origin: Float, frame: Float) -> Float:
    weights = np.clip(plane.astype(np.float64), -200, 800) + 200  # the noise of air would count
    down, along = np.indices(plane.shape)
    centre: Float = origin + frame @ [(weights * along).sum() / weights.sum(), (weights * down).sum() / weights.sum()]
    return centre
