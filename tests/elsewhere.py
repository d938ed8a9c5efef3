"""Other machines, as far as tests need them: an object store that is a folder, and a DICOM archive on loopback."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

import pydicom
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from medseg.remote import storage
from medseg.remote.multipart import save_parts

BOUNDARY = "between-two-parts"
FOUND = ("PatientName", "PatientID", "StudyDate", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality")
"""What searches tell: more than medseg asks for, as archives do."""
STORED = {"00081199": {"vr": "SQ", "Value": []}}
"""ReferencedSOPSequence: nothing was refused."""


@contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """While the block runs, s3://NAME is the folder NAME in this one."""
    system = DirFileSystem(str(folder), LocalFileSystem(auto_mkdir=True))
    with patch.object(storage.Store, "system", property(lambda self: system)):
        yield


@contextmanager
def archive(files: Iterable[Path]) -> Iterator[Archive]:
    """An archive that holds these files."""
    with Archive() as started:
        for path in files:
            started.take(path.read_bytes())
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield started
        finally:
            started.shutdown()
            thread.join()


class Archive(ThreadingHTTPServer):
    """QIDO-RS, WADO-RS and STOW-RS as far as medseg asks for them. Nothing is logged."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.held: dict[str, tuple[pydicom.Dataset, bytes]] = {}
        """SOPInstanceUID → header, and the file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"

    def take(self, content: bytes) -> None:
        """Keep a file."""
        dataset = pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
        self.held[str(dataset.SOPInstanceUID)] = dataset, content

    def of(self, modality: str) -> list[bytes]:
        """The files of a modality."""
        return [content for dataset, content in self.held.values() if dataset.Modality == modality]

    def search(self, parts: Sequence[str], query: dict[str, str]) -> list[dict[str, object]]:
        """Results of a search for what the path ends with."""
        level = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}[parts[-1]]
        modality, offset = query.get("Modality"), int(query.get("offset", 0))
        found: dict[str, dict[str, object]] = {}
        for dataset, _ in self.named(parts):
            if modality is None or dataset.Modality == modality:
                chosen = pydicom.Dataset()
                for keyword in FOUND:
                    if keyword in dataset:
                        chosen.add(dataset[keyword])
                found.setdefault(str(dataset[level].value), chosen.to_json_dict())
        return list(found.values())[offset : offset + int(query.get("limit", len(found)))]

    def named(self, parts: Sequence[str]) -> list[tuple[pydicom.Dataset, bytes]]:
        """What studies/UID/series/UID names."""
        wanted = dict(zip(parts[::2], parts[1::2], strict=False))
        study, series = wanted.get("studies"), wanted.get("series")
        return [
            (dataset, content)
            for dataset, content in self.held.values()
            if study in (None, dataset.StudyInstanceUID) and series in (None, dataset.SeriesInstanceUID)
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Archive

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        parts = address.path.removeprefix("/dicom-web/").strip("/").split("/")
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        if len(parts) % 2:
            self.answer("application/dicom+json", json.dumps(self.server.search(parts, query)).encode())
            return
        delimiter = f"\r\n--{BOUNDARY}".encode()
        header = b"\r\nContent-Type: application/dicom\r\n\r\n"
        body = b"".join(delimiter + header + content for _, content in self.server.named(parts))
        kind = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
        self.answer(kind, body + delimiter + b"--\r\n")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with tempfile.TemporaryDirectory() as folder:
            for path in save_parts(self.headers["Content-Type"], [body], Path(folder)):
                self.server.take(path.read_bytes())
        self.answer("application/dicom+json", json.dumps(STORED).encode())

    def answer(self, kind: str, body: bytes) -> None:
        """Send an answer."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""
