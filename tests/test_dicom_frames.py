"""Multi-frame files: enhanced images through their functional groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_images import (
    ALONG_ROW,
    COLUMNS,
    DOWN_COLUMN,
    NORMAL,
    ORIGIN,
    PIXEL_SPACING,
    PIXELS,
    ROWS,
    SLICES,
    STEP,
    digits,
    expected_world,
    make,
    only,
    refused,
    setting,
)
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless

from medseg.errors import Code
from medseg.formats import Reading, find_series, open_volume, read_grid
from medseg.formats.dicom import files
from medseg.formats.dicom.frames import read_frames
from medseg.formats.dicom.series import assess, series_files

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
LEGACY_CT = "1.2.840.10008.5.1.4.1.1.2.2"
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.3.1"
SHUFFLED = (3, 0, 5, 1, 4, 2)

Change = Callable[[Dataset, int], None]


def group(frame: Dataset, name: str, **tags: object) -> None:
    """A functional group of a frame; its tags are added if it is there."""
    item = frame.get(name)[0] if name in frame else Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    setattr(frame, name, [item])


def enhanced(
    folder: Path,
    slices: Sequence[int] = range(SLICES),
    *,
    each: Change | None = None,
    whole: Callable[[Dataset], None] | None = None,
    shared: bool = True,
    name: str = "e",
) -> Path:
    """One multi-frame file with the given slices of the phantom, in that order.

    Args:
        folder: where.
        slices: numbers of `PIXELS`.
        each: changes (frame, its index).
        whole: changes the file.
        shared: orientation and pixel measures stand in the shared groups, else in each frame's.
        name: of the file.
    """

    def change(ds: Dataset, k: int) -> None:
        only(0)(ds, k)
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            delattr(ds, tag)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
        ds.Modality, ds.NumberOfFrames, ds.FrameOfReferenceUID = "MR", len(slices), "1.2.4"
        common = Dataset()
        frames = [Dataset() for _ in slices]
        for holder in [common] if shared else frames:
            group(holder, "PlaneOrientationSequence", ImageOrientationPatient=digits([*ALONG_ROW, *DOWN_COLUMN]))
            group(holder, "PixelMeasuresSequence", PixelSpacing=list(PIXEL_SPACING), SliceThickness=3.0)
        for index, (frame, number) in enumerate(zip(frames, slices, strict=True)):
            group(frame, "PlanePositionSequence", ImagePositionPatient=digits(ORIGIN + number * STEP * NORMAL))
            group(frame, "FrameContentSequence", StackID="1", InStackPositionNumber=number + 1)
            if each is not None:
                each(frame, index)
        ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [common], frames
        ds.PixelData = PIXELS[list(slices)].tobytes()
        if whole is not None:
            whole(ds)

    return make(folder, change, name=name)[0]


@pytest.mark.parametrize("shared", [True, False])
def test_shuffled_frames_lie_where_their_groups_say(tmp_path: Path, shared: bool) -> None:
    path = enhanced(tmp_path, SHUFFLED, shared=shared)
    for source in (path, tmp_path, find_series(tmp_path)[0]):
        volume = open_volume(source)
        np.testing.assert_array_equal(volume.array[0], PIXELS.transpose(2, 1, 0))
        for index in ((0, 0, 0), (4, 0, 0), (0, 3, 0), (2, 1, 5)):
            np.testing.assert_allclose(volume.grid.to_world(index), expected_world(*index), atol=1e-6)
        assert volume.modality == "MR" and volume.notes == ()
        assert read_grid(source).difference(volume.grid, tolerance_mm=0) is None
        assert series_files(source) == [path]
    assert find_series(tmp_path)[0].num_slices == SLICES
    oracle = highdicom.imread(path).get_volume()
    centre = (np.array(oracle.spatial_shape) - 1) / 2
    theirs = (oracle.affine @ [*centre, 1])[:3] * (-1, -1, 1)
    np.testing.assert_allclose(volume.grid.to_world((np.array(volume.grid.shape) - 1) / 2), theirs, atol=1e-6)


def test_rescale_of_each_frame(tmp_path: Path) -> None:
    def rescale(frame: Dataset, index: int) -> None:
        group(frame, "PixelValueTransformationSequence", RescaleSlope=index + 0.5, RescaleIntercept=-index)

    enhanced(tmp_path, SHUFFLED, each=rescale)
    expected = np.empty((SLICES, ROWS, COLUMNS))
    for index, number in enumerate(SHUFFLED):
        expected[number] = PIXELS[number] * (index + 0.5) - index
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], expected.transpose(2, 1, 0).astype(np.float32))


def test_rescale_of_a_frame_that_is_no_number(tmp_path: Path) -> None:
    path = enhanced(
        tmp_path, each=lambda frame, n: group(frame, "PixelValueTransformationSequence", RescaleSlope="1.25")
    )
    path.write_bytes(path.read_bytes().replace(b"1.25", b"nan "))
    assert refused(tmp_path, Code.TRUNCATED).got == "RescaleSlope is 0 or not a number"


def test_legacy_converted_and_a_single_frame(tmp_path: Path) -> None:
    def legacy(ds: Dataset) -> None:
        ds.SOPClassUID, ds.Modality = LEGACY_CT, "CT"

    enhanced(tmp_path / "a", SHUFFLED, whole=legacy)
    assert open_volume(tmp_path / "a").modality == "CT"
    enhanced(tmp_path / "b", (2,))
    volume = open_volume(tmp_path / "b")
    np.testing.assert_array_equal(volume.array[0], PIXELS[2:3].transpose(2, 1, 0))
    np.testing.assert_allclose(volume.grid.to_world([0, 0, 0]), expected_world(0, 0, 2), atol=1e-6)
    assert volume.grid.spacing_mm[2] == pytest.approx(3.0) and "single slice" in volume.notes[0]


def test_several_files_of_one_series_make_one_volume(tmp_path: Path) -> None:
    second, first = enhanced(tmp_path, (5, 3, 4), name="a"), enhanced(tmp_path, (1, 2, 0), name="b")
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], PIXELS.transpose(2, 1, 0))
    assert series_files(tmp_path) == [first, second]


def test_gaps_are_found_and_resampled_when_asked_for(tmp_path: Path) -> None:
    enhanced(tmp_path, (5, 0, 1, 4, 3))
    refused(tmp_path, Code.GAP)
    assert open_volume(tmp_path, Reading(resample_irregular=True)).grid.shape == (COLUMNS, ROWS, SLICES)


def twice(**tags: object) -> Change:
    """Frames of the first and the second half differ: `tags` name group, tag and both values."""

    def change(frame: Dataset, index: int) -> None:
        for name, (tag, values) in tags.items():
            group(frame, name, **{tag: values[index // 3]})

    return change


@pytest.mark.parametrize(
    ("tags", "got"),
    [
        ({"FrameContentSequence": ("TemporalPositionIndex", (1, 2))}, "TemporalPositionIndex: 1, 2"),
        ({"MREchoSequence": ("EffectiveEchoTime", (9.5, 30.0))}, "EffectiveEchoTime: 9.5, 30.0"),
        ({"MRDiffusionSequence": ("DiffusionBValue", (0.0, 1000.0))}, "DiffusionBValue: 0.0, 1000.0"),
        ({"FrameContentSequence": ("StackID", ("1", "2"))}, "StackID: 1, 2"),
        (
            {"CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime", (0.0, 80.0))},
            "NominalCardiacTriggerDelayTime: 0.0, 80.0",
        ),
    ],
)
def test_several_volumes_in_one_file(tmp_path: Path, tags: dict[str, object], got: str) -> None:
    enhanced(tmp_path, (0, 1, 2, 0, 1, 2), each=twice(**tags))
    error = refused(tmp_path, Code.FOUR_D)
    assert error.got == got and error.remedy == f"split the series by {got.split(':')[0]} first"
    assessment = assess(files.scan(tmp_path).slices)
    assert assessment.grid is None and assessment.problem is not None and assessment.problem.code is Code.FOUR_D


def test_dimensions_of_its_own(tmp_path: Path) -> None:
    def index(frame: Dataset, n: int) -> None:
        group(frame, "FrameContentSequence", DimensionIndexValues=[n % 3 + 1, n // 3 + 1])

    def pointers(ds: Dataset) -> None:
        items = [Dataset(), Dataset()]
        items[0].DimensionIndexPointer, items[1].DimensionIndexPointer = 0x00200032, 0x00211001
        ds.DimensionIndexSequence = items

    path = enhanced(tmp_path, (0, 1, 2, 0, 1, 2), each=index, whole=pointers)
    assert refused(tmp_path, Code.FOUR_D).got == "private index: 1, 2"
    frames = read_frames(path)
    assert frames.dimensions[0] == "ImagePositionPatient"
    np.testing.assert_array_equal(frames.dimension_values, [[1, 1], [2, 1], [3, 1], [1, 2], [2, 2], [3, 2]])


def test_files_that_are_volumes_of_their_own(tmp_path: Path) -> None:
    for time in (1, 2, 3):
        each = twice(FrameContentSequence=("TemporalPositionIndex", (time, time)))
        enhanced(tmp_path, each=each, name=f"t{time}")
    error = refused(tmp_path, Code.FOUR_D)
    assert error.got == "TemporalPositionIndex: 1, 2, 3" and error.remedy == "read one of its files by itself"
    np.testing.assert_array_equal(open_volume(tmp_path / "t200.dcm").array[0], PIXELS.transpose(2, 1, 0))


def test_frames_that_are_there_twice(tmp_path: Path) -> None:
    enhanced(tmp_path / "a", (0, 1, 2, 1))
    volume = open_volume(tmp_path / "a")
    assert volume.grid.shape[2] == 3 and volume.notes == ("left out 1 slices that are there twice",)

    def other(ds: Dataset) -> None:
        ds.PixelData = PIXELS[[0, 1, 2, 5]].tobytes()

    enhanced(tmp_path / "b", (0, 1, 2, 1), whole=other)
    assert "frame 2 of e00.dcm and frame 4 of e00.dcm" in str(refused(tmp_path / "b", Code.DUPLICATE).got)


def test_frames_without_a_position(tmp_path: Path) -> None:
    def forget(frame: Dataset, n: int) -> None:
        if n == 2:
            del frame.PlanePositionSequence

    enhanced(tmp_path / "a", each=forget)
    assert "ImagePositionPatient" in str(refused(tmp_path / "a", Code.NO_GEOMETRY).expected)

    def cine(ds: Dataset, k: int) -> None:
        only(0)(ds, k)
        setting(SOPClassUID=ULTRASOUND, Modality="US", NumberOfFrames=SLICES, PixelData=PIXELS.tobytes())(ds, k)

    make(tmp_path / "b", cine)  # one position in the header is not that of all frames
    refused(tmp_path / "b", Code.NO_GEOMETRY)


def test_groups_that_do_not_fit(tmp_path: Path) -> None:
    def fewer(ds: Dataset) -> None:
        ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:4]

    enhanced(tmp_path / "a", whole=fewer)
    assert refused(tmp_path / "a", Code.MALFORMED).got == "4"

    def nest(ds: Dataset) -> None:
        item = Dataset()
        for _ in range(60):
            outer = Dataset()
            outer.ConceptNameCodeSequence = [item]
            item = outer
        ds.SharedFunctionalGroupsSequence[0].ConceptNameCodeSequence = [item]

    enhanced(tmp_path / "b", whole=nest)
    np.testing.assert_array_equal(open_volume(tmp_path / "b").array[0], PIXELS.transpose(2, 1, 0))


def test_cut_pixels(tmp_path: Path) -> None:
    path = enhanced(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    refused(tmp_path, Code.TRUNCATED)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_frames_read_equal(tmp_path: Path, syntax: str) -> None:
    ramps = (np.arange(24)[:, None] * 30 + np.arange(32) * 70 + np.arange(SLICES)[:, None, None] * 11).astype(np.uint16)

    def smooth(ds: Dataset) -> None:
        ds.Rows, ds.Columns, ds.PixelData = 24, 32, ramps[list(SHUFFLED)].tobytes()

    path = enhanced(tmp_path, SHUFFLED, whole=smooth)
    ds = pydicom.dcmread(path)
    ds.compress(syntax)
    ds.save_as(path)
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], ramps.transpose(2, 1, 0))


def test_frames_tell_all_of_a_segmentation(tmp_path: Path) -> None:
    def segment(frame: Dataset, n: int) -> None:
        group(frame, "SegmentIdentificationSequence", ReferencedSegmentNumber=n % 2 + 1)
        group(frame, "FrameContentSequence", TemporalPositionIndex=n + 4)
        source, derivation = Dataset(), Dataset()
        source.ReferencedSOPInstanceUID = f"1.2.{n}"
        derivation.SourceImageSequence = [source]
        frame.DerivationImageSequence = [derivation]

    frames = read_frames(enhanced(tmp_path, SHUFFLED, each=segment))
    assert frames.count == SLICES
    assert frames.segments is not None and frames.segments.tolist() == [1, 2, 1, 2, 1, 2]
    assert frames.stack_ids == ("1",) * SLICES and frames.temporal == ("4", "5", "6", "7", "8", "9")
    assert frames.sources[3] == ("1.2.3",)
    np.testing.assert_allclose(frames.positions, [ORIGIN + k * STEP * NORMAL for k in SHUFFLED], atol=1e-6)
    np.testing.assert_allclose(frames.orientations, [[ALONG_ROW, DOWN_COLUMN]] * SLICES, atol=1e-9)
    np.testing.assert_array_equal(frames.pixel_spacings, [PIXEL_SPACING] * SLICES)
    np.testing.assert_array_equal(frames.thicknesses, 3.0)
    assert np.isnan(frames.steps).all() and (frames.slopes == 1).all() and (frames.intercepts == 0).all()
