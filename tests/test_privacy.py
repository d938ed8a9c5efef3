"""Row D33: nothing that DICOM files or their paths say about a patient gets into what medseg writes or prints.

The canary goes through plan, train (with its report, event files and prepared cases), predict, evaluate, compare and
convert; through predictions from and to an archive, an object store and a cluster; through tune, select, notebooks and
looks into a network; through a training of two processes; and through classification, pretraining, preparation,
features and survival. What may hold it by its nature: a run's places.yaml, and DICOM annotations that are written for a
patient.
"""

from __future__ import annotations

import gzip
import io
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import REPOSITORY
from dicom_phantom import CORD, GTV, write_rtstruct, write_seg, write_series
from elsewhere import archive, bucket
from PIL import Image
from pydicom.datadict import dictionary_VR

from medseg.bundle import BUNDLE_FILE, BundleInfo
from medseg.classification.cases import find_classified, find_images
from medseg.cli import main
from medseg.formats.nifti_names import names_extension
from medseg.inference.case_statistics import STATISTICS_FILE
from medseg.inference.manifest import MANIFEST_FILE

CANARY = "zqCanaryXj"
DATE = "19010203"
UID_ROOT = "1.2.826.0.1.3680043.8.498."
"""pydicom's: all UIDs of the phantoms begin so."""
SECRETS = (CANARY, DATE, UID_ROOT)
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


def silent(folder: Path) -> int:
    """Check that no file in a folder says anything about a patient; how many there are."""
    checked = 0
    for path in sorted(folder.rglob("*")):
        assert CANARY.lower() not in path.relative_to(folder.parent).as_posix().lower()
        if not path.is_file() or (path.name in PATHS_ALLOWED and (path.parent / "config.yaml").is_file()):
            continue
        data = content(path)
        for secret in SECRETS:
            assert secret.lower().encode() not in data.lower(), f"{secret} in {path.relative_to(folder.parent)}"
            assert secret.encode("utf-16-le") not in data, f"{secret} in {path.relative_to(folder.parent)}"
        checked += 1
    return checked


def without_names(text: str, root: Path) -> str:
    """What was printed, without the names of files and folders of the data."""
    names = {part for path in (root, *root.rglob("*")) for part in path.parts if CANARY in part}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "FILE")
    return text


def test_nothing_about_the_patient_is_written(traces: Traces) -> None:
    assert sum(silent(folder) for folder in (traces.run, *traces.others)) > 20


def test_nothing_about_the_patient_is_printed(traces: Traces) -> None:
    assert "Dice" in traces.console
    for secret in SECRETS:
        assert secret.lower() not in traces.console.lower()


def test_what_verbs_print_of_a_tree_is_names_of_files_alone(traces: Traces) -> None:
    """The canary stands in names of files and folders, and in tags: without the former nothing is left of it."""
    assert CANARY in traces.of_files and "E_" in traces.of_files, "the names of files that cannot be converted"
    for secret in SECRETS:
        assert secret.lower() not in without_names(traces.of_files, traces.root).lower()


def test_nifti_headers_say_nothing(traces: Traces) -> None:
    for path in traces.others[0].glob("*.nii.gz"):
        header = nib.load(path).header
        assert bytes(header["descrip"]).strip(b"\0") in (b"", b"medseg")
        assert {e.content for e in header.extensions} == {names_extension({1: "tumour", 2: "cord"})}


# What is fetched, searched, looked into, and done by other processes


FEW = ("trainer.max_steps=2", "trainer.num_validations=1", "trainer.final_predictions=false", "trainer.report=false")
PLACES = ("archived", "stored", "searched", "inside", "pictured", "best", "notebooks")


@pytest.fixture(scope="module")
def newer(traces: Traces, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """What predictions from and to elsewhere, a search, a choice and looks into a network leave behind."""
    folder = tmp_path_factory.mktemp("newer")
    archived, stored, searched, inside, pictured, best, notebooks = (folder / name for name in PLACES)
    said, of_files = io.StringIO(), io.StringIO()
    series = [traces.root / f"{CANARY} {number}" / "study" / "series" for number in (0, 1, 4)]
    stores = folder / "stores"
    for number, source in enumerate(series):
        shutil.copytree(source, stores / f"{CANARY}-bucket" / "scans" / f"c{number}")
    shutil.copytree(traces.run, folder / "other")
    run, place = str(traces.run), f"s3://{CANARY}-bucket"
    (folder / "tmp").mkdir()
    with chdir(folder), redirect_stdout(said), redirect_stderr(said), elsewhere_is(folder / "tmp"):
        with archive([path for source in series for path in source.iterdir()]) as pacs, suppress(SystemExit):
            ends = ("--from", "dicomweb", pacs.url, "--to", "dicomweb", pacs.url, "--on-bad-case", "skip")
            main(["predict", run, *ends, "-o", str(archived), "--statistics"])
        assert len(pacs.of("SEG")) == 2
        with bucket(stores), suppress(SystemExit):
            ends = ("--from", "storage", f"{place}/scans", "--to", "storage", f"{place}/labels")
            main(["predict", run, *ends, "--on-bad-case", "skip", "-o", str(stored), "--statistics", "--preview"])
        shutil.copytree(stores / f"{CANARY}-bucket" / "labels", stored / "labels")
        search = (f'data.root="{traces.root}"', *SETTINGS, *FEW, "optimizer.lr=tag(log,interval(1e-4,1e-2))")
        main(["tune", "-o", str(searched), "--trials", "2", *search])
        looks = ("--image", str(series[0]), "--steps", "1", "--show", "maps,saliency", "--tensorboard")
        main(["inspect", run, *looks, "-o", str(inside)])
        main(["select", run, str(folder / "other"), "-o", str(best), "--data", str(traces.root), "--device", "cpu"])
        main(["verify", run])
        with naming(of_files), patch.object(import_module("medseg.cli.notebook"), "_serve", lambda *_: 0):
            main(["inspect", str(traces.root), "--pictures", str(pictured)])
            with suppress(SystemExit):
                main(["notebook", run, "-o", str(notebooks), "--no-browser"])
    assert not list((folder / "tmp").iterdir())
    return Traces(
        traces.run, tuple(folder / name for name in PLACES), said.getvalue(), of_files.getvalue(), traces.root
    )


@contextmanager
def elsewhere_is(temporary: Path) -> Iterator[None]:
    """Scans are fetched into this folder, by no one's credentials."""
    with patch.object(tempfile, "tempdir", str(temporary)), patch.dict(os.environ, {"NETRC": str(temporary / "none")}):
        yield


def test_what_is_newer_writes_nothing_about_the_patient(newer: Traces) -> None:
    archived, stored, searched, inside, pictured, best, notebooks = newer.others
    for folder in (archived, stored):
        assert '"code": "E_GAP"' in (folder / MANIFEST_FILE).read_text() and (folder / STATISTICS_FILE).is_file()
    assert len(list((stored / "labels").glob("*.nii.gz"))) == 2
    assert len(list(searched.glob("trial_*/checkpoints/best.safetensors"))) == 2 and (searched / "sweep.csv").is_file()
    assert list(inside.rglob("events.out.tfevents*")) and (inside / "saliency_gradient.png").is_file()
    assert list(pictured.rglob("*.png")) and (best / "selection.md").is_file() and list(notebooks.glob("*.ipynb"))
    for folder in newer.others:
        assert silent(folder) > 0


def test_what_is_newer_prints_nothing_about_the_patient(newer: Traces) -> None:
    for said in ("E_GAP", "best of 2", "saliency"):
        assert said in newer.console
    for secret in SECRETS:
        assert secret.lower() not in newer.console.lower()
        assert secret.lower() not in without_names(newer.of_files, newer.root).lower()


# Other tasks, and verbs about images that need no trained network


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `traces.root`, for tests that need no training."""
    root = tmp_path_factory.mktemp("tree") / f"{CANARY} clinic" / "export"
    write_tree(root)
    return root


def said_nothing(said: str, root: Path) -> None:
    """Check what was printed: names of files and folders may stand there, as in `of_files`."""
    for secret in SECRETS:
        assert secret.lower() not in without_names(said, root).lower(), said


def test_classification_says_nothing_about_the_patient(tmp_path: Path) -> None:
    """Series of equal names in folders that are named by patients: training, going on, predictions, their scores."""
    root = tmp_path / f"{CANARY} clinic" / "classes"
    for number in range(8):
        series = root / ("ill" if number % 2 else "well") / f"{CANARY} {number}" / "series"
        for path in write_series(series, number, [GTV] if number % 2 else [CORD]):
            mark(path)
            path.rename(path.with_name(f"{CANARY}_{path.name}"))
    next((root / "ill" / f"{CANARY} 1").rglob("*_0006.dcm")).unlink()
    run, out, metrics = (tmp_path / name for name in ("run", "out", "metrics"))
    few = ("trainer.max_steps=2", "trainer.num_validations=1", "trainer.log_steps=1", "trainer.worst_cases=1")
    small = ("model.widths=[4,8]", "trainer.batch_size=4", "data.split.num_folds=2", "trainer.device=cpu")
    said = io.StringIO()
    with chdir(tmp_path), naming(said):
        data = (f'data.root="{root}"', "data.on_bad_case=skip", f'hydra.run.dir="{run}"')
        main(["train", "task=classification", *data, *few, *small])
        main(["train", f"resume={run}", "trainer.max_steps=3"])
        with suppress(SystemExit):
            main(["predict", str(run), str(root), "-o", str(out), "--on-bad-case", "skip", "--device", "cpu"])
        main(["evaluate", str(out), str(root), "-o", str(metrics), "--report", "--missing", "skip"])
    assert CANARY in (run / "places.yaml").read_text() and (run / "report.html").is_file()
    assert list((run / "validation" / "worst").glob("*.png")) and list(run.rglob("events.out.tfevents*"))
    described = (out / "predictions.json").read_text()
    assert "E_GAP" in described and "E_GAP" in said.getvalue()
    assert (metrics / "report.html").is_file() and len((out / "predictions.csv").read_text().splitlines()) == 8
    assert sum(silent(folder) for folder in (run, out, metrics)) > 20
    for secret in SECRETS:
        assert secret.lower() not in said.getvalue().lower()


def test_images_of_equal_names_are_told_apart_without_the_names_of_patients(tmp_path: Path) -> None:
    """Ids keep classes and splits, and the images of a folder side by side; predictions have those of references."""
    for split in ("train", "test"):
        for place in ("disc/1.png", f"ring/{CANARY} a/1.png", f"ring/{CANARY} b/1.png", f"ring/{CANARY} a/2.png"):
            path = tmp_path / split / place
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), len(place)).save(path)
    ids = [case.case_id for case in find_classified(tmp_path).cases]
    assert len(set(ids)) == 8 and {"train/disc/1", "test/disc/1"} < set(ids)
    assert CANARY not in " ".join(ids)
    of_two = {case_id.rpartition("/")[0] for case_id in ids if case_id.endswith("/2")}
    folders = [case_id.rpartition("/")[0] for case_id in ids]
    assert sorted(map(folders.count, of_two)) == [2, 2] and folders == sorted(folders)
    references = find_classified(tmp_path / "test").cases
    assert [c.case_id for c in find_images([tmp_path / "test"], ("disc", "ring")).cases] == [
        c.case_id for c in references
    ]


def test_pretraining_says_nothing_about_the_patient(tree: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", io.StringIO()
    with chdir(tmp_path), naming(said):
        settings = (f'data.root="{tree}"', f'hydra.run.dir="{run}"', *SETTINGS[1:], "trainer.max_steps=2")
        main(["train", "task=pretraining", *settings, "trainer.num_validations=1"])
        main(["train", f"resume={run}", "trainer.max_steps=3"])
    assert CANARY in (run / "places.yaml").read_text() and "E_GAP" in said.getvalue()
    assert list(run.rglob("pictures/*.png")) and list((tmp_path / "prepared").rglob("image.b2nd"))
    assert silent(run) > 5 and silent(tmp_path / "prepared") > 3
    for secret in SECRETS:
        assert secret.lower() not in said.getvalue().lower()


def test_preparation_says_nothing_about_the_patient(tree: Path, tmp_path: Path) -> None:
    store, said = tmp_path / "store", io.StringIO()
    with chdir(tmp_path), naming(said):
        main(["prepare", f'data.root="{tree}"', f'data.store="{store}"', *SETTINGS])
    assert "E_GAP" in said.getvalue() and len(list(store.rglob("image.b2nd"))) >= 3
    assert silent(tmp_path) > 3
    said_nothing(said.getvalue(), tree)


def test_features_say_nothing_about_the_patient(tree: Path, tmp_path: Path) -> None:
    """Of SEG and RTSTRUCT files; who the patients are is told by pseudonyms."""
    out, said = tmp_path / "out" / "features.csv", io.StringIO()
    with chdir(tmp_path), naming(said):
        names = ("--families", "shape,intensity", "--on-bad-case", "skip")
        main(["measure", str(tree), str(tree), "-o", str(out), *names])
    text = out.read_text()
    assert "GTV-1" in text and "cord" in text and "E_GAP" in text and "E_GAP" in said.getvalue()
    assert "1 files that cannot be read as DICOM were left out" in said.getvalue()
    assert silent(out.parent) == 1
    for secret in SECRETS:
        assert secret.lower() not in said.getvalue().lower()


def test_survival_knows_cases_by_their_ids(tmp_path: Path) -> None:
    """Neither the folder of a table nor its columns of words are in what is written."""
    pytest.importorskip("lifelines", reason='lifelines is not installed: pip install "medseg[survival]"')
    table, out, said = tmp_path / f"{CANARY} clinic" / "table.csv", tmp_path / "out", io.StringIO()
    table.parent.mkdir()
    random = np.random.default_rng(0)
    rows = [
        f"c{n},{CANARY}^{n},{DATE},{random.exponential():.3f},{n % 3 > 0:d},{random.normal():.3f}" for n in range(40)
    ]
    table.write_text("\n".join(["case,name,born,months,died,volume", *rows]))
    with chdir(tmp_path), naming(said):
        columns = ("--time", "months", "--event", "died", "--features", "volume")
        main(["survival", str(table), *columns, "--folds", "2", "-o", str(out)])
    assert "c39," in (out / "risk.csv").read_text() and silent(out) > 4
    for secret in SECRETS:
        assert secret.lower() not in said.getvalue().lower()


@pytest.mark.slow
def test_executed_notebooks_say_nothing_about_the_patient(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are handed on, with what their cells show: the first one that cases are bad, with a traceback."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("MEDSEG_RUNS", str(traces.run))
    monkeypatch.setenv("MEDSEG_FOLDER", str(traces.root))
    for name, fails in (("01_inspect_a_data_set", True), ("04_inspect_predictions", False)):
        notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(REPOSITORY / "notebooks")}}
        settings = {"timeout": 600, "kernel_name": "python3", "allow_errors": fails, "resources": resources}
        nbclient.NotebookClient(notebook, **settings).execute()
        assert any(cell.get("outputs") for cell in notebook.cells)
        text = nbformat.writes(notebook).lower()
        for secret in SECRETS:
            assert secret.lower() not in text, f"{secret} in {name}"


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_writes_nothing_about_the_patient(traces: Traces, tmp_path: Path) -> None:
    """Its own logs too, which stay behind on every node."""
    pytest.importorskip("ray", reason='ray is not installed: pip install "medseg[ray]"')
    temporary = Path(tempfile.mkdtemp(prefix="r"))  # short: the names of sockets have 107 bytes
    out = tmp_path / "out"
    scans = [str(traces.root / f"{CANARY} {number}") for number in (1, 4)]
    command = [sys.executable, "-m", "medseg", "predict", str(traces.run), *scans, "-o", str(out), "--device", "cpu"]
    mine = {"RAY_TMPDIR": str(temporary), "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    environ = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | mine
    try:
        done = subprocess.run(
            [*command, "--engine", "ray", "--workers", "1", "--on-bad-case", "skip"],
            env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 3 and "E_GAP" in done.stdout + done.stderr, done.stdout + done.stderr
        assert list(temporary.rglob("*.log")) and silent(temporary) > 3
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert silent(out) == 3
    for secret in SECRETS:
        assert secret.lower() not in (done.stdout + done.stderr).lower()


@pytest.mark.slow
def test_several_processes_write_nothing_about_the_patient(traces: Traces, tmp_path: Path) -> None:
    """What each of them logs, and what is said of a case that one of them refuses."""
    run = tmp_path / "run"
    settings = (f'data.root="{traces.root}"', f'hydra.run.dir="{run}"', *SETTINGS, "trainer.devices=2")
    command = [sys.executable, "-m", "medseg", "train", *settings, "data.plan.batch_size=2"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "E_GAP" in done.stdout + done.stderr and silent(run) > 20
    for secret in SECRETS:
        assert secret.lower() not in (done.stdout + done.stderr).lower()
