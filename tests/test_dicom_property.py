"""Any series of any orientation lies where the standard says, judged by a writer of its own and by highdicom.

Nothing here uses medseg to write: positions and pixels come from equation C.7.6.2.1-1 of DICOM PS3.3, spelt out below.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom import get_volume_from_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds
from scipy.spatial.transform import Rotation

from medseg.errors import Code, MedsegError
from medseg.formats import open_volume, read_grid
from medseg.volume import Volume

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
AXIS_ALIGNED = Rotation.create_group("O").as_matrix()
"""The 24 ways to lay rows, columns and slices along the patient's axes: axial, sagittal, coronal, each turned and with
negated cosines. (A negated column cosine turns the normal over too: the three always form a right hand.)"""
SERIES, FRAME, STUDY = (generate_uid(entropy_srcs=[part]) for part in ("series", "frame", "study"))
WORLD_TOLERANCE_VOXELS = 1e-4

few = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Stack:
    """A series before it is written: all in DICOM's terms, mm in LPS."""

    along_row: FloatArray
    down_column: FloatArray
    origin: FloatArray
    between_rows: float
    between_columns: float
    step: float
    stored: np.ndarray[Any, Any]
    """(slices, rows, columns)."""
    moved: FloatArray = field(default_factory=lambda: np.zeros(3))
    """(slices, 3) or (3,): how far each slice lies off its regular place."""

    @property
    def normal(self) -> FloatArray:
        normal: FloatArray = np.cross(self.along_row, self.down_column)
        return normal

    @property
    def positions(self) -> FloatArray:
        """(slices, 3): the centre of the first pixel of each slice."""
        return self.origin + np.arange(len(self.stored))[:, None] * self.step * self.normal + self.moved

    def world(self) -> FloatArray:
        """(slices, rows, columns, 3): where each pixel lies, RAS mm."""
        row, column = np.meshgrid(*map(np.arange, self.stored.shape[1:]), indexing="ij")
        # P = S + column index * column spacing * direction of a row + row index * row spacing * direction of a column
        in_plane = np.multiply.outer(column * self.between_columns, self.along_row)
        in_plane += np.multiply.outer(row * self.between_rows, self.down_column)
        world: FloatArray = (self.positions[:, None, None] + in_plane) @ LPS_TO_RAS
        return world


@st.composite
def stacks(draw: st.DrawFn, min_slices: int = 1, max_slices: int = 7) -> Stack:
    """Any orientation, spacing and shape; every voxel has a value of its own, so none can be taken for another."""
    directions = AXIS_ALIGNED[draw(st.integers(0, 23))]
    if draw(st.booleans()):
        turn = [draw(st.floats(-1.5, 1.5)) for _ in range(3)]
        directions = Rotation.from_rotvec(turn).as_matrix() @ directions
    shape = (draw(st.integers(min_slices, max_slices)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.permutation(np.prod(shape)).reshape(shape).astype(np.int16)
    origin = np.array([draw(st.floats(-800, 800)) for _ in range(3)])
    mm = st.floats(0.1, 6)
    return Stack(directions[:, 0], directions[:, 1], origin, draw(mm), draw(mm), draw(mm), values)


def digits(*numbers: float) -> list[str]:
    return [format_number_as_ds(float(number)) for number in numbers]


def image(stack: Stack, sop_class: str) -> Dataset:
    """What all files of a series share."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, SERIES, FRAME
    ds.Modality = "CT" if sop_class == CTImageStorage else "MR"
    _, ds.Rows, ds.Columns = stack.stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def datasets(stack: Stack, sop_class: str = CTImageStorage) -> list[Dataset]:
    """One file per slice, in spatial order."""
    files = []
    for k, position in enumerate(stack.positions):
        ds = image(stack, sop_class)
        ds.InstanceNumber = k + 1
        ds.ImagePositionPatient = digits(*position)
        ds.ImageOrientationPatient = digits(*stack.along_row, *stack.down_column)
        ds.PixelSpacing = digits(stack.between_rows, stack.between_columns)
        ds.SliceThickness = digits(stack.step)[0]
        ds.RescaleSlope, ds.RescaleIntercept = "1", "0"
        ds.PixelData = stack.stored[k].astype("<i2").tobytes().ljust((stack.stored[k].size * 2 + 1) // 2 * 2, b"\0")
        files.append(ds)
    return files


@contextmanager
def written(files: list[Dataset], seed: int = 0) -> Iterator[Path]:
    """A folder of these files under names in no order, every third seed strewn over sub-folders."""
    with tempfile.TemporaryDirectory() as temporary:
        rng = random.Random(seed)
        for name, ds in zip(rng.sample(range(1000), len(files)), files, strict=True):
            folder = Path(temporary) / rng.choice("ab") if seed % 3 == 0 else Path(temporary)
            folder.mkdir(exist_ok=True)
            ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)
        yield Path(temporary)


def assert_in_place(
    volume: Volume, stack: Stack, values: FloatArray | None = None, *, tolerance_voxels: float = WORLD_TOLERANCE_VOXELS
) -> None:
    """Every voxel is found, with its value, at the index that the volume's own geometry gives for its place."""
    index = volume.grid.to_index(stack.world())
    nearest = np.rint(index).astype(int)
    assert np.abs(index - nearest).max() <= tolerance_voxels
    assert sorted(volume.grid.shape) == sorted(stack.stored.shape)
    assert (nearest >= 0).all() and (nearest < volume.grid.shape).all()
    found = volume.array[0][tuple(np.moveaxis(nearest, -1, 0))]
    expected = stack.stored if values is None else values
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def refusal(files: list[Dataset]) -> Code:
    with written(files) as folder, pytest.raises(MedsegError) as caught:
        open_volume(folder)
    return caught.value.code


@few
@given(stacks(), st.sampled_from(["shuffled", "equal", "absent"]), st.integers(0, 99))
def test_every_voxel_lies_where_the_standard_says(stack: Stack, numbering: str, seed: int) -> None:
    files = datasets(stack)
    numbers = random.Random(seed).sample(range(1, 100), len(files))
    for ds, number in zip(files, numbers, strict=True):
        ds.InstanceNumber = number if numbering == "shuffled" else 1
        if numbering == "absent":
            del ds.InstanceNumber
    with written(files, seed) as folder:
        volume = open_volume(folder)
        assert read_grid(folder).difference(volume.grid, tolerance_mm=0) is None
    assert volume.grid.shape == stack.stored.shape[::-1]
    assert_in_place(volume, stack)
    assert_in_place(volume.reoriented(), stack)
    np.testing.assert_allclose(
        volume.grid.spacing_mm, (stack.between_columns, stack.between_rows, stack.step), rtol=1e-6
    )


@few
@given(stacks(min_slices=2), st.integers(0, 99))
def test_affine_and_voxels_are_those_of_highdicom(stack: Stack, seed: int) -> None:
    files = datasets(stack, MRImageStorage)
    theirs = get_volume_from_series(files)
    with written(files, seed) as folder:
        ours = open_volume(folder)
    # highdicom: indices (slice, row, column) as a right hand, so its slices run against the normal; mm in LPS
    ours_as_theirs = np.eye(4)
    ours_as_theirs[:3, :3] = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
    ours_as_theirs[2, 3] = len(files) - 1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ours.grid.affine @ ours_as_theirs
    np.testing.assert_allclose(affine, theirs.affine, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ours.array[0].transpose(2, 1, 0)[::-1], theirs.array)


@few
@given(stacks(min_slices=2), st.booleans(), st.booleans(), st.integers(0, 99))
def test_frames_of_an_enhanced_image_lie_there_in_any_order(
    stack: Stack, shared_plane: bool, shared_rescale: bool, seed: int
) -> None:
    slopes = np.random.default_rng(seed).uniform(0.5, 2, (len(stack.stored), 1, 1)).round(3)
    if shared_rescale:
        slopes[:] = slopes[0]
    with written([enhanced(stack, slopes.ravel(), shared_plane, shared_rescale, seed)], seed) as folder:
        volume = open_volume(folder)
    assert_in_place(volume, stack, stack.stored * slopes - 7)
    assert volume.modality == "MR"


def enhanced(stack: Stack, slopes: FloatArray, shared_plane: bool, shared_rescale: bool, seed: int) -> Dataset:
    """The slices as shuffled frames of one image; what they have in common stands once or with each frame."""
    ds = image(stack, EnhancedMRImageStorage)
    order = random.Random(seed).sample(range(len(stack.stored)), len(stack.stored))
    ds.NumberOfFrames, ds.InstanceNumber = len(order), 1
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [Dataset()], []
    for k in order:
        group, plane, orientation, measures, rescale, content = (Dataset() for _ in range(6))
        plane.ImagePositionPatient = digits(*stack.positions[k])
        orientation.ImageOrientationPatient = digits(*stack.along_row, *stack.down_column)
        measures.PixelSpacing = digits(stack.between_rows, stack.between_columns)
        measures.SliceThickness = digits(stack.step)[0]
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = str(slopes[k]), "-7", "US"
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
        group.PlanePositionSequence, group.FrameContentSequence = [plane], [content]
        (shared,) = ds.SharedFunctionalGroupsSequence
        of_plane, of_rescale = (shared if once else group for once in (shared_plane, shared_rescale))
        of_plane.PlaneOrientationSequence, of_plane.PixelMeasuresSequence = [orientation], [measures]
        of_rescale.PixelValueTransformationSequence = [rescale]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    pointers = [(0x00209056, 0x00209111), (0x00209057, 0x00209111)]  # StackID, InStackPositionNumber
    ds.DimensionIndexSequence = [Dataset() for _ in pointers]
    for item, (pointer, functional_group) in zip(ds.DimensionIndexSequence, pointers, strict=True):
        item.DimensionIndexPointer, item.FunctionalGroupPointer = pointer, functional_group
    ds.PixelData = stack.stored[order].astype("<i2").tobytes()
    return ds


@few
@given(stacks(min_slices=3, max_slices=9), st.integers(0, 2**32))
def test_a_thousandth_of_jitter_passes(stack: Stack, seed: int) -> None:
    heights = np.random.default_rng(seed).uniform(-0.0005, 0.0005, len(stack.stored)) * stack.step
    moved = replace(stack, moved=heights[:, None] * stack.normal)
    with written(datasets(moved)) as folder:
        volume = open_volume(folder)
    assert_in_place(volume, moved, tolerance_voxels=0.0011)


@few
@given(stacks(min_slices=3, max_slices=9), st.data(), st.sampled_from([-0.015, 0.015]))
def test_a_step_off_by_more_than_a_hundredth_is_refused(stack: Stack, data: st.DataObject, excess: float) -> None:
    after = data.draw(st.integers(1, len(stack.stored) - 1))  # this step is longer or shorter than the others
    heights = np.where(np.arange(len(stack.stored)) >= after, excess * stack.step, 0)
    assert refusal(datasets(replace(stack, moved=heights[:, None] * stack.normal))) is Code.SPACING


@few
@given(stacks(min_slices=4, max_slices=9), st.data())
def test_a_missing_slice_is_refused(stack: Stack, data: st.DataObject) -> None:
    files = datasets(stack)
    del files[data.draw(st.integers(1, len(files) - 2))]
    assert refusal(files) is Code.GAP


@few
@given(stacks(min_slices=2, max_slices=9), st.floats(0, 6.28), st.sampled_from([0.48, 0.52]))
def test_tilt_is_refused_where_it_moves_a_slice_by_more_than_half_a_pixel(
    stack: Stack, angle: float, pixels: float
) -> None:
    sideways = np.cos(angle) * stack.along_row + np.sin(angle) * stack.down_column
    drift = np.linspace(0, pixels * min(stack.between_rows, stack.between_columns), len(stack.stored))
    tilted = replace(stack, moved=drift[:, None] * sideways)
    if pixels > 0.5:
        assert refusal(datasets(tilted)) is Code.TILT
        return
    with written(datasets(tilted)) as folder:
        volume = open_volume(folder)
    assert_in_place(volume, tilted, tolerance_voxels=0.5)


@few
@given(stacks(), st.sampled_from([0.5, 0.95, 1.05, 2.0]), st.booleans())
def test_cosines_that_are_not_of_unit_length_are_refused(stack: Stack, length: float, rows: bool) -> None:
    # They would pass as another spacing: a row cosine of length 1.05 makes every voxel 5 % wider.
    along_row, down_column = stack.along_row * (length if rows else 1), stack.down_column * (1 if rows else length)
    files = datasets(stack)
    for ds in files:
        ds.ImageOrientationPatient = digits(*along_row, *down_column)
    assert refusal(files) is Code.AFFINE


@few
@given(stacks(), st.integers(11, 16), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_grey_values_are_unpacked_inverted_and_rescaled_slice_by_slice(
    stack: Stack, bits: int, signed: bool, inverted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lowest = -(2 ** (bits - 1)) if signed else 0
    highest = lowest + 2**bits - 1
    stored = rng.integers(lowest, highest + 1, stack.stored.shape)
    slopes, intercepts = rng.uniform(0.01, 3, len(stored)).round(4), rng.uniform(-1024, 1024, len(stored)).round(3)
    files = datasets(stack)
    for ds, plane, slope, intercept in zip(files, stored, slopes, intercepts, strict=True):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, int(signed)
        ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        ds.RescaleSlope, ds.RescaleIntercept = digits(slope, intercept)
        junk = rng.integers(0, 2**16, plane.shape) << bits  # what old scanners leave in the bits above
        ds.PixelData = ((plane & (2**bits - 1)) | junk).astype(np.uint16).astype("<u2").tobytes()
    with written(files) as folder:
        volume = open_volume(folder)
    shown = lowest + highest - stored if inverted else stored
    expected = shown * slopes[:, None, None] + intercepts[:, None, None]
    assert_in_place(volume, replace(stack, stored=stored), expected)
