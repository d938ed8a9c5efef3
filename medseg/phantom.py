"""A data set out of nothing: computed "abdomens" with known truth, for the demo and for tests.

Every case is a small torso (about 100 mm wide) in the world frame, drawn from implicit shapes in millimetres: skin,
muscle, ribs, lungs, bowel and vessels as background, and five organs as classes. From case to case the shapes, their
places, the contrast, the voxel size, the number of voxels, the (oblique) direction of the axes and their order differ.
Liver and spleen share their intensity, and so do vessels, heart and kidneys: a threshold does not solve the task.

Nothing here is anatomy to learn from, and the DICOM files are no clinical output.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medseg.errors import Code, MedsegError
from medseg.formats import write_image, write_label
from medseg.phantom_anatomy import LABELS, TISSUES, draw_body, waves
from medseg.volume import Grid, Volume

_FIELD_MM = (118.0, 102.0, 102.0)
"""Mean extent of a scan along right-left, anterior-posterior, superior-inferior."""
_SPACING_MM = (1.6, 1.6, 3.0)
_NUM_VOXELS = ((64, 84), (56, 72), (28, 40))
"""Fewest and most voxels along the same axes: small enough to train on two processor cores while one waits."""
_ORIENTATIONS = ("RAS", "LPS", "LAS", "SPL", "RSA", "PIR", "ALS")
"""Axis orders and flips that files come with; case n takes number n (mod 7)."""
_NOISE_HU = 18.0
_SHADING_HU = 12.0
"""Standard deviation of the noise; amplitude of the smooth shading across the field."""

_MODALITY_ATTRIBUTES: dict[str, dict[str, object]] = {
    "CT": {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "KVP": "120", "RescaleType": "HU"},
    "MR": {
        "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
        "ScanningSequence": "GR",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "RepetitionTime": "10",
        "EchoTime": "2",
        "EchoTrainLength": 1,
    },
}
"""What a file must carry beyond the pixels and their place, by modality."""

FloatArray = NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called as (cases done, cases in all)."""


@dataclass(frozen=True)
class PhantomData:
    """Where `write_phantoms` put things.

    Args:
        train: folder in nnU-Net's layout (imagesTr, labelsTr, dataset.json).
        test: folder with one folder per held-out case, each a DICOM series.
        test_labels: folder with one NIfTI label map per held-out case, on the grid of its series.
        test_cases: ids of the held-out cases.
    """

    train: Path
    test: Path
    test_labels: Path
    test_cases: tuple[str, ...]


def write_phantoms(
    folder: Path, *, num_train: int = 12, seed: int = 0, size: float = 1.0, progress: Progress | None = None
) -> PhantomData:
    """Write a training set as NIfTI in nnU-Net's layout, and one held-out case as a DICOM series with its reference.

    Args:
        folder: is made where it does not exist; files of the same name are replaced.
        num_train: number of training cases.
        seed: the same seed gives the same voxels, affines and UIDs.
        size: voxels along each axis relative to the default (0.5 for quick tests: the same bodies, coarser).
        progress: called after each case.
    """
    data = PhantomData(folder / "train", folder / "test", folder / "test_labels", (f"phantom_{num_train + 1:03d}",))
    for made in (data.train / "imagesTr", data.train / "labelsTr", data.test_labels):
        made.mkdir(parents=True, exist_ok=True)
    for number in range(1, num_train + 1):
        image, label = make_phantom(seed, number, size=size, orientation=_ORIENTATIONS[number % len(_ORIENTATIONS)])
        write_image(data.train / "imagesTr" / f"phantom_{number:03d}_0000.nii.gz", image)
        write_label(data.train / "labelsTr" / f"phantom_{number:03d}.nii.gz", label)
        if progress is not None:
            progress(number, num_train + 1)
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS.to_json(),
        "numTraining": num_train,
        "file_ending": ".nii.gz",
    }
    (data.train / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    # The order of axes that an axial series has: rows to the left, columns to the back, slices upwards.
    image, label = make_phantom(seed, num_train + 1, size=size, orientation="LPS")
    write_dicom_series(data.test / data.test_cases[0], image, patient_id=data.test_cases[0], uid_seed=str(seed))
    write_label(data.test_labels / f"{data.test_cases[0]}.nii.gz", label)
    if progress is not None:
        progress(num_train + 1, num_train + 1)
    return data


def make_phantom(seed: int, number: int, *, size: float = 1.0, orientation: str = "RAS") -> tuple[Volume, Volume]:
    """One case: the image (int16, shape (1, I, J, K), Hounsfield units) and its label map (uint8, (I, J, K)).

    Args:
        seed: of the data set.
        number: of the case; every number is another body.
        size: voxels along each axis relative to the default.
        orientation: nearest anatomical direction of each array axis; the axes themselves are oblique.
    """
    rng = np.random.default_rng([seed, number])
    grid = _oblique_grid(rng, size)
    tissue = draw_body(_body_coordinates(grid, rng), rng)
    mean_hu = np.array([hu for hu, _ in TISSUES.values()], dtype=np.float64)
    mean_hu[1:] += rng.normal(0, 6, len(mean_hu) - 1)  # all but the air around
    classes = np.array([LABELS.names.index(name) for _, name in TISSUES.values()], dtype=np.uint8)
    image = Volume(_scan(mean_hu[tissue], rng)[None], grid, "CT")
    label = Volume(classes[tissue], grid)
    return image.reoriented(orientation), label.reoriented(orientation)


def _oblique_grid(rng: np.random.Generator, size: float) -> Grid:
    """A grid near RAS, turned by some degrees about each axis, its centre some centimetres off the world's origin."""
    spacing = np.array(_SPACING_MM) * rng.uniform([0.92, 0.92, 0.9], [1.08, 1.08, 1.12])
    spacing[1] = spacing[0]
    fewest, most = np.array(_NUM_VOXELS).T
    shape = np.clip(np.rint(np.array(_FIELD_MM) * rng.uniform(0.95, 1.05, 3) / spacing), fewest, most)
    smaller = np.maximum(np.rint(shape * size), 8)
    spacing *= shape / smaller
    turn = Rotation.from_euler("xyz", np.clip(rng.normal(0, 5, 3), -10, 10), degrees=True)
    affine = np.eye(4)
    affine[:3, :3] = turn.as_matrix() * spacing
    affine[:3, 3] = rng.normal(0, 20, 3) - affine[:3, :3] @ (smaller - 1) / 2
    return Grid(tuple(int(n) for n in smaller), affine)


def _body_coordinates(grid: Grid, rng: np.random.Generator) -> FloatArray:
    """Where each voxel lies in the average body: (3, I, J, K) in mm to the right, front and head of its middle."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1)
    middle = grid.to_world((np.array(grid.shape) - 1) / 2)
    points = np.moveaxis(grid.to_world(index) - middle, -1, 0)
    stretched = (points - rng.normal(0, [1.5, 1.5, 3.0])[:, None, None, None]) / rng.uniform(0.94, 1.06, (3, 1, 1, 1))
    return stretched + np.stack([1.4 * waves(points, rng, wavelength_mm=70) for _ in range(3)])


def _scan(hu: FloatArray, rng: np.random.Generator) -> NDArray[np.int16]:
    """What a scanner makes of true intensities: blurred edges, shading across the field, grainy noise; (I, J, K)."""
    blurred = gaussian_filter(hu, (0.6, 0.6, 0.45))
    centred = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in hu.shape], indexing="ij"))
    shading = _SHADING_HU * waves(centred, rng, wavelength_mm=4)
    noise = gaussian_filter(rng.normal(size=hu.shape), (0.5, 0.5, 0))
    seen = np.clip(blurred + shading + noise * (_NOISE_HU / noise.std()), -1024, 3071)
    return np.asarray(np.rint(seen), dtype=np.int16)


def write_dicom_series(
    folder: Path,
    volume: Volume,
    *,
    modality: str = "CT",
    uid_seed: str = "0",
    series_uid: str | None = None,
    patient_id: str = "PHANTOM",
) -> list[Path]:
    """Write a volume as a classic CT or MR series, one file per slice along the last axis, in the array's order.

    For phantoms and tests, not for clinical output: the patient, the dates and the machine are made up.

    Args:
        folder: is made where it does not exist.
        volume: shape (1, I, J, K) or (I, J, K); i runs along a row of the pictures, j down their columns. Where
            (i, j, k) is left-handed, readers that sort along the normal of the slices see k reversed.
        modality: "CT" (rescale slope 1, intercept -1024) or "MR" (the slope that uses the 16 bits).
        uid_seed: the same seed, patient and modality give the same UIDs.
        series_uid: SeriesInstanceUID; made from `uid_seed` if None.
        patient_id: PatientID.
    Returns:
        The files, in the order of the slices.
    Raises:
        MedsegError: E_UNSUPPORTED for another modality; E_CHANNELS for several channels; E_OUTPUT for values that
            signed 16 bits do not hold.
    Source:
        DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1: position and orientation of a slice.
    """
    if modality not in ("CT", "MR"):
        raise MedsegError(Code.UNSUPPORTED, "phantoms are CT or MR", expected="CT or MR", got=modality)
    array = volume.array[None] if volume.is_label else volume.array
    if len(array) != 1 or volume.grid.ndim != 3:
        raise MedsegError(Code.CHANNELS, "a DICOM series holds one channel in 3D", where=folder, got=array.shape)
    values = array[0].astype(np.float64)
    slope, intercept = (1.0, -1024.0) if modality == "CT" else (max(float(np.abs(values).max()), 1e-6) / 32000, 0.0)
    # The file holds the slope with 16 characters: divide by that very number.
    slope = float(format_number_as_ds(slope))
    stored = np.rint((values - intercept) / slope)
    if not (np.abs(stored) <= 32767).all():
        raise MedsegError(
            Code.OUTPUT, "the values do not fit signed 16 bits", where=folder, got=f"{values.min()} to {values.max()}"
        )
    study, series, frame = (
        generate_uid(entropy_srcs=[uid_seed, patient_id, modality, kind]) for kind in ("study", "series", "frame")
    )
    uids = (study, series_uid or series, frame)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(stored.shape[2]):
        dataset = _slice_dataset(volume.grid, k, modality, uids, patient_id)
        dataset.RescaleSlope, dataset.RescaleIntercept = _ds(slope, intercept)
        dataset.PixelData = stored[:, :, k].T.astype("<i2").tobytes()
        paths.append(folder / f"slice_{k + 1:04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def _slice_dataset(grid: Grid, k: int, modality: str, uids: tuple[str, str, str], patient_id: str) -> pydicom.Dataset:
    """Everything but the pixels of slice `k`. `uids`: study, series, frame of reference."""
    to_lps = np.diag([-1.0, -1.0, 1.0])  # DICOM's world: x to the left, y to the back
    direction = to_lps @ grid.direction
    di, dj, dk = grid.spacing_mm
    attributes: dict[str, object] = {
        "SOPClassUID": CTImageStorage if modality == "CT" else MRImageStorage,
        "SOPInstanceUID": generate_uid(entropy_srcs=[uids[1], str(k)]),
        "StudyInstanceUID": uids[0],
        "SeriesInstanceUID": uids[1],
        "FrameOfReferenceUID": uids[2],
        "PatientName": "PHANTOM^DEMO",
        "PatientID": patient_id,
        "PatientBirthDate": "",
        "PatientSex": "O",
        "StudyDate": "20000101",
        "StudyTime": "120000",
        "StudyID": "1",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "Modality": modality,
        "Manufacturer": "medseg",
        "SeriesDescription": "computed phantom",
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        "InstanceNumber": k + 1,
        "PositionReferenceIndicator": "",
        "PatientPosition": "HFS",
        "ImageOrientationPatient": _ds(*direction[:, 0], *direction[:, 1]),
        "ImagePositionPatient": _ds(*to_lps @ grid.to_world((0, 0, k))),
        "PixelSpacing": _ds(dj, di),  # between rows, then between columns
        "SliceThickness": _ds(dk)[0],
        "SpacingBetweenSlices": _ds(dk)[0],
        "Columns": grid.shape[0],
        "Rows": grid.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        **_MODALITY_ATTRIBUTES[modality],
    }
    dataset = pydicom.Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _ds(*values: float) -> list[str]:
    """Decimal strings of at most 16 characters, as many digits as fit."""
    return [format_number_as_ds(float(value)) for value in values]
