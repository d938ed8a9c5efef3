#!/usr/bin/env python3
"""Time the reading of a DICOM series by medseg and by its peers, and look whether what they read lies where it should.

    python scripts/make_peers.py                     once: the peers' own environment
    python scripts/bench_dicom_reading.py            about five minutes on 2 cores; prints the table
    python scripts/bench_dicom_reading.py --write    and writes docs/benchmarks/dicom_reading.md and .json
    python scripts/bench_dicom_reading.py --slices 20 --rounds 1    a quick look

The series are computed (a noisy torso, 512 × 512 × 134, signed 16 bits) and written to a temporary folder, so they are
read from the file cache. Every reader runs in a process of its own, once without a clock and then `--repeats` times;
this is done `--rounds` times in turn. Imports are not counted, but dcm2niix is a program: its start and the writing of
its NIfTI file are. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import make_peers
from benchmark import environment, need_peers, parser_of, show, where

if TYPE_CHECKING:
    import numpy as np
    import pydicom

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "dicom_reading.md"
COLUMNS, ROWS, SLICES = 512, 512, 134
SPACING_MM = (0.75, 0.75, 1.5)
NUM_POINTS = 4000
"""Voxels whose values are looked up at their place in the patient."""
POSITION_TOLERANCE_VOXELS = 0.01
OURS_NEED = ("medseg", "pydicom", "pyjpegls", "numpy")
PEERS_NEED = ("monai", "torch", "dcm2niix", "SimpleITK", "pydicom", "pyjpegls", "numpy")

Placed = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
"""Voxels (i, j, k) and the matrix from their indices to RAS mm."""


@dataclass(frozen=True)
class Reader:
    """One of those that are compared."""

    name: str
    call: str
    """What a user writes."""
    make: Callable[[], Callable[[Path], Any]]
    """Imports, and returns what is timed: a function of the folder of a series."""
    placed: Callable[[Any], Placed] | None
    """Voxels and geometry of what was read; None for a reader that gives no geometry."""
    is_peer: bool = True


def _medseg() -> Callable[[Path], Any]:
    from medseg.formats import open_volume

    open_volume_of: Callable[[Path], Any] = open_volume
    return open_volume_of


def _monai() -> Callable[[Path], Any]:
    from monai.transforms import LoadImage

    load = LoadImage(reader="PydicomReader", image_only=True)
    return lambda folder: load(folder)


def _dcm2niix() -> Callable[[Path], Any]:
    import dcm2niix  # type: ignore[import-untyped,import-not-found,unused-ignore]

    def convert(folder: Path) -> Path:
        out = folder.parent / "converted"
        out.mkdir(exist_ok=True)
        # The program itself (the package's own `dcm2niix` is a Python script that starts it); -w 1 writes over
        command = [dcm2niix.bin, "-z", "n", "-w", "1", "-o", str(out), str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return out

    return convert


def _pydicom() -> Callable[[Path], Any]:
    import pydicom

    return lambda folder: [pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())]


def _simpleitk() -> Callable[[Path], Any]:
    import SimpleITK as sitk  # type: ignore[import-not-found,unused-ignore]

    def read(folder: Path) -> Any:
        files = sorted(str(path) for path in folder.iterdir())
        if len(files) > 1:
            files = list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
            return sitk.ReadImage(files, sitk.sitkFloat32)
        return sitk.ReadImage(files[0], sitk.sitkFloat32)

    return read


def _of_medseg(volume: Any) -> Placed:
    return volume.array[0], volume.grid.affine


def _of_monai(image: Any) -> Placed:
    import numpy as np

    return np.asarray(image), np.asarray(image.affine)


def _of_dcm2niix(folder: Path) -> Placed:
    import nibabel as nib

    images = sorted(folder.glob("*.nii"))
    if len(images) != 1:
        raise ValueError(f"{len(images)} NIfTI files")
    image = nib.load(images[0])
    return image.get_fdata(), image.affine


def _of_simpleitk(image: Any) -> Placed:
    import numpy as np
    import SimpleITK as sitk

    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayViewFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine


READERS = (
    Reader("medseg", "`medseg.formats.open_volume(folder)`", _medseg, _of_medseg, is_peer=False),
    Reader("MONAI", '`LoadImage(reader="PydicomReader")(folder)`', _monai, _of_monai),
    Reader("dcm2niix", "`dcm2niix -z n folder`, writes a NIfTI file", _dcm2niix, _of_dcm2niix),
    Reader("SimpleITK", "`ReadImage(GetGDCMSeriesFileNames(folder), sitkFloat32)`", _simpleitk, _of_simpleitk),
    Reader("pydicom", "`dcmread(file).pixel_array` of each file: no volume, no rescale", _pydicom, None),
)


def write_series(folder: Path, num_slices: int) -> dict[str, str]:
    """Write the three series, each in `folder / name / "series"`, and the points to look up; name → what it is."""
    import numpy as np
    import pydicom
    from pydicom.uid import JPEGLSLossless
    from scipy.spatial.transform import Rotation

    from medseg.phantom import write_dicom_series
    from medseg.volume import Grid, Volume

    rng = np.random.default_rng(0)
    affine = np.eye(4)
    turned = Rotation.from_euler("xyz", (6, -4, 3), degrees=True).as_matrix()
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ turned * SPACING_MM
    affine[:3, 3] = (190.0, 175.0, -480.0)
    grid = Grid((COLUMNS, ROWS, num_slices), affine)
    values = _torso(num_slices, rng)
    index = rng.integers(0, grid.shape, (NUM_POINTS, 3))
    points = {"world": grid.to_world(index), "values": values[tuple(index.T)]}

    files = write_dicom_series(folder / "classic" / "series", Volume(values[None], grid, "CT"))
    datasets = [pydicom.dcmread(path) for path in files]
    _write_enhanced(folder / "enhanced" / "series", datasets)
    names = [f"{n:08x}.dcm" for n in random.Random(0).sample(range(2**32), len(files))]
    (folder / "jpegls" / "series").mkdir(parents=True)
    for path, dataset, name in zip(files, datasets, names, strict=True):
        path.rename(path.with_name(name))
        dataset.compress(JPEGLSLossless, generate_instance_uid=False)
        dataset.save_as(folder / "jpegls" / "series" / name)
    for name in ("classic", "jpegls", "enhanced"):
        np.savez(folder / name / "points.npz", **points)
    megabytes = {p.name: sum(f.stat().st_size for f in (p / "series").iterdir()) / 2**20 for p in folder.iterdir()}
    return {
        "classic": f"{num_slices} files, uncompressed, {megabytes['classic']:.0f} MiB",
        "jpegls": f"{num_slices} files, JPEG-LS without loss, {megabytes['jpegls']:.0f} MiB",
        "enhanced": f"1 file of {num_slices} shuffled frames, uncompressed, {megabytes['enhanced']:.0f} MiB",
    }


def _torso(num_slices: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Hounsfield units with the noise of a scanner, (i, j, k): what compresses no better than a real scan."""
    import numpy as np

    x, y, z = np.ogrid[-1 : 1 : COLUMNS * 1j, -1 : 1 : ROWS * 1j, -1 : 1 : num_slices * 1j]
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    lungs = ((np.abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 + (z - 0.4) ** 2 < 1
    hu = np.where(body, np.where(lungs, -800, 40 + 60 * np.sin(9 * x) * np.cos(7 * y + 5 * z)), -1000)
    noise: np.ndarray[Any, Any] = np.rint(hu + rng.normal(0, 20, hu.shape)).astype(np.int16)
    return noise


def _write_enhanced(folder: Path, slices: Sequence[pydicom.Dataset]) -> None:
    """The same slices as frames of one Enhanced CT image (PS3.3 A.38), in shuffled order."""
    import pydicom
    from pydicom.uid import EnhancedCTImageStorage, generate_uid

    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = slices[0].file_meta.TransferSyntaxUID
    alike = "Study|Series|Frame|Patient|Modality|Rows|Columns|Samples|Photometric|Bits|HighBit|PixelRepresentation"
    for element in slices[0]:
        if element.keyword.startswith(tuple(alike.split("|"))):
            image[element.tag] = element
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["enhanced"])
    image.ImageType, image.InstanceNumber = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 1
    order = random.Random(1).sample(range(len(slices)), len(slices))
    image.NumberOfFrames = len(order)
    shared, dimensions = pydicom.Dataset(), pydicom.Dataset()
    shared.PixelMeasuresSequence = [_copied(slices[0], "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")]
    shared.PlaneOrientationSequence = [_copied(slices[0], "ImageOrientationPatient")]
    rescale = _copied(slices[0], "RescaleSlope", "RescaleIntercept")
    rescale.RescaleType = "HU"
    shared.PixelValueTransformationSequence = [rescale]
    image.SharedFunctionalGroupsSequence = [shared]
    dimensions.DimensionIndexPointer, dimensions.FunctionalGroupPointer = 0x00209057, 0x00209111
    image.DimensionIndexSequence = [dimensions]
    image.PerFrameFunctionalGroupsSequence = []
    for k in order:
        content, frame = pydicom.Dataset(), pydicom.Dataset()
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [k + 1]
        frame.FrameContentSequence = [content]
        frame.PlanePositionSequence = [_copied(slices[k], "ImagePositionPatient")]
        image.PerFrameFunctionalGroupsSequence.append(frame)
    image.PixelData = b"".join(slices[k].PixelData for k in order)
    folder.mkdir(parents=True)
    image.save_as(folder / "enhanced.dcm", enforce_file_format=True)


def _copied(source: pydicom.Dataset, *keywords: str) -> pydicom.Dataset:
    import pydicom

    item = pydicom.Dataset()
    for keyword in keywords:
        setattr(item, keyword, source[keyword].value)
    return item


def measure(reader: Reader, folder: Path, repeats: int) -> dict[str, Any]:
    """Read once without a clock, then `repeats` times with one; then look whether it is right. Runs in a process of
    its own."""
    try:
        read = reader.make()
        read(folder)
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            result = read(folder)
            seconds.append(time.perf_counter() - begin)
        finding = "no geometry" if reader.placed is None else check(*reader.placed(result), folder.parent)
    except Exception as error:  # a reader that gives up is a result
        return {"seconds": [], "finding": f"does not read it: {type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"seconds": seconds, "finding": finding}


def check(array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any], folder: Path) -> str:
    """Whether known points of the patient hold their values."""
    import numpy as np

    points = np.load(folder / "points.npz")
    if array.ndim != 3:
        return f"wrong: an array of shape {array.shape}"
    inverse = np.linalg.inv(affine)
    index = points["world"] @ inverse[:3, :3].T + inverse[:3, 3]
    nearest = np.rint(index).astype(int)
    inside = ((nearest >= 0) & (nearest < array.shape)).all(axis=1)
    on_voxel = inside & (np.abs(index - nearest).max(axis=1) <= POSITION_TOLERANCE_VOXELS)
    if not on_voxel.all():
        return f"wrong: {1 - on_voxel.mean():.0%} of the points do not lie on a voxel's centre"
    wrong = array[tuple(nearest.T)] != points["values"]
    return f"wrong: {wrong.mean():.0%} of the values" if wrong.any() else "right"


def run(reader: Reader, folder: Path, repeats: int) -> dict[str, Any]:
    """`measure` in a fresh process, peers in their own environment."""
    interpreter = str(make_peers.python()) if reader.is_peer else sys.executable
    command = [interpreter, __file__, "--measure", reader.name, str(folder), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"seconds": [], "finding": f"ended with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def bench(rounds: int, repeats: int, num_slices: int) -> dict[str, Any]:
    """Everything: {series: {"what": ..., "readers": {name: {"seconds": [...], "finding": ...}}}} and the facts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kinds = write_series(folder, num_slices)
        results: dict[str, Any] = {kind: {"what": what, "readers": {}} for kind, what in kinds.items()}
        for turn in range(rounds):
            for kind in kinds:
                for reader in READERS[turn % len(READERS) :] + READERS[: turn % len(READERS)]:
                    got = run(reader, folder / kind / "series", repeats)
                    entry = results[kind]["readers"].setdefault(reader.name, {"seconds": [], "finding": got["finding"]})
                    entry["seconds"] += got["seconds"]
                    print(turn + 1, kind, reader.name, [round(s, 3) for s in got["seconds"]], got["finding"])
    return {
        "series": results,
        "environment": environment(OURS_NEED, PEERS_NEED),
        "rounds": rounds,
        "repeats": repeats,
        "shape": [COLUMNS, ROWS, num_slices],
    }


def table(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    facts = results["environment"]
    shape, count = " × ".join(map(str, results["shape"])), results["rounds"] * results["repeats"]
    lines = [
        "# Reading a DICOM series",
        "",
        "Made by `python scripts/make_peers.py && python scripts/bench_dicom_reading.py --write`. A computed CT of",
        f"{shape} voxels (signed 16 bits, noise of 20 HU) is read {count} times by each reader: in {results['rounds']}",
        f"fresh processes, {results['repeats']} times each after one reading without a clock, in turn with the others.",
        "Files lie in the file cache; imports are not counted. dcm2niix is a program: its start and its writing of a",
        "NIfTI file are counted, loading that file is not. MONAI and SimpleITK give float32 like medseg; pydicom alone",
        "gives stored values and no volume.",
        "",
        "*Times* is the median relative to medseg's: 2.0 takes twice as long. *Right* says whether",
        f"{NUM_POINTS} points of the patient, looked up through the reader's own geometry, hold their values.",
        "",
    ]
    for series in results["series"].values():
        ours = series["readers"]["medseg"]["seconds"]
        lines += [
            f"## {series['what']}",
            "",
            "| reader | best s | median s | slowest s | times | right |",
            "|---|---|---|---|---|---|",
        ]
        for name, entry in series["readers"].items():
            seconds = entry["seconds"]
            figures = [f"{f(seconds):.3f}" for f in (min, median, max)] if seconds else ["–"] * 3
            ratio = f"{median(seconds) / median(ours):.2f}" if seconds and ours else "–"
            lines.append(f"| {' | '.join([name, *figures, ratio, entry['finding'].replace('|', '/')])} |")
        lines.append("")
    lines += ["## What was called, and where", "", *(f"- {r.name}: {r.call}" for r in READERS), ""]
    return "\n".join([*lines, *where(facts), ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one reader."""
    parser = parser_of(__doc__, TABLE)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per reader and series")
    parser.add_argument("--repeats", type=int, default=3, help="timed readings in each")
    parser.add_argument("--slices", type=int, default=SLICES, help="fewer for a quick look; --write needs the default")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder = arguments.measure
        reader = next(r for r in READERS if r.name == name)
        print(json.dumps(measure(reader, Path(folder), arguments.repeats)))
        return
    need_peers(parser)
    if arguments.write and arguments.slices != SLICES:
        parser.error("--write goes with the whole series only")
    results = bench(arguments.rounds, arguments.repeats, arguments.slices)
    show(TABLE, table(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
