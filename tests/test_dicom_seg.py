from __future__ import annotations

import itertools
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import nrrd
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from medseg.errors import Code, MedsegError
from medseg.formats import read_grid
from medseg.formats.dicom import seg
from medseg.formats.dicom.codes import PALETTE, concept_of, side_of, structures_of
from medseg.formats.dicom.seg_writer import _description, write_seg
from medseg.formats.dicom.structures import Algorithm, Structure
from medseg.phantom import write_dicom_series
from medseg.volume import PLANE_FRAME, Grid, Volume

ALGORITHM = Algorithm("medseg unet", "0.1.0")
STRUCTURES = structures_of(["kidney_left", "liver tumour", "membrane"])
TURNS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


def oblique(shape: Sequence[int], spacing: Sequence[float], angles: Sequence[float] = (20, -35, 50)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = [31.7, -82.3, 15.1]
    return Grid(tuple(shape), affine)


def turned(volume: Volume, axes: Sequence[int], flips: Sequence[int]) -> Volume:
    """The same voxels with the array's axes permuted and flipped, done here by hand."""
    array, affine = volume.array, volume.grid.affine.copy()
    for axis, flip in enumerate(flips):
        if flip < 0:
            affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
            affine[:, axis] *= -1
            array = np.flip(array, axis)
    return Volume(array.transpose(axes), Grid(tuple(array.shape[a] for a in axes), affine[:, [*axes, 3]]))


GRID = oblique((7, 5, 6), (0.7, 1.3, 2.9))  # 35 pixels per frame: frames begin within a byte
LABEL = np.random.default_rng(0).integers(0, 4, GRID.shape).astype(np.uint8)
LABEL[:, :, 2] = 0  # a plane without a voxel
LABEL[:, :, 4][LABEL[:, :, 4] == 2] = 0  # and one without a voxel of the second structure


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    pixels = np.random.default_rng(1).integers(-500, 500, (1, *GRID.shape)).astype(np.int16)
    return write_dicom_series(tmp_path / "series", Volume(pixels, GRID, "CT"))


@pytest.fixture
def written(series: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "label.seg.dcm"
    write_seg(path, Volume(LABEL, GRID), STRUCTURES, series, algorithm=ALGORITHM)
    return path


def changed(path: Path, change: Callable[[Dataset], object]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def put(keyword: str, value: object) -> Callable[[Dataset], object]:
    return lambda dataset: setattr(dataset, keyword, value)


def drop(keyword: str) -> Callable[[Dataset], object]:
    return lambda dataset: dataset.pop(keyword)


def shared(dataset: Dataset) -> Dataset:
    return dataset.SharedFunctionalGroupsSequence[0]


def read(path: Path, grid: Grid) -> dict[int, np.ndarray]:
    return dict(seg.masks(seg.read_annotation(path), grid))


def label_of(masks: dict[int, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    for number, mask in masks.items():
        assert not label[mask].any()
        label[mask] = number
    return label


def made(series: list[Path], array: np.ndarray, kind: str, count: int, **options: Any) -> Dataset:
    """A SEG as highdicom makes it; array (k, j, i)."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in series]
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=array,
        segmentation_type=kind,
        segment_descriptions=[_description(s, ALGORITHM) for s in structures_of([f"s{n}" for n in range(count)])],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        **options,
    )


# --- There and back


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_image_to_label_to_seg_to_label(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("case")
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    spacing = data.draw(st.tuples(*[st.floats(0.3, 6.0)] * 3))
    angles = data.draw(st.one_of(st.just((0, 0, 0)), st.tuples(*[st.floats(-180, 180)] * 3)))
    grid = turned(
        Volume(np.zeros(shape, np.uint8), oblique(shape, spacing, angles)), *data.draw(st.sampled_from(TURNS))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    assume(grid.grid.shape[0] * grid.grid.shape[1] >= 8)
    image = Volume(rng.integers(-500, 500, (1, *grid.grid.shape)).astype(np.int16), grid.grid, "CT")
    label = Volume(rng.integers(0, 4, grid.grid.shape).astype(np.uint8), grid.grid)
    given_label = turned(label, *data.draw(st.sampled_from(TURNS)))
    files = write_dicom_series(folder / "series", image)
    path = folder / "label.seg.dcm"
    write_seg(path, given_label, STRUCTURES, data.draw(st.permutations(files)), algorithm=ALGORITHM)
    for wanted in (label, given_label):
        np.testing.assert_array_equal(label_of(read(path, wanted.grid), wanted.grid.shape), wanted.array)
    annotation = seg.read_annotation(path)
    assert len(annotation.images) == len(files)
    if len(np.unique(np.nonzero(label.array)[2])) < 2:
        return  # nothing tells the distance of planes but the header
    own = seg.own_grid(annotation)
    index = np.argwhere(label_of(dict(seg.masks(annotation, own)), own.shape) == 2)
    truth = np.argwhere(label.array == 2)
    assert len(index) == len(truth)
    if len(truth):
        np.testing.assert_allclose(own.to_world(index).mean(0), grid.grid.to_world(truth).mean(0), atol=1e-3)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_all_orders_and_directions_of_axes(series: list[Path], tmp_path: Path, axes: tuple[int, ...]) -> None:
    path = tmp_path / "x.dcm"
    for flips in itertools.product((1, -1), repeat=3):
        label = turned(Volume(LABEL, GRID), axes, flips)
        write_seg(path, label, STRUCTURES, series, algorithm=ALGORITHM)
        for grid, truth in ((GRID, LABEL), (label.grid, label.array)):
            np.testing.assert_array_equal(label_of(read(path, grid), grid.shape), truth)


def test_highdicom_reads_what_is_written(written: Path) -> None:
    volume = highdicom.seg.segread(written).get_volume(combine_segments=True)
    index = np.argwhere(volume.array > 0)
    world = volume.map_indices_to_reference(index) * [-1, -1, 1]
    mine = np.rint(GRID.to_index(world)).astype(int)
    np.testing.assert_allclose(GRID.to_index(world), mine, atol=1e-3)
    label = np.zeros(GRID.shape, dtype=np.uint8)
    label[tuple(mine.T)] = volume.array[tuple(index.T)]
    np.testing.assert_array_equal(label, LABEL)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools are not installed")
@pytest.mark.parametrize("kind", ["volume", "empty", "picture"])
def test_dciodvfy_finds_no_error(series: list[Path], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.dcm"
    label = Volume(LABEL * (kind != "empty"), GRID)
    if kind == "picture":
        label = Volume(LABEL[0, :, :].repeat(2, 1)[:, :7], Grid((5, 7), np.eye(3), PLANE_FRAME))
        series = [picture(tmp_path / "cr.dcm")]
    write_seg(path, label, STRUCTURES, series, algorithm=ALGORITHM)
    found = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    assert "Segmentation" in found.stderr
    assert "Error" not in found.stderr


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="DCMTK is not installed")
def test_dcmdump_reads_it(written: Path) -> None:
    found = subprocess.run(["dcmdump", str(written)], capture_output=True, text=True, check=True)
    assert "SegmentationStorage" in found.stdout
    assert not found.stderr


def test_what_a_written_file_says(series: list[Path], written: Path, tmp_path: Path) -> None:
    source = pydicom.dcmread(series[0])
    annotation = seg.read_annotation(written)
    assert seg.is_mine(written) and not seg.is_mine(series[0])
    assert annotation.detail == "BINARY"
    assert annotation.series == (source.SeriesInstanceUID,)
    assert annotation.images == {pydicom.dcmread(path).SOPInstanceUID for path in series}
    assert annotation.frame_of_reference == source.FrameOfReferenceUID
    assert [s.name for s in annotation.structures] == ["kidney_left", "liver tumour", "membrane"]
    assert [(s.concept, s.category) for s in annotation.structures] == [(s.concept, s.category) for s in STRUCTURES]
    for got, wanted in zip(annotation.structures, STRUCTURES, strict=True):
        np.testing.assert_allclose(got.color, wanted.color, atol=2)
    dataset = pydicom.dcmread(written)
    assert dataset.StudyInstanceUID == source.StudyInstanceUID
    assert dataset.PatientID == source.PatientID
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    kidney, tumour, _ = dataset.SegmentSequence
    assert (
        kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    )
    assert "SegmentedPropertyTypeModifierCodeSequence" not in tumour.SegmentedPropertyTypeCodeSequence[0]
    assert kidney.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("medseg unet", "0.1.0")
    frames = [
        f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in dataset.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(frames) == [1] * 5 + [2] * 4 + [3] * 5  # the others are empty
    again = tmp_path / "again.dcm"
    write_seg(again, Volume(LABEL, GRID), STRUCTURES, series, algorithm=ALGORITHM)
    assert seg.read_annotation(again).uid != annotation.uid
    assert seg.read_annotation(again).series_uid != annotation.series_uid


def test_an_empty_label_is_written_and_read(
    series: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(np.zeros_like(LABEL), GRID), STRUCTURES, series, algorithm=ALGORITHM)
    masks = read(path, GRID)
    assert sorted(masks) == [1, 2, 3] and not any(mask.any() for mask in masks.values())
    assert seg.own_grid(seg.read_annotation(path)).difference(GRID) is None
    assert not caplog.records


def test_highdicom_does_not_quote_the_patient(series: list[Path], tmp_path: Path) -> None:
    for path in series:
        changed(path, put("PatientName", "CanaryPatient"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_seg(tmp_path / "x.dcm", Volume(LABEL, GRID), STRUCTURES, series, algorithm=ALGORITHM)


def test_frames_of_a_few_pixels_are_refused(tmp_path: Path) -> None:
    grid = oblique((3, 2, 4), (1, 1, 1))
    files = write_dicom_series(tmp_path / "s", Volume(np.zeros((1, *grid.shape), np.int16), grid, "CT"))
    with pytest.raises(MedsegError) as caught:
        write_seg(
            tmp_path / "x.dcm", Volume(np.ones(grid.shape, np.uint8), grid), STRUCTURES, files, algorithm=ALGORITHM
        )
    assert caught.value.code is Code.UNSUPPORTED


def test_people_draw_too_and_names_are_any_text(series: list[Path], tmp_path: Path) -> None:
    for path in series:
        changed(
            path, lambda d: (setattr(d, "SpecificCharacterSet", "ISO_IR 100"), setattr(d, "PatientName", "Müller^Öz"))
        )
    names = ["Œdème 腫瘍", "a\\b", "x" * 100]
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(LABEL, GRID), structures_of(names), series, algorithm=Algorithm("manual", "1", False))
    dataset = pydicom.dcmread(path)
    assert str(dataset.PatientName) == "Müller^Öz"
    assert dataset.SegmentSequence[0].SegmentAlgorithmType == "MANUAL"
    assert [s.name for s in seg.read_annotation(path).structures] == ["Œdème 腫瘍", "a b", "x" * 64]


def test_a_label_on_other_planes_keeps_its_place(series: list[Path], tmp_path: Path) -> None:
    grid = GRID.resampled((7, 5, 11))  # planes between those of the source
    rng = np.random.default_rng(3)
    label = turned(Volume(rng.integers(0, 4, grid.shape).astype(np.uint8), grid), (2, 0, 1), (1, -1, -1))
    path = tmp_path / "x.dcm"
    write_seg(path, label, STRUCTURES, series, algorithm=ALGORITHM)
    np.testing.assert_array_equal(label_of(read(path, label.grid), label.grid.shape), label.array)
    annotation = seg.read_annotation(path)
    own = seg.own_grid(annotation)
    assert own.difference(grid, tolerance_mm=1e-3) is None or own.shape == grid.shape
    assert annotation.frame_of_reference == pydicom.dcmread(series[0]).FrameOfReferenceUID
    assert len(annotation.series) == 1
    with pytest.raises(MedsegError, match="between the voxels") as caught:
        read(path, GRID)
    assert caught.value.code is Code.GRID


@pytest.mark.parametrize("own_planes", [False, True])
def test_structures_may_overlap(series: list[Path], tmp_path: Path, own_planes: bool) -> None:
    """A region of several values, and one inside it: each is a segment of its own."""
    grid = GRID.resampled((7, 5, 11)) if own_planes else GRID
    array = np.random.default_rng(5).integers(0, 4, grid.shape).astype(np.uint8)
    parts = [(1, 2, 3), (3,), (2, 3)]
    regions = [replace(s, values=part) for s, part in zip(STRUCTURES, parts, strict=True)]
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(array, grid), regions, series, algorithm=ALGORITHM)
    found = read(path, grid)
    for number, part in enumerate(parts, start=1):
        np.testing.assert_array_equal(found[number], np.isin(array, part))
    array[0, 0, 0] = 4
    with pytest.raises(MedsegError, match="E_LABEL"):
        write_seg(path, Volume(array, grid), regions, series, algorithm=ALGORITHM)


def test_a_series_that_jitters_keeps_its_own_positions(series: list[Path], tmp_path: Path) -> None:
    moved = pydicom.dcmread(series[2])
    orientation = np.array(moved.ImageOrientationPatient, dtype=float).reshape(2, 3)
    place = np.array(moved.ImagePositionPatient, dtype=float) + np.cross(*orientation) * 0.02 * 2.9
    changed(series[2], lambda d: setattr(d, "ImagePositionPatient", [f"{v:.9f}" for v in place]))
    label = LABEL.copy()
    label[3, 2, 2] = 1
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(label, GRID), STRUCTURES, series, algorithm=ALGORITHM)
    np.testing.assert_array_equal(label_of(read(path, GRID), GRID.shape), label)
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    positions = [np.array(f.PlanePositionSequence[0].ImagePositionPatient, dtype=float) for f in frames]
    assert min(np.abs(position - place).max() for position in positions) < 1e-8


def test_a_multi_frame_source_with_shuffled_frames(series: list[Path], tmp_path: Path) -> None:
    order = [3, 0, 5, 1, 4, 2]
    enhanced = pydicom.dcmread(series[0])
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    enhanced.NumberOfFrames = len(order)
    enhanced.PixelData = enhanced.PixelData * len(order)
    enhanced.SharedFunctionalGroupsSequence = [Dataset()]
    frames = []
    for index in order:
        single, frame = pydicom.dcmread(series[index]), Dataset()
        for keyword, tags in (
            ("PlanePositionSequence", ["ImagePositionPatient"]),
            ("PlaneOrientationSequence", ["ImageOrientationPatient"]),
            ("PixelMeasuresSequence", ["PixelSpacing", "SliceThickness"]),
        ):
            item = Dataset()
            for tag in tags:
                setattr(item, tag, single[tag].value)
            setattr(frame, keyword, [item])
        frames.append(frame)
    enhanced.PerFrameFunctionalGroupsSequence = frames
    del enhanced.ImagePositionPatient, enhanced.ImageOrientationPatient, enhanced.PixelSpacing
    enhanced.save_as(tmp_path / "enhanced.dcm")
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(LABEL, GRID), STRUCTURES, [tmp_path / "enhanced.dcm"], algorithm=ALGORITHM)
    np.testing.assert_array_equal(label_of(read(path, GRID), GRID.shape), LABEL)
    assert seg.read_annotation(path).images == {enhanced.SOPInstanceUID}


def test_a_picture_without_a_place(tmp_path: Path) -> None:
    source = picture(tmp_path / "cr.dcm")
    grid = Grid((5, 7), np.diag([0.2, 0.3, 1.0]), PLANE_FRAME)
    label = np.random.default_rng(5).integers(0, 4, grid.shape).astype(np.uint8)
    path = tmp_path / "x.dcm"
    write_seg(path, Volume(label, grid), STRUCTURES, [source], algorithm=ALGORITHM)
    np.testing.assert_array_equal(label_of(read(path, grid), grid.shape), label)
    for other, code in ((Grid((7, 5), np.eye(3), PLANE_FRAME), Code.GRID), (GRID, Code.NO_GEOMETRY)):
        with pytest.raises(MedsegError) as caught:
            read(path, other)
        assert caught.value.code is code
    with pytest.raises(MedsegError) as caught:
        seg.own_grid(seg.read_annotation(path))
    assert caught.value.code is Code.NO_GEOMETRY


def picture(path: Path) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = generate_uid(), generate_uid(), "CR"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 5, 7, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = bytes(70)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda label, s, f: (Volume(label.array + 1, label.grid), s, f), Code.LABEL),
        (lambda label, s, f: (Volume(label.array * 0.5, label.grid), s, f), Code.LABEL),
        (lambda label, s, f: (label, [Structure(2, "b"), Structure(1, "a"), Structure(3, "c")], f), Code.LABEL),
        (lambda label, s, f: (label, [], f), Code.LABEL),
        (lambda label, s, f: (label, s, []), Code.REFERENCE),
        (lambda label, s, f: (label, s, [changed(f[0], put("SeriesInstanceUID", "1.2")), *f[1:]]), Code.REFERENCE),
        (lambda label, s, f: (label, s, [changed(x, drop("FrameOfReferenceUID")) for x in f]), Code.NO_GEOMETRY),
        (lambda label, s, f: (label, s, [changed(x, drop("ImagePositionPatient")) for x in f]), Code.NO_GEOMETRY),
        (lambda label, s, f: (label, s, [changed(f[0], put("PixelSpacing", [0, 1])), *f[1:]]), Code.NO_GEOMETRY),
    ],
)  # fmt: skip
def test_what_is_not_written(series: list[Path], tmp_path: Path, change: Callable[..., Any], code: Code) -> None:
    label, structures, files = change(Volume(LABEL, GRID), STRUCTURES, series)
    with pytest.raises(MedsegError) as caught:
        write_seg(tmp_path / "x.dcm", label, structures, files, algorithm=ALGORITHM)
    assert caught.value.code is code
    assert not (tmp_path / "x.dcm").exists()


def test_a_folder_that_is_not_there_gets_nothing(series: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MedsegError) as caught:
        write_seg(tmp_path / "no" / "x.dcm", Volume(LABEL, GRID), STRUCTURES, series, algorithm=ALGORITHM)
    assert caught.value.code is Code.OUTPUT


# --- Reading what others write


def test_shuffled_frames_and_numbers_that_begin_elsewhere(written: Path) -> None:
    def change(ds: Dataset) -> None:
        pixels = ds.pixel_array
        order = np.random.default_rng(7).permutation(len(pixels))
        bits = np.packbits(pixels[order].ravel(), bitorder="little").tobytes()
        ds.PixelData = bits + bytes(len(bits) % 2)
        frames = ds.PerFrameFunctionalGroupsSequence
        ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames[n] for n in order)
        for frame in frames:
            frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber += 10
        for segment in ds.SegmentSequence:
            segment.SegmentNumber += 10

    masks = read(changed(written, change), GRID)
    assert list(masks) == [11, 12, 13]
    for number, mask in masks.items():
        np.testing.assert_array_equal(mask, number - 10 == LABEL)


def test_only_the_structures_that_are_wanted(written: Path) -> None:
    found = list(seg.masks(seg.read_annotation(written), GRID, [3, 2, 99]))
    assert [number for number, _ in found] == [2, 3]


@pytest.mark.parametrize("kind", ["PROBABILITY", "OCCUPANCY"])
def test_half_of_the_largest_fraction_is_in(series: list[Path], tmp_path: Path, kind: str) -> None:
    fractions = np.random.default_rng(2).random(LABEL.shape[::-1]).astype(np.float32)
    fractions[0, 0, :3] = [0.5, 0.49, 0.51]
    dataset = made(series, fractions, "FRACTIONAL", 1, fractional_type=kind, max_fractional_value=200)
    dataset.save_as(tmp_path / "x.dcm")
    annotation = seg.read_annotation(tmp_path / "x.dcm")
    assert annotation.detail == f"FRACTIONAL {kind}"
    (mask,) = read(tmp_path / "x.dcm", GRID).values()
    np.testing.assert_array_equal(mask.T, np.around(fractions * 200) >= 100)
    assert mask[:3, 0, 0].tolist() == [True, False, True]


@pytest.mark.parametrize("count", [3, 300])
def test_label_maps(series: list[Path], tmp_path: Path, count: int) -> None:
    label = np.random.default_rng(4).integers(0, count + 1, LABEL.shape[::-1]).astype(np.uint16)
    label[1] = 0
    path = tmp_path / "x.dcm"
    made(series, label, "LABELMAP", count).save_as(path)
    assert pydicom.dcmread(path).BitsAllocated == (8 if count == 3 else 16)
    masks = read(path, GRID)
    assert list(masks) == list(range(1, count + 1))  # and no background
    for number in (1, 2, count):
        np.testing.assert_array_equal(masks[number].T, label == number)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_compressed_frames(series: list[Path], tmp_path: Path, kind: str, syntax: str) -> None:
    label = LABEL.T if kind == "LABELMAP" else (LABEL.T == 1)
    dataset = made(series, label, kind, 3 if kind == "LABELMAP" else 1, transfer_syntax_uid=ExplicitVRLittleEndian)
    dataset.save_as(tmp_path / "x.dcm")
    plain = pydicom.dcmread(tmp_path / "x.dcm")
    if syntax == DeflatedExplicitVRLittleEndian:
        plain.file_meta.TransferSyntaxUID = syntax
    else:  # GDCM's RLE encoder brings the process down
        plain.compress(syntax, encoding_plugin="pydicom" if syntax == RLELossless else "", generate_instance_uid=False)
    plain.save_as(tmp_path / "x.dcm")
    for number, mask in read(tmp_path / "x.dcm", GRID).items():
        np.testing.assert_array_equal(mask, number == LABEL)


def test_deflated_bits(written: Path) -> None:
    changed(written, lambda d: setattr(d.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    np.testing.assert_array_equal(label_of(read(written, GRID), GRID.shape), LABEL)


def test_frames_of_a_part_of_the_image(series: list[Path], tmp_path: Path) -> None:
    part = Volume(LABEL[2:6, 1:4, 1:5], Grid((4, 3, 4), GRID.affine @ shift((2, 1, 1))))
    path = tmp_path / "x.dcm"
    write_seg(path, part, STRUCTURES, series, algorithm=ALGORITHM)
    whole = label_of(read(path, GRID), GRID.shape)
    np.testing.assert_array_equal(whole[2:6, 1:4, 1:5], part.array)
    assert np.count_nonzero(whole) == np.count_nonzero(part.array)


def shift(index: Sequence[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = index
    return matrix


@pytest.mark.parametrize(
    ("affine", "shape", "words"),
    [
        (GRID.affine @ shift((0.3, 0, 0)), GRID.shape, r"off by \(0\.21, "),
        (GRID.affine @ shift((0, 0, 0.3)), GRID.shape, "between the voxels"),
        (GRID.affine @ shift((0, 0, 1)), GRID.shape, "outside the image"),
        (GRID.affine @ np.diag([1.1, 1, 1, 1]), (9, 5, 6), r"0\.7 × 1\.3 mm"),
        (GRID.affine, (6, 5, 6), "7 × 5 pixels"),
        (oblique((7, 5, 6), (0.7, 1.3, 2.9), (20, -35, 57)).affine, GRID.shape, "turned by"),
    ],
)
def test_another_grid_is_refused(written: Path, affine: np.ndarray, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(MedsegError, match=words) as caught:
        read(written, Grid(shape, affine))
    assert caught.value.code is Code.GRID


def test_a_grid_of_single_precision_is_the_same(written: Path) -> None:
    grid = Grid(GRID.shape, GRID.affine.astype(np.float32))
    np.testing.assert_array_equal(label_of(read(written, grid), GRID.shape), LABEL)


def first_frame(ds: Dataset) -> Dataset:
    return ds.PerFrameFunctionalGroupsSequence[0]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: put("PixelData", d.PixelData[:-10])(d), Code.TRUNCATED),
        (lambda d: d.pop("PixelData"), Code.TRUNCATED),
        (lambda d: (setattr(d, "Rows", 60000), setattr(d, "Columns", 60000)), Code.LIMIT),
        (lambda d: (setattr(d, "Rows", 16000), setattr(d, "Columns", 16000)), Code.LIMIT),
        (put("NumberOfFrames", 3), Code.MALFORMED),
        (lambda d: d.pop("PerFrameFunctionalGroupsSequence"), Code.MALFORMED),
        (lambda d: d.pop("Rows"), Code.MALFORMED),
        (lambda d: first_frame(d).pop("SegmentIdentificationSequence"), Code.MALFORMED),
        (lambda d: first_frame(d).pop("PlanePositionSequence"), Code.NO_GEOMETRY),
        (lambda d: first_frame(d).PlanePositionSequence[0].pop("ImagePositionPatient"), Code.NO_GEOMETRY),
        (lambda d: shared(d).pop("PixelMeasuresSequence"), Code.NO_GEOMETRY),
        (lambda d: put("ImageOrientationPatient", [1, 0] * 3)(shared(d).PlaneOrientationSequence[0]), Code.MALFORMED),
        (lambda d: put("PerFrameFunctionalGroupsSequence", [first_frame(d)] * 14)(d), Code.DUPLICATE),
        (lambda d: d.SegmentSequence[1].pop("SegmentNumber"), Code.MALFORMED),
        (lambda d: setattr(d.SegmentSequence[1], "SegmentNumber", 1), Code.MALFORMED),
        (put("SegmentationType", "SURFACE"), Code.UNSUPPORTED),
        (put("SegmentationType", "FRACTIONAL"), Code.MALFORMED),
        (put("DimensionOrganizationType", "TILED_FULL"), Code.UNSUPPORTED),
    ],
)  # fmt: skip
def test_damaged_files(written: Path, change: Callable[[Dataset], object], code: Code) -> None:
    changed(written, change)
    with pytest.raises(MedsegError) as caught:
        read(written, GRID)
    assert caught.value.code is code
    assert written.name in str(caught.value)


def test_frames_without_number(written: Path) -> None:
    """Found by fuzzing: a number of frames that is infinite."""
    content, tag = written.read_bytes(), b"\x28\x00\x08\x00IS"
    place = content.index(tag) + len(tag)
    end = place + 2 + int.from_bytes(content[place : place + 2], "little")
    written.write_bytes(content[:place] + b"\x04\0inf " + content[end:])
    with pytest.raises(MedsegError) as caught:
        read(written, GRID)
    assert caught.value.code is Code.MALFORMED


@pytest.mark.parametrize("tag", [0x00620002, 0x52009229])
def test_sequences_nested_without_end(written: Path, tag: int) -> None:
    begin, item = b"SQ\0\0\xff\xff\xff\xff", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    element = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + begin + item
    content = written.read_bytes()
    place = content.index(element[:4] + b"SQ")
    written.write_bytes(content[:place] + element * 2000)
    with pytest.raises(MedsegError) as caught:
        read(written, GRID)
    assert caught.value.code is Code.MALFORMED


def test_a_cut_file(written: Path) -> None:
    content = written.read_bytes()
    for length in (200, len(content) // 2, len(content) - 30):
        written.write_bytes(content[:length])
        with pytest.raises(MedsegError) as caught:
            read(written, GRID)
        assert caught.value.code in (Code.TRUNCATED, Code.MALFORMED, Code.UNSUPPORTED)


def test_a_compression_without_decoder(series: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    made(series, LABEL.T, "LABELMAP", 3, transfer_syntax_uid=JPEGLSLossless).save_as(path)
    changed(path, lambda d: setattr(d.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.4.102"))  # MPEG-4
    with pytest.raises(MedsegError, match="MPEG-4") as caught:
        read(path, GRID)
    assert caught.value.code is Code.CODEC


def test_another_kind_of_file(series: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MedsegError) as caught:
        seg.read_annotation(series[0])
    assert caught.value.code is Code.UNSUPPORTED
    (tmp_path / "x.txt").write_text("no DICOM")
    assert not seg.is_mine(tmp_path / "x.txt")


def test_images_are_found_in_the_frames_where_the_header_names_none(written: Path) -> None:
    before = seg.read_annotation(written)
    changed(written, lambda d: (d.pop("ReferencedSeriesSequence"), d.pop("SourceImageSequence")))
    after = seg.read_annotation(written)
    assert after.series == ()
    assert after.images and after.images <= before.images


# --- The grid of the frames themselves


def planes(path: Path, series: list[Path], kept: Sequence[int], spacing: float | None) -> Path:
    """A SEG with frames on some planes of the series only."""
    label = np.zeros_like(LABEL)
    label[3, 2, list(kept)] = 1
    write_seg(path, Volume(label, GRID), STRUCTURES[:1], series, algorithm=ALGORITHM)

    def change(ds: Dataset) -> None:
        measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.pop("SpacingBetweenSlices", None)
        if spacing is not None:
            measures.SpacingBetweenSlices = spacing

    return changed(path, change)


@pytest.mark.parametrize(
    ("kept", "spacing", "count"),
    [
        ((0, 1, 5), None, 6),
        ((0, 2, 5), None, 6),  # steps of 2 and 3
        ((0, 2, 4), None, 3),  # nothing tells that planes lie between
        ((0, 2, 4), 2.9, 5),
        ((1, 2, 3), 7.7, 3),  # SpacingBetweenSlices that the positions disprove
        ((3,), None, 1),
    ],
)
def test_own_grid(series: list[Path], tmp_path: Path, kept: tuple[int, ...], spacing: float | None, count: int) -> None:
    annotation = seg.read_annotation(planes(tmp_path / "x.dcm", series, kept, spacing))
    grid = seg.own_grid(annotation)
    assert grid.shape == (7, 5, count)
    ((_, mask),) = seg.masks(annotation, grid)
    truth = GRID.to_world([(3, 2, k) for k in kept])
    np.testing.assert_allclose(grid.to_world(np.argwhere(mask)), truth, atol=1e-4)


def test_uneven_planes_have_no_grid(series: list[Path], tmp_path: Path) -> None:
    path = planes(tmp_path / "x.dcm", series, (0, 1, 2), None)

    def change(ds: Dataset) -> None:
        orientation = np.array(ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient)
        place = ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0]
        moved = np.array(place.ImagePositionPatient, float) + 1.03 * np.cross(*orientation.astype(float).reshape(2, 3))
        place.ImagePositionPatient = [f"{v:.9f}" for v in moved]

    with pytest.raises(MedsegError, match="varies") as caught:
        seg.own_grid(seg.read_annotation(changed(path, change)))
    assert caught.value.code is Code.SPACING


def test_frames_side_by_side_have_no_grid(series: list[Path], tmp_path: Path) -> None:
    path = planes(tmp_path / "x.dcm", series, (0, 1, 2), None)

    def change(ds: Dataset) -> None:
        orientation = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
        place = first_frame(ds).PlanePositionSequence[0]
        moved = np.array(place.ImagePositionPatient, float) + 0.7 * np.array(orientation[:3], float)
        place.ImagePositionPatient = [f"{v:.9f}" for v in moved]

    with pytest.raises(MedsegError) as caught:
        seg.own_grid(seg.read_annotation(changed(path, change)))
    assert caught.value.code is Code.MIXED


# --- Codes


@pytest.mark.parametrize(
    ("name", "meaning", "category"),
    [
        ("liver", "Liver", "Anatomical Structure"),
        ("Left-Kidney", "Kidney", "Anatomical Structure"),
        ("kidneys", "Kidney", "Anatomical Structure"),
        ("LUNG_right", "Lung", "Anatomical Structure"),
        ("lung_upper_lobe_left", "Upper lobe of lung", "Anatomical Structure"),
        ("hippocampus anterior", "Hippocampus", "Anatomical Structure"),
        ("urinary_bladder", "Bladder", "Anatomical Structure"),
        ("vertebrae_L1", "L1 vertebra", "Anatomical Structure"),
        ("inferior vena cava", "Inferior vena cava", "Anatomical Structure"),
        ("Oesophagus", "Esophagus", "Anatomical Structure"),
        ("blood_vessels", "Blood Vessel", "Anatomical Structure"),
        ("tumour", "Neoplasm", "Morphologically Abnormal Structure"),
        ("GTV-1", "Neoplasm", "Morphologically Abnormal Structure"),
        ("liver tumor", "Neoplasm", "Morphologically Abnormal Structure"),
        ("oedema", "Edema", "Morphologically Abnormal Structure"),
        ("lesions", "Lesion", "Morphologically Abnormal Structure"),
        ("skin", "Skin", "Tissue"),
        ("membrane", "Tissue", "Tissue"),
        ("Anterior", "Tissue", "Tissue"),
        ("", "Tissue", "Tissue"),
    ],
)
def test_names_and_concepts(name: str, meaning: str, category: str) -> None:
    concept, kind = concept_of(name)
    assert (concept.meaning, kind.meaning) == (meaning, category)
    assert concept.scheme == kind.scheme == "SCT"


def test_sides_numbers_and_colours() -> None:
    left, both = side_of("kidney_left"), side_of("left and right kidney")
    assert left is not None and left.meaning == "Left" and both is None and side_of("liver") is None
    structures = structures_of([f"x{n}" for n in range(25)])
    assert [s.number for s in structures] == list(range(1, 26))
    assert [s.color for s in structures[:20]] == list(PALETTE)
    assert len(set(PALETTE)) == len(PALETTE)


# --- Real files


@pytest.mark.parametrize(
    ("path", "images", "reference", "numbers"),
    [
        ("liver.dcm", "ct-3slice", "liver_seg.nrrd", {1: 1}),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-1.nrrd", {1: 1, 4: 4, 5: 5}),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-2.nrrd", {2: 2}),
        ("partial_overlaps.dcm", "ct-3slice", "partial_overlaps-3.nrrd", {3: 3}),
        ("23x38x3/seg/label.seg", "23x38x3/image", "23x38x3/nrrd/label.nrrd", {1: 1}),
        ("24x38x3/seg/label.seg", "24x38x3/image", "24x38x3/nrrd/label.nrrd", {1: 1}),
        ("sparse-labelmap-noppv.dcm", "24x38x3/image", "sparse_labelmap_noppv_seg.nrrd", {1: 1}),
        ("sparse-labelmap-ppv5.dcm", "24x38x3/image", "sparse_labelmap_ppv5_seg.nrrd", {1: 1}),
    ],
)
def test_dcmqi(real_data: Path, path: str, images: str, reference: str, numbers: dict[int, int]) -> None:
    folder = real_data / "dicom" / "seg" / "dcmqi"
    values, header = nrrd.read(str(folder / reference))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
    assert header["space"] == "left-posterior-superior"
    truth = Grid(values.shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    annotation = seg.read_annotation(folder / path)
    for grid in (truth, read_grid(folder / images)):
        assert grid.difference(truth) is None
        masks = dict(seg.masks(annotation, grid))
        for number, value in numbers.items():
            assert masks[number].any()
            np.testing.assert_array_equal(masks[number], values == value)
    flipped = turned(Volume(values, truth), (2, 0, 1), (-1, 1, -1))
    for number, mask in seg.masks(annotation, flipped.grid, list(numbers)):
        np.testing.assert_array_equal(mask, flipped.array == numbers[number])
    if "sparse" not in path:
        assert seg.own_grid(annotation).difference(truth) is None


def test_dcmqi_structures_overlap(real_data: Path) -> None:
    folder = real_data / "dicom" / "seg" / "dcmqi"
    masks = read(folder / "partial_overlaps.dcm", read_grid(folder / "ct-3slice"))
    assert (np.sum(list(masks.values()), axis=0) > 1).any()


def test_dcmqi_what_we_write_of_it(real_data: Path, tmp_path: Path) -> None:
    """The real series, classic and as one multi-frame file."""
    folder = real_data / "dicom" / "seg" / "dcmqi" / "23x38x3"
    grid = read_grid(folder / "image")
    ((_, mask),) = seg.masks(seg.read_annotation(folder / "seg" / "label.seg"), grid)
    for source in (sorted((folder / "image").iterdir()), [folder / "multiframe" / "mf.dcm"]):
        path = tmp_path / "x.dcm"
        write_seg(path, Volume(mask.astype(np.uint8), grid), structures_of(["liver"]), source, algorithm=ALGORITHM)
        np.testing.assert_array_equal(read(path, grid)[1], mask)
        np.testing.assert_array_equal(highdicom.seg.segread(path).get_volume(combine_segments=True).array.T, mask)


def test_highdicom_files(real_data: Path) -> None:
    """Each file against highdicom's own reader."""
    slides, volumes = 0, 0
    for path in sorted((real_data / "dicom" / "seg" / "highdicom").glob("seg_image_*.dcm")):
        annotation = seg.read_annotation(path)
        oracle = highdicom.seg.segread(path)
        assert [s.number for s in annotation.structures] == [n for n in oracle.segment_numbers if n > 0]
        assert annotation.images and annotation.series
        if "_sm_" in path.name:
            with pytest.raises(MedsegError, match="slides") as caught:
                read(path, GRID)
            assert caught.value.code is Code.UNSUPPORTED
            slides += 1
            continue
        if "_cr_" in path.name:
            ((_, mask),) = seg.masks(annotation, Grid((16, 16), np.eye(3), PLANE_FRAME))
            np.testing.assert_array_equal(mask, oracle.pixel_array.squeeze() > 0)
            continue
        volume = oracle.get_volume(combine_segments=False)
        grid = seg.own_grid(annotation)
        assert grid.shape == volume.spatial_shape[::-1]
        masks = dict(seg.masks(annotation, grid))
        for channel, number in enumerate(masks):
            truth = np.argwhere(np.asarray(volume.array[..., channel], float) >= 0.5)  # its slices run the other way
            index = grid.to_index(volume.map_indices_to_reference(truth) * [-1, -1, 1])
            np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
            expected = np.zeros(grid.shape, dtype=np.bool_)
            expected[tuple(np.rint(index).astype(int).T)] = True
            np.testing.assert_array_equal(masks[number], expected)
        if "overlap" in path.name:
            assert (masks[1] & masks[2]).any()
        volumes += 1
    assert (slides, volumes) == (6, 5)
