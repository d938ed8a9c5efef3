"""`medseg predict --from dicomweb --to dicomweb`, against a real Orthanc on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from dicom_phantom import CORD, GTV, write_series

from medseg.cli import main
from medseg.cli.predict import EXIT_BAD_CASES
from medseg.errors import Code, MedsegError
from medseg.inference.ensemble import Ensemble
from medseg.inference.manifest import MANIFEST_FILE
from medseg.remote import exchange, server
from medseg.remote.dicomweb import DicomWebSink, DicomWebSource
from medseg.remote.exchange import BEING_MADE_S, PREFIX, Remote
from medseg.remote.predict import query_of
from medseg.remote.server import Server

PLUGINS = Path("/usr/share/orthanc/plugins")
CANARY = "zqCanaryXj"
"""The patients' name: it may stand in SEG files alone."""
USER, PASSWORD = "reader", "correct horse"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass
class Orthanc:
    """A server with two whole CT series, one that lacks a slice, and one MR series.

    Args:
        folder: of its data.
        port: on loopback.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/dicom-web"

    def start(self) -> None:
        settings = {
            "Name": "tests",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "index"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "Plugins": [str(PLUGINS / "libOrthancDicomWeb.so")],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        program = shutil.which("Orthanc", path=os.environ["PATH"] + ":/usr/sbin")
        assert program is not None
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen([program, str(self.folder / "orthanc.json")], stdout=log, stderr=log)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if self.get("/system").ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.1)
        raise RuntimeError((self.folder / "log.txt").read_text()[-2000:])

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(60)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.root + path, auth=(USER, PASSWORD), timeout=30)

    def segs(self) -> dict[str, pydicom.Dataset]:
        """SOPInstanceUID → SEG that it holds."""
        found = {}
        for instance in self.get("/instances").json():
            dataset = pydicom.dcmread(BytesIO(self.get(f"/instances/{instance}/file").content))
            if dataset.Modality == "SEG":
                found[str(dataset.SOPInstanceUID)] = dataset
        return found

    def forget_segs(self) -> None:
        for series in self.get("/series").json():
            if self.get(f"/series/{series}").json()["MainDicomTags"]["Modality"] == "SEG":
                requests.delete(f"{self.root}/series/{series}", auth=(USER, PASSWORD), timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the archive holds, as folders: two CT series, one that lacks a slice, an MR."""
    folder = tmp_path_factory.mktemp("held")
    for number, (name, modality) in enumerate([("ct1", "CT"), ("ct2", "CT"), ("gap", "CT"), ("mr", "MR")]):
        files = write_series(folder / name, number, [GTV, CORD], modality=modality)
        if name == "gap":
            files.pop(5).unlink()
        for path in files:
            dataset = pydicom.dcmread(path)
            dataset.PatientName = f"{CANARY}^{number}"
            dataset.StudyDate = "20260102" if name != "ct2" else "20260203"
            dataset.save_as(path)
    return folder


@pytest.fixture(scope="module")
def started(held: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if shutil.which("Orthanc", path=os.environ["PATH"] + ":/usr/sbin") is None or not PLUGINS.is_dir():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), free_port())
    orthanc.start()
    for path in sorted(held.rglob("*.dcm")):
        answer = requests.post(f"{orthanc.root}/instances", data=path.read_bytes(), auth=(USER, PASSWORD), timeout=30)
        assert answer.ok, answer.text
    yield orthanc
    orthanc.stop()


@pytest.fixture
def orthanc(started: Orthanc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Orthanc]:
    """The server, with the credentials of this test in the environment, and a folder for temporary files of its own."""
    monkeypatch.setenv("MEDSEG_FROM_USER", USER)
    monkeypatch.setenv("MEDSEG_FROM_PASSWORD", PASSWORD)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield started
    started.forget_segs()


def predict(run: Path, *arguments: object, status: int | None = None) -> None:
    command = ["predict", str(run), "--device", "cpu", "--precision", "fp32", *(str(a) for a in arguments)]
    if status is None:
        main(command)
        return
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == status


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / MANIFEST_FILE).read_text().splitlines()]


def name_of(series: Path, modality: str = "CT") -> str:
    uid = pydicom.dcmread(next(series.glob("*.dcm"))).SeriesInstanceUID
    return f"{modality}_{hashlib.sha256(uid.encode()).hexdigest()[:16]}"


def masks(dataset: pydicom.Dataset) -> dict[tuple[int, float], np.ndarray]:
    """(segment, height) → mask, whatever the order of frames."""
    frames = np.atleast_3d(dataset.pixel_array.T).T
    found = {}
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[segment, float(groups.PlanePositionSequence[0].ImagePositionPatient[2])] = frame
    return found


@pytest.mark.orthanc
def test_from_the_archive_and_back(orthanc: Orthanc, held: Path, tiny_run, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    both = ("--from", "dicomweb", orthanc.url, "--to", "dicomweb", orthanc.url, "-o", out)
    predict(tiny_run.run, *both, "--query", "Modality=CT", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    said = "".join(capfd.readouterr())
    stored = orthanc.segs()
    assert len(stored) == 2
    # As if the files had been here: the same voxels, for the same patient and study, beside the images they refer to.
    predict(tiny_run.run, held / "ct1", held / "ct2", "-o", tmp_path / "here", "--format", "dicom-seg")
    for name in ("ct1", "ct2"):
        here = pydicom.dcmread(tmp_path / "here" / f"{name}.seg.dcm")
        (there,) = [s for s in stored.values() if s.StudyInstanceUID == here.StudyInstanceUID]
        assert there.PatientName == here.PatientName and CANARY in str(there.PatientName)
        assert there.ReferencedSeriesSequence[0].SeriesInstanceUID == here.ReferencedSeriesSequence[0].SeriesInstanceUID
        ours, theirs = masks(here), masks(there)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    # Nothing of a scan stays, and nobody is named.
    assert sorted(p.name for p in out.iterdir()) == ["predictions.json", MANIFEST_FILE]
    assert list((tmp_path / "tmp").iterdir()) == []
    written = "".join(p.read_text() for p in out.iterdir())
    uids = {str(pydicom.dcmread(next((held / n).glob("*.dcm"))).SeriesInstanceUID) for n in ("ct1", "ct2", "gap")}
    for secret in (CANARY, PASSWORD, "127.0.0.1", *uids):
        assert secret not in written, secret
    for secret in (CANARY, PASSWORD, *uids):
        assert secret not in said, secret
    cases = {line["case"]: line for line in lines_of(out) if "case" in line}
    assert cases.keys() == {name_of(held / name) for name in ("ct1", "ct2", "gap")}
    assert cases[name_of(held / "gap")]["failed"]["code"] == "E_GAP"

    # The same command again goes on: nothing is fetched, nothing is stored.
    before = (out / MANIFEST_FILE).read_bytes()
    predict(tiny_run.run, *both, "--query", "Modality=CT", "--on-bad-case", "skip", "--resume", status=EXIT_BAD_CASES)
    assert "2 done before" in capfd.readouterr().out
    assert orthanc.segs().keys() == stored.keys()
    added = [json.loads(line) for line in (out / MANIFEST_FILE).read_bytes()[len(before) :].splitlines()]
    assert [line["case"] for line in added if "case" in line] == [name_of(held / "gap")]

    # A manifest that was lost: all is done again, and the archive has it once.
    shutil.rmtree(out)
    predict(tiny_run.run, *both, "--query", "Modality=CT", "--query", "StudyDate=20260201-20260301")
    assert orthanc.segs().keys() == stored.keys()
    assert [line["case"] for line in lines_of(out) if "case" in line] == [name_of(held / "ct2")]


@pytest.mark.orthanc
def test_an_archive_that_goes_down_ends_the_work_and_resume_goes_on(
    orthanc: Orthanc, held: Path, tiny_run, tmp_path: Path, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(server, "ATTEMPTS", 1)
    plain, calls = Ensemble.predict_case, []

    def predict_and_pull_the_plug(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            orthanc.stop()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Ensemble, "predict_case", predict_and_pull_the_plug)
    out = tmp_path / "out"
    both = ("--from", "dicomweb", orthanc.url, "--to", "dicomweb", orthanc.url, "-o", out, "--on-bad-case", "skip")
    predict(tiny_run.run, *both, "--query", "Modality=CT", status=2)
    orthanc.start()
    assert "E_ARCHIVE: the server does not answer" in capfd.readouterr().err
    assert len(orthanc.segs()) == 1  # the first is done, and nothing after the second was tried
    done = {line["case"] for line in lines_of(out) if "case" in line and "failed" not in line}
    assert len(done) == 1 and list((tmp_path / "tmp").iterdir()) == []
    calls[:] = [0, 0]
    predict(tiny_run.run, *both, "--query", "Modality=CT", "--resume", status=EXIT_BAD_CASES)
    assert len(orthanc.segs()) == 2 and len(calls) == 3  # one more; the gap is refused before


@pytest.mark.orthanc
def test_credentials(orthanc: Orthanc, tiny_run, tmp_path: Path, capfd, monkeypatch) -> None:
    where = ("--from", "dicomweb", orthanc.url, "-o", tmp_path / "out")
    monkeypatch.setenv("MEDSEG_FROM_PASSWORD", "wrong")
    predict(tiny_run.run, *where, status=2)
    assert "E_ARCHIVE: the server refuses the credentials" in (said := capfd.readouterr().err) and "HTTP 401" in said
    monkeypatch.delenv("MEDSEG_FROM_USER")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    predict(tiny_run.run, *where, status=2)
    assert "the server wants credentials" in capfd.readouterr().err
    (tmp_path / "netrc").write_text(f'machine 127.0.0.1 login {USER} password "{PASSWORD}"\n')
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # NIfTI stays here where nothing is sent back; a query that nothing fits is said so.
    predict(tiny_run.run, *where, "--query", "Modality=MR")
    (label,) = (tmp_path / "out").glob("*.nii.gz")
    assert label.name.startswith("MR_")
    predict(tiny_run.run, *where, "--query", "Modality=PT", status=2)
    assert "E_NO_CASES" in capfd.readouterr().err


@pytest.mark.orthanc
def test_pages_and_transfers_that_break_off(orthanc: Orthanc, held: Path, monkeypatch, tmp_path: Path) -> None:
    from medseg.remote import dicomweb

    whole = DicomWebSource(orthanc.url, {}).cases()
    assert [case.case_id[:3] for case in whole] == ["CT_", "CT_", "CT_", "MR_"]
    case = next(c for c in whole if c.case_id == name_of(held / "ct1"))
    digest = DicomWebSource(orthanc.url, {}).digest(case)
    monkeypatch.setattr(dicomweb, "PAGE", 2)
    source = pickle.loads(pickle.dumps(DicomWebSource(orthanc.url, {})))  # as Ray's processes get it
    assert source.cases() == whole and source.digest(case) == digest
    plain = dicomweb.save_parts

    def cut(*args):
        return islice(plain(*args), 4)

    with Remote(source, None) as ends:
        local = ends.fetch(case)
        assert len(list(local.images[0].glob("*.dcm"))) == 12
        assert local.images[0].parent.stat().st_mode & 0o077 == 0
        ends.drop(case)
        assert not local.images[0].exists()
        monkeypatch.setattr(dicomweb, "save_parts", cut)
        with pytest.raises(MedsegError, match="did not send the whole series") as caught:
            ends.fetch(case)
        assert caught.value.code is Code.TRUNCATED and not ends.is_fatal(caught.value)
        monkeypatch.setattr(dicomweb, "MAX_SERIES_BYTES", 1000)
        with pytest.raises(MedsegError, match="E_LIMIT"):
            ends.fetch(case)
        assert not local.images[0].exists()


@contextmanager
def answering(answers: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, Counter[str]]]:
    """URL of a server on loopback, and how often each method and path were asked for."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked[f"{self.command} {self.path.partition('?')[0]}"] += 1
            answers(self)

        do_GET = do_POST = answer

        def log_message(self, *arguments: object) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def send(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "json", longer: int = 0) -> None:
    request.send_response(status)
    request.send_header("Content-Type", {"json": "application/dicom+json"}.get(kind, kind))
    request.send_header("Content-Length", str(len(body) + longer))
    request.end_headers()
    request.wfile.write(body)


def found(**values: str) -> bytes:
    """The one result of a search."""
    tags = {"study": "0020000D", "series": "0020000E", "instance": "00080018", "modality": "00080060"}
    return json.dumps([{tags[name]: {"vr": "UI", "Value": [value]} for name, value in values.items()}]).encode()


def test_a_series_that_always_breaks_off_is_set_aside_and_a_dead_server_is_not(monkeypatch) -> None:
    monkeypatch.setattr(server, "PAUSE_S", 0.0)
    is_dead = False

    def answers(request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if is_dead:
            send(request, b"", longer=10)
        elif path == "/studies/1.2/series/1.3":
            send(request, b"--b\r\n\r\nhalf", kind='multipart/related; type="application/dicom"; boundary=b', longer=99)
        elif "offset=0" in request.path or path == "/studies":
            send(request, found(study="1.2", series="1.3", instance="1.4", modality="CT"))
        else:
            send(request, b"[]")

    with answering(answers) as (url, asked), Remote(DicomWebSource(url, {}), None) as ends:
        (case,) = ends.source.cases()  # type: ignore[union-attr]
        with pytest.raises(MedsegError, match="answers, but not to this") as caught:
            ends.fetch(case)
        assert caught.value.code is Code.ARCHIVE and not ends.is_fatal(caught.value)
        assert asked["GET /studies/1.2/series/1.3"] == server.ATTEMPTS
        is_dead = True
        with pytest.raises(MedsegError, match="does not answer") as caught:
            ends.digest(case)
        assert ends.is_fatal(caught.value)


def test_a_server_that_is_always_too_busy_for_one_series(monkeypatch) -> None:
    def answers(request: BaseHTTPRequestHandler) -> None:
        busy = request.path.partition("?")[0] == "/studies/1.2/series/1.3"
        send(request, b"" if busy else found(study="1.2"), 504 if busy else 200)

    monkeypatch.setattr(server, "ATTEMPTS", 2)
    with answering(answers) as (url, asked):
        archive = Server(url, "FROM")
        archive.ask(lambda client: client.search_for_studies(limit=1), "a study")
        archive._client._wait_exponential_multiplier = 1
        with pytest.raises(MedsegError, match="answers, but not to this") as caught:
            archive.ask(lambda client: client._http_get(f"{url}/studies/1.2/series/1.3"), "a series")
        assert not isinstance(caught.value, exchange.Unreachable) and asked["GET /studies/1.2/series/1.3"] == 2


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A file as a sink gets it."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.SegmentationStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.4"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", "1.3"
    dataset.save_as(tmp_path / "a.seg.dcm", enforce_file_format=True)
    return tmp_path / "a.seg.dcm"


@pytest.mark.parametrize("status", [409, 202])
@pytest.mark.parametrize("has", [True, False])
def test_what_the_archive_has_already_counts_as_stored(status: int, has: bool, drawn: Path) -> None:
    refused = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0x0111]}}]}}

    def answers(request: BaseHTTPRequestHandler) -> None:
        if request.command == "POST":
            send(request, json.dumps(refused).encode(), status)
        elif has:
            send(request, found(instance=str(pydicom.dcmread(drawn).SOPInstanceUID)))
        else:
            send(request, b"", 404)

    with answering(answers) as (url, asked):
        sink = DicomWebSink(url)
        if has:
            sink.deliver({drawn.name: drawn}, "identity")
        else:
            with pytest.raises(MedsegError, match="E_ARCHIVE"):
                sink.deliver({drawn.name: drawn}, "identity")
        assert asked["POST /studies"] == 1 and asked.total() == 2


def test_the_uids_follow_from_the_program_too(tiny_run, tmp_path: Path, monkeypatch) -> None:
    identities: list[str] = []
    monkeypatch.setattr(DicomWebSink, "deliver", lambda self, files, identity: identities.append(identity))
    for number, version in enumerate(("1.0", "1.0", "1.1")):
        monkeypatch.setattr("medseg.inference.manifest.__version__", version)
        to = ("--to", "dicomweb", "http://127.0.0.1:9/dicom-web", "-o", tmp_path / str(number))
        predict(tiny_run.run, tiny_run.dicom, *to)
    first, same, other = identities
    assert first == same != other and "cpu" in first


def test_a_server_that_is_not_there(tiny_run, tmp_path: Path, capfd) -> None:
    begin = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}/dicom-web"
    predict(tiny_run.run, "--from", "dicomweb", url, "-o", tmp_path / "out", status=2)
    said = capfd.readouterr().err
    assert "E_ARCHIVE: the server does not answer" in said and "check the URL" in said
    assert time.monotonic() - begin < 20 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "dicomweb", "https://reader:secret@pacs/dicom-web"), "a password on the command line"),
        (("--from", "dicomweb", "pacs.example.org"), "not the URL of a DICOMweb service"),
        (("--from", "dicomweb", "https://pacs/x", "--query", "Modalty=CT"), "did you mean 'Modality'"),
        (("--from", "dicomweb", "https://pacs/x", "--query", "CT"), "this is no query"),
        (("--from", "dicomweb", "https://pacs/x", "scan.nii.gz"), "scans are named twice"),
        (("scan.nii.gz", "--query", "Modality=CT"), "a query is answered by an archive"),
        (("scan.nii.gz", "--to", "dicomweb", "https://pacs/x", "--format", "nifti"), "takes DICOM only"),
    ],
)
def test_what_is_refused_before_anything_is_sent(arguments, said: str, tiny_run, tmp_path: Path, capfd) -> None:
    predict(tiny_run.run, *arguments, "-o", tmp_path / "out", status=2)
    shown = capfd.readouterr().err
    assert said in shown and "secret" not in shown
    assert not (tmp_path / "out").exists()


def test_credentials_of_one_server_are_not_sent_to_another(monkeypatch) -> None:
    monkeypatch.setenv("MEDSEG_FROM_TOKEN", "of-the-first")
    same = DicomWebSink("https://pacs.example.org/other/root", "https://pacs.example.org/dicom-web")
    other = DicomWebSink("https://pacs.example.com/dicom-web", "https://pacs.example.org/dicom-web")
    assert same.server._session().auth.token == "of-the-first"
    assert other.server._session().auth is None
    monkeypatch.setenv("MEDSEG_TO_TOKEN", "of-the-second")
    assert other.server._session().auth.token == "of-the-second"
    assert b"of-the-second" not in pickle.dumps(other)
    assert Server("https://pacs.example.org/dicom-web", "FROM")._session().verify is True


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("http://pacs/dicom-web", True),
        ("https://pacs/x", False),
        ("http://127.0.0.1:80/x", False),
        ("http://[::1]/x", False),
    ],
)
def test_an_unencrypted_way_is_noticed(url: str, readable: bool) -> None:
    assert Server(url, "FROM").is_readable_on_the_way is readable


def test_queries_hold_equals_signs() -> None:
    assert query_of(["StudyDescription=a=b", " Modality = CT "]) == {"StudyDescription": "a=b", "Modality": "CT"}


def test_what_a_killed_process_left_is_removed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Remote(None, None):
        (living,) = tmp_path.glob(PREFIX + "*")
        left = tmp_path / f"{PREFIX}killed"
        left.mkdir()
        for folder in (living, left):
            (folder / "slice.dcm").touch()
            os.utime(folder, (time.time() - 2 * BEING_MADE_S,) * 2)
        fresh = tmp_path / f"{PREFIX}fresh"
        fresh.mkdir()
        exchange._sweep()
        assert living.is_dir() and fresh.is_dir() and not left.exists()
    assert not living.exists()
