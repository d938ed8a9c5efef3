"""Row D33: nothing that DICOM files or their paths say about a patient gets into what medseg writes or prints.

The canary goes through plan, train (with its report, event files and prepared cases), predict, evaluate, compare and
convert. What may hold it by its nature: a run's places.yaml, and DICOM annotations that are written for a patient.
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import pydicom
import pytest
from dicom_phantom import CORD, GTV, write_rtstruct, write_seg, write_series
from PIL import Image
from pydicom.datadict import dictionary_VR

from medseg.bundle import BUNDLE_FILE, BundleInfo
from medseg.cli import main
from medseg.formats.nifti_names import names_extension
from medseg.inference.case_statistics import STATISTICS_FILE
from medseg.inference.manifest import MANIFEST_FILE

CANARY = "zqCanaryXj"
DATE = "19010203"
UID_ROOT = "1.2.826.0.1.3680043.8.498."
"""pydicom's: all UIDs of the phantoms begin so."""
TAGS = (
    *("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "OtherPatientNames", "PatientComments"),
    *("PatientAddress", "PatientTelephoneNumbers", "PatientMotherBirthName", "PatientBirthName", "MilitaryRank"),
    *("MedicalRecordLocator", "EthnicGroup", "Occupation", "AdditionalPatientHistory", "IssuerOfPatientID"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "StudyDate"),
    *("NameOfPhysiciansReadingStudy", "RequestingPhysician", "InstitutionName", "InstitutionAddress", "SeriesDate"),
    *("InstitutionalDepartmentName", "StationName", "DeviceSerialNumber", "AccessionNumber", "StudyID", "ContentDate"),
    *("StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments", "RequestedProcedureDescription"),
    *("PerformedProcedureStepDescription", "AdmissionID", "RequestAttributesSequence"),
)
PATHS_ALLOWED = ("places.yaml",)
"""Of a run: what resuming needs."""


SETTINGS = (
    "data.labels={tumour: [GTV-1], cord: cord}",
    "data.on_bad_case=skip",
    "data.split.num_folds=2",
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,16,16]",
    "trainer.device=cpu",
    "trainer.max_steps=4",
    "trainer.num_validations=2",
    "trainer.log_steps=1",
)


def mark(path: Path) -> None:
    """Put the canary into every tag that may speak about the patient, private ones included."""
    dataset = pydicom.dcmread(path)
    for tag in TAGS:
        kind = dictionary_VR(tag)
        if kind == "SQ":
            item = pydicom.Dataset()
            item.ScheduledProcedureStepDescription = CANARY
            dataset.RequestAttributesSequence = [item]
        else:
            values = {"DA": DATE, "PN": f"{CANARY}^{CANARY}"}
            # Whose they are must still be told apart: all series of this test are of other patients.
            number = f" {dataset.StudyInstanceUID[-6:]}" if tag == "PatientID" else ""
            setattr(dataset, tag, values.get(kind, CANARY + number))
    dataset.private_block(0x0099, CANARY, create=True).add_new(0x01, "LO", CANARY)
    dataset.save_as(path, enforce_file_format=True)


def draw_twice(path: Path) -> None:
    """Copy a contour, which readers warn of: the log of a run must not say in which file."""
    dataset = pydicom.dcmread(path)
    contours = dataset.ROIContourSequence[0].ContourSequence
    contours.append(deepcopy(contours[0]))
    dataset.save_as(path)


def write_tree(root: Path) -> None:
    """Five patients in folders and files of their names; images that are gone, a cut file, a missing slice."""
    for number in range(5):
        folder = root / f"{CANARY} {number}" / "study" / "series"
        files = write_series(folder, number, [GTV, CORD])
        write = write_seg if number % 2 else write_rtstruct
        write(folder.parent / "drawn" / "annotation.dcm", files, {"GTV-1": GTV, "cord": CORD})
    draw_twice(root / f"{CANARY} 0" / "study" / "drawn" / "annotation.dcm")
    alone = write_series(root / "gone", 7, [GTV])
    write_rtstruct(root / f"{CANARY} 6" / "orphan.dcm", alone, {"GTV-1": GTV})
    for path in alone:
        path.unlink()
    (root / f"{CANARY} 4" / "study" / "series" / "slice_0006.dcm").unlink()
    for path in sorted(root.rglob("*.dcm")):
        mark(path)
        path.rename(path.with_name(f"{CANARY}_{path.name}"))
    cut = next((root / f"{CANARY} 3").rglob("*slice_0012.dcm"))
    (root / f"{CANARY}_cut.dcm").write_bytes(cut.read_bytes()[:300])


@dataclass(frozen=True)
class Traces:
    run: Path
    others: tuple[Path, ...]
    console: str
    of_files: str
    """What plan and convert print: they may name files and folders."""
    root: Path


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """What training, going on, prediction and evaluation leave behind."""
    folder = tmp_path_factory.mktemp("privacy")
    root = folder / f"{CANARY} clinic" / "export"
    write_tree(root)
    names = ("run", "out", "metrics", "some", "planned", "scan", "tree", "compared", "handed on")
    run, out, metrics, some, planned, scan, tree, compared, handed = (folder / name for name in names)
    said, of_files = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(said), redirect_stderr(said):
        main(["train", f'data.root="{root}"', f'hydra.run.dir="{run}"', *SETTINGS])
        main(["train", f"resume={run}", "trainer.max_steps=6"])
        main(["predict", str(run), str(root / f"{CANARY} 0"), str(root / f"{CANARY} 1"), "-o", str(out), "--preview"])
        main(["evaluate", str(run / "validation"), str(run / "validation"), "-o", str(metrics)])
        with suppress(SystemExit):
            bad_too = [str(root / f"{CANARY} {number}") for number in (2, 4)]
            main(["predict", str(run), *bad_too, "-o", str(some), "--on-bad-case", "skip", "--statistics"])
        with naming(of_files):  # it ends with the command that trains, as the user typed it
            main(["plan", f'data.root="{root}"', f'hydra.run.dir="{planned}"', *SETTINGS])
        for made in (scan, compared, handed):
            made.mkdir()
        main(["convert", str(root / f"{CANARY} 0" / "study" / "series"), str(scan / "scan.nii.gz")])
        with suppress(SystemExit), naming(of_files):
            main(["convert", str(root), str(tree)])  # it tells on the screen which files are broken, by their names
        main(["export", str(run), "-o", str(handed / "model.zip")])
        main(["compare", str(metrics), str(metrics), "-o", str(compared / "table.json")])
    others = (out, metrics, some, planned, scan, tree, compared, handed, folder / "prepared")
    return Traces(run, others, said.getvalue(), of_files.getvalue(), root)


@contextmanager
def naming(said: io.StringIO) -> Iterator[None]:
    """Keep what is printed, without breaking the names in it."""
    with patch.dict(os.environ, {"COLUMNS": "2000"}), redirect_stdout(said), redirect_stderr(said):
        yield


def content(path: Path) -> bytes:
    """What a file says: its bytes, unpacked, and the texts of a picture."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            data += b"".join(name.encode() + archive.read(name) for name in archive.namelist())
    if path.suffix == ".png":
        with Image.open(path) as picture:
            data += repr(picture.info).encode()
    return data


def test_the_run_went_through(traces: Traces) -> None:
    out, metrics, some, planned, scan, tree, _, handed, prepared = traces.others
    assert (planned / "plan.yaml").is_file() and (scan / "scan.nii.gz").is_file() and list(tree.rglob("*.nii.gz"))
    assert len(list(prepared.rglob("image.b2nd"))) >= 3 and (traces.run / "report.html").is_file()
    assert (handed / "model.zip").is_file()
    assert CANARY in (traces.run / "places.yaml").read_text(), "the canary was in the path"
    assert (traces.run / BUNDLE_FILE).is_file()
    assert '"code": "E_GAP"' in (some / MANIFEST_FILE).read_text() and (some / STATISTICS_FILE).is_file()
    assert (metrics / "metrics.json").is_file()
    assert len(list(out.glob("*.nii.gz"))) == 2
    info = BundleInfo.read(traces.run)
    assert info.modality == "CT"
    assert info.structures == {"tumour": ("GTV-1",), "cord": ("cord",)}
    assert "E_REFERENCE" in traces.console
    assert "E_GAP" in traces.console
    assert "copies of others" in (traces.run / "train.log").read_text()
    kinds = {path.suffix for path in traces.run.rglob("*") if path.is_file()}
    assert {".csv", ".json", ".png", ".log", ".gz", ".safetensors", ".yaml"} <= kinds
    assert list(traces.run.rglob("events.out.tfevents*"))


def test_nothing_about_the_patient_is_written(traces: Traces) -> None:
    checked = 0
    for folder in (traces.run, *traces.others):
        for path in sorted(folder.rglob("*")):
            assert CANARY.lower() not in path.relative_to(folder.parent).as_posix().lower()
            if not path.is_file() or path.relative_to(folder).parts[0] in PATHS_ALLOWED:
                continue
            data = content(path)
            for secret in (CANARY, DATE, UID_ROOT):
                assert secret.lower().encode() not in data.lower(), f"{secret} in {path.name}"
                assert secret.encode("utf-16-le") not in data, f"{secret} in {path.name}"
            checked += 1
    assert checked > 20


def test_nothing_about_the_patient_is_printed(traces: Traces) -> None:
    assert "Dice" in traces.console
    for secret in (CANARY, DATE, UID_ROOT):
        assert secret.lower() not in traces.console.lower()


def test_what_verbs_print_of_a_tree_is_names_of_files_alone(traces: Traces) -> None:
    """The canary stands in names of files and folders, and in tags: without the former nothing is left of it."""
    text = traces.of_files
    assert CANARY in text and "E_" in text, "the names of files that cannot be converted"
    names = {part for path in (traces.root, *traces.root.rglob("*")) for part in path.parts if CANARY in part}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "FILE")
    for secret in (CANARY, DATE, UID_ROOT):
        assert secret.lower() not in text.lower(), text


def test_nifti_headers_say_nothing(traces: Traces) -> None:
    for path in traces.others[0].glob("*.nii.gz"):
        header = nib.load(path).header
        assert bytes(header["descrip"]).strip(b"\0") in (b"", b"medseg")
        assert {e.content for e in header.extensions} == {names_extension({1: "tumour", 2: "cord"})}
