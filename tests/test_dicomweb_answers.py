"""Whatever a DICOMweb server answers, it is taken within bounds or refused by a `MedsegError`."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from random import Random

import pydicom
import pytest
from dicom_phantom import GTV, write_series
from fuzz_damage import damaged_dicom, damaged_json
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from medseg.errors import Code, MedsegError
from medseg.remote import dicomweb, server
from medseg.remote.dicomweb import INSTANCE, MODALITY, SERIES, STUDY, DicomWebSink, DicomWebSource
from medseg.remote.exchange import RemoteCase
from medseg.remote.multipart import save_parts

MIB = 2**20
BOUNDARY = "0-a'b"
MULTIPART = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
JSON = "application/dicom+json"
IMAGES = "/dicom-web/studies/1.2/series/1.3"
CASE = RemoteCase("CT_x", (), None, key=("1.2", "1.3"))
Answer = tuple[str, Iterable[bytes]]


class Archive(ThreadingHTTPServer):
    """A server that says what it is told to.

    Args:
        answers: path without the query → what gives content type and body, called with the number of the request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Callable[[int], Answer]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"

    def says(self, path: str, content_type: str, *body: bytes) -> None:
        self.answers[path] = lambda _: (content_type, body)

    def holds(self, *files: bytes, uids: Iterable[str] = ("1.4",)) -> None:
        """Have it give `files` for the images `uids` of a series."""
        self.says(f"{IMAGES}/instances", JSON, json.dumps([result(INSTANCE, uid) for uid in uids]).encode())
        self.says(IMAGES, MULTIPART, *multipart(files))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Archive)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        answer = self.server.answers.get(path)
        content_type, body = answer(len(self.server.asked)) if answer is not None else ("text/plain", ())
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in body:
                self.wfile.write(piece)
        except OSError:  # the client has heard enough
            pass

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def result(*pairs: str) -> dict[str, dict[str, list[str]]]:
    return {tag: {"Value": [value]} for tag, value in zip(pairs[::2], pairs[1::2], strict=True)}


def multipart(files: Iterable[bytes]) -> Iterator[bytes]:
    for content in files:
        yield f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + content
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Archive]:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with Archive() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture
def fetch(archive: Archive, tmp_path: Path) -> Callable[[], list[Path]]:
    def fetched() -> list[Path]:
        folder = tmp_path / "fetched"
        folder.mkdir(exist_ok=True)
        (given,) = DicomWebSource(archive.url, {}).fetch(CASE, folder)
        assert given == folder
        return sorted(folder.iterdir())

    return fetched


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return [path.read_bytes() for path in write_series(tmp_path_factory.mktemp("series"), 0, [GTV])]


def image(pixels: bytes = b"", syntax: str = ExplicitVRLittleEndian) -> bytes:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.4"
    dataset.StudyInstanceUID = "1.2"
    dataset.Rows = dataset.Columns = 8
    dataset.BitsAllocated = 8
    dataset.PixelData = pixels
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    written = BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return written.getvalue()


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_images_are_kept_byte_for_byte(archive: Archive, fetch, slices: list[bytes]) -> None:
    uids = [str(pydicom.dcmread(BytesIO(content)).SOPInstanceUID) for content in slices]
    archive.holds(*slices, uids=uids)
    assert [path.read_bytes() for path in fetch()] == slices
    archive.holds(*slices[:-1], uids=uids)
    with pytest.raises(MedsegError, match="did not send the whole series") as caught:
        fetch()
    assert caught.value.code is Code.TRUNCATED
    archive.says(IMAGES, "application/dicom", slices[0])  # alone, and not wrapped
    archive.says(f"{IMAGES}/instances", JSON, json.dumps([result(INSTANCE, uids[0])]).encode())
    assert [path.read_bytes() for path in fetch()] == slices[:1]


def test_an_image_is_not_inflated_by_the_transfer(archive: Archive, fetch) -> None:
    deflated = image(bytes(100 * MIB), DeflatedExplicitVRLittleEndian)
    assert len(deflated) < MIB
    archive.holds(deflated)
    assert peak_bytes(fetch) < 60 * MIB  # the header may have 16
    assert [path.read_bytes() for path in fetch()] == [deflated]


def test_one_image_without_end_is_refused_on_the_way(archive: Archive, fetch, monkeypatch) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        yield from [*multipart([image()])][:1]
        for _ in range(200):
            sent.append(1)
            yield bytes(MIB)

    archive.holds()
    archive.answers[IMAGES] = lambda _: (MULTIPART, endless())
    monkeypatch.setattr(dicomweb, "MAX_SERIES_BYTES", 4 * MIB)

    def refused() -> None:
        with pytest.raises(MedsegError, match="larger than the folder") as caught:
            fetch()
        assert caught.value.code is Code.LIMIT

    assert peak_bytes(refused) < 16 * MIB
    assert len(sent) < 150


def test_images_without_end_are_refused(archive: Archive, fetch, monkeypatch) -> None:
    monkeypatch.setattr(dicomweb, "MAX_RESULTS", 5)
    archive.holds(*[image()] * 6)
    with pytest.raises(MedsegError, match="has no end") as caught:
        fetch()
    assert caught.value.code is Code.LIMIT


def nested(depth: int) -> bytes:
    """An image that begins with a sequence in a sequence in a sequence, none of which says how long it is."""
    whole = image()
    start = whole.index(b"\x08\x00\x16\x00")
    begin = b"\x08\x00\x06\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return whole[:start] + begin * depth + whole[start:]


@pytest.mark.parametrize("content", [nested(2000), b"", b"<html>", image()[:200]], ids=["deep", "empty", "page", "cut"])
def test_what_is_no_image_is_refused(archive: Archive, fetch, content: bytes) -> None:
    archive.holds(image(), content)
    with pytest.raises(MedsegError, match="image 2: ") as caught:
        fetch()
    assert caught.value.code is Code.MALFORMED and caught.value.where == CASE.case_id


def test_damaged_images_raise_nothing_else(archive: Archive, fetch, slices: list[bytes]) -> None:
    refused = 0
    for number in range(40):
        archive.holds(damaged_dicom(slices[number % len(slices)], Random(number)))
        try:
            fetch()
        except MedsegError as error:
            refused += 1
            assert error.code in (Code.MALFORMED, Code.TRUNCATED), str(error)
    assert refused > 10  # of whole images too: they are not the one that was asked for


@pytest.mark.parametrize(
    "content_type", ["text/html", "", "multipart/related", 'multipart/related; boundary="', "application/dicom+json"]
)
def test_answers_that_are_no_images(archive: Archive, fetch, content_type: str) -> None:
    archive.holds(image())
    archive.says(IMAGES, content_type, image())
    with pytest.raises(MedsegError) as caught:
        fetch()
    assert caught.value.code in (Code.ARCHIVE, Code.TRUNCATED)


SHAPES = [
    [1],
    [None],
    "series",
    5,
    [[result(SERIES, "1.3")]],
    [{SERIES: None}],
    [{SERIES: ["1.3"]}],
    [{SERIES: "1.3"}],
    [{SERIES: {"Value": 5}}],
    [{SERIES: {"Value": "1.3"}}],
    [{SERIES: {"Value": {"0": "1.3"}}}],
    [{SERIES: {"Value": [["1.3"]]}}],
    [{SERIES: {"Value": [{"a": "1.3"}]}}],
    [{STUDY: {"Value": ["1.2"]}, SERIES: {"Value": ["1.\ud800"]}}],
    [{SERIES: {"Value": ["1" * 10_000]}}],
]


@pytest.mark.parametrize("body", [*map(json.dumps, SHAPES), "[" * 100_000, "<html>", '[{"a":', "\xff"])
def test_results_of_other_shapes_are_refused(archive: Archive, body: str) -> None:
    archive.says("/dicom-web/series", JSON, body.encode("latin-1"))
    with pytest.raises(MedsegError, match="cannot be understood") as caught:
        DicomWebSource(archive.url, {}).cases()
    assert caught.value.code is Code.ARCHIVE
    archive.says(f"{IMAGES}/instances", JSON, body.replace(SERIES, INSTANCE).encode("latin-1"))
    with pytest.raises(MedsegError, match="cannot be understood"):
        DicomWebSource(archive.url, {}).digest(CASE)


def test_values_that_are_missing_are_no_fault(archive: Archive) -> None:
    found = [result(STUDY, "1.2", SERIES, "1.3"), {SERIES: {"vr": "UI"}}, {STUDY: {"vr": "UI", "Value": []}}, {}]
    found[0][MODALITY] = {"Value": [None]}
    archive.says("/dicom-web/series", JSON, json.dumps(found).encode())
    (case,) = DicomWebSource(archive.url, {"Modality": "CT"}).cases()
    assert case.key == ("1.2", "1.3") and case.case_id.startswith("CT_")


def test_damaged_results_raise_nothing_else(archive: Archive) -> None:
    whole = json.dumps([result(STUDY, "1.2", SERIES, f"1.3.{n}", MODALITY, "CT") for n in range(3)]).encode()
    source = DicomWebSource(archive.url, {})
    taken = 0
    for number in range(100):
        archive.says("/dicom-web/series", JSON, damaged_json(whole, Random(number)))
        try:
            taken += bool(source.cases())
        except MedsegError as error:
            assert error.code in (Code.ARCHIVE, Code.NO_CASES), str(error)
    assert 10 < taken < 90


def test_pages_without_end_are_refused(archive: Archive, monkeypatch) -> None:
    archive.answers["/dicom-web/series"] = lambda number: (
        JSON,
        [json.dumps([result(STUDY, "1.2", SERIES, f"1.3.{number}.{n}") for n in range(50)]).encode()],
    )
    monkeypatch.setattr(dicomweb, "MAX_RESULTS", 500)
    with pytest.raises(MedsegError, match="has no end") as caught:
        DicomWebSource(archive.url, {}).cases()
    assert caught.value.code is Code.LIMIT and len(archive.asked) == 11


def test_one_page_without_end_is_refused(archive: Archive, monkeypatch) -> None:
    monkeypatch.setattr(server, "MAX_ANSWER_BYTES", MIB)
    archive.answers["/dicom-web/series"] = lambda _: (JSON, (b" " * MIB for _ in range(200)))

    def refused() -> None:
        with pytest.raises(MedsegError, match="has no end") as caught:
            DicomWebSource(archive.url, {}).cases()
        assert caught.value.code is Code.LIMIT

    assert peak_bytes(refused) < 16 * MIB


@pytest.mark.parametrize(
    "body",
    [b"5", b'{"00081198": 5}', b'{"00081198": {"vr": "SQ", "Value": [5]}}', b'{"a": {}}', b"[" * 100_000, b"{"],
)
def test_what_became_of_stored_objects_may_be_nonsense(archive: Archive, tmp_path: Path, body: bytes) -> None:
    archive.says("/dicom-web/studies", JSON, body)
    (tmp_path / "a.seg.dcm").write_bytes(image())
    with pytest.raises(MedsegError) as caught:
        DicomWebSink(archive.url).deliver({"a.seg.dcm": tmp_path / "a.seg.dcm"}, "identity")
    assert caught.value.code is Code.ARCHIVE


CONTENTS = [b"", b"\r\n", f"--{BOUNDARY}".encode(), f"\r\n--{BOUNDARY[:-1]}".encode(), b"\r\n\r\n" + bytes(300) + b"\r"]


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
def test_parts_are_the_same_in_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    message = b"".join(multipart(CONTENTS))
    for name, whole in (
        ("first", message[2:]),
        ("preamble", b"see below\r\n" + message),
        ("after", message + b"\r\nx"),
    ):
        (tmp_path / name).mkdir()
        pieces = (whole[i : i + size] for i in range(0, len(whole), size))
        assert [path.read_bytes() for path in save_parts(MULTIPART, pieces, tmp_path / name)] == CONTENTS
    # Without its end, the last part is as long as the message.
    whole = message[: message.rindex(b"\r\n--")]
    pieces = (whole[i : i + size] for i in range(0, len(whole), size))
    assert [path.read_bytes() for path in save_parts(MULTIPART, pieces, tmp_path)] == CONTENTS


def test_headers_without_end_are_refused(tmp_path: Path) -> None:
    endless = (b"x: y\r\n" * 1000 for _ in range(10**6))
    with pytest.raises(ValueError, match="does not end"):
        list(
            save_parts(
                MULTIPART, (piece for whole in ([f"--{BOUNDARY}".encode()], endless) for piece in whole), tmp_path
            )
        )
