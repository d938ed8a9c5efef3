"""DICOM archives over DICOMweb: QIDO-RS finds series, WADO-RS fetches them, STOW-RS stores what was drawn.

Source:
    DICOM PS3.18, Web Services: 8.3.4 and 10.6 (search), 10.4 (retrieve), 10.5 (store).
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.export import ENDINGS, Form
from medseg.formats.dicom.files import series_names
from medseg.formats.dicom.parsing import parse
from medseg.remote.exchange import RemoteCase, Unreachable
from medseg.remote.multipart import CHUNK_BYTES, save_parts
from medseg.remote.server import Server

STUDY, SERIES, INSTANCE, MODALITY = "0020000D", "0020000E", "00080018", "00080060"
PAGE = 500
"""Results that are asked for at once."""
DIGITS = 16
"""Of the digest in the name of a case: ten million series get as many names."""
MAX_SERIES_BYTES = 2**35
"""Largest series that is fetched (32 GiB)."""
MAX_DISK_SHARE = 0.8
"""Share of the free disk that one series may fill."""
MAX_RESULTS = 2**20
"""Most series of an archive, and most images of a series."""
MAX_LETTERS = 256
"""Longest value in the results of a search; by the standard a UID has 64."""
AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
NO_IMAGES = frozenset(("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "DOC", "REG", "FID", "AU"))
"""Modalities of series that hold no scans."""
WHOLE = 2**62
"""A chunk that holds any message: one that is sent in pieces could not be sent again."""


class DicomWebSource:
    """The series of an archive.

    Args:
        url: of its DICOMweb service.
        query: DICOM keyword → value that series, or their studies, must have.
        modality: of the series, where `query` does not say; None: all that hold images.
    """

    def __init__(self, url: str, query: Mapping[str, str], modality: str | None = None) -> None:
        self.server = Server(url, "FROM")
        self.query = dict(query) if modality is None else {"Modality": modality, **query}

    def cases(self) -> list[RemoteCase]:
        """The series, each under the digest of its UID.

        Raises:
            MedsegError: E_ARCHIVE; E_NO_CASES where none fits the query.
        """
        found: dict[str, tuple[str, str]] = {}
        for item in self._pages(lambda client: client.search_for_series, self.query, SERIES, "series"):
            modality = item.get(MODALITY) or self.query.get("Modality", "")
            study, series = item.get(STUDY), item.get(SERIES)
            if study and series and modality not in NO_IMAGES:
                kind = series_names({series: modality})[series].rsplit("_", 1)[0]
                found[f"{kind}_{hashlib.sha256(series.encode()).hexdigest()[:DIGITS]}"] = (study, series)
        if not found:
            raise MedsegError(
                Code.NO_CASES,
                "no series of the archive fits the query",
                where=self.server.name,
                got="a query for " + (", ".join(sorted(self.query)) or "everything"),
                remedy="widen the query (--query KEYWORD=VALUE); without one, the model's modality is asked for",
            )
        return [RemoteCase(case_id, (), None, key=key) for case_id, key in sorted(found.items())]

    def digest(self, case: RemoteCase) -> str:
        """SHA-256 of the UIDs of its images: DICOM gives an image that changes another one."""
        return hashlib.sha256(" ".join(sorted(self._instances(case))).encode()).hexdigest()

    def fetch(self, case: RemoteCase, folder: Path) -> tuple[Path, ...]:
        """Write the images of a series, as the archive keeps them.

        Raises:
            MedsegError: E_TRUNCATED where images are missing after the fetch; E_LIMIT for what the disk does not hold;
                E_MALFORMED for what is no DICOM; E_ARCHIVE.
        """
        expected = self._instances(case)
        received = self.server.ask(lambda client: self._receive(client, case, folder), "a series")
        if missing := len(expected - received):
            raise MedsegError(
                Code.TRUNCATED,
                "the archive did not send the whole series",
                where=case.case_id,
                expected=f"{len(expected)} images",
                got=f"{missing} of them are missing",
                remedy="try again with --resume; look into the server's log",
            )
        return (folder,)

    def _receive(self, client: Any, case: RemoteCase, folder: Path) -> set[str]:
        for path in folder.iterdir():  # of an attempt that broke off
            path.unlink()
        room = min(MAX_SERIES_BYTES, int(shutil.disk_usage(folder).free * MAX_DISK_SHARE))
        study, series = (quote(uid, safe="") for uid in case.key)
        received: set[str] = set()
        # Not `iter_series`: it holds images in memory, and parses and inflates whatever they say.
        with client._http_get(
            f"{self.server.url}/studies/{study}/series/{series}", headers={"Accept": AS_STORED}, stream=True
        ) as answer:
            chunks = _within(answer.iter_content(CHUNK_BYTES), room, case)
            for number, path in enumerate(save_parts(answer.headers.get("Content-Type", ""), chunks, folder), start=1):
                received.add(_instance_of(path, case, number))
                if number > MAX_RESULTS:
                    raise _endless(case.case_id, "images of a series", "leave it out with --on-bad-case skip")
        return received

    def _instances(self, case: RemoteCase) -> set[str]:
        found = self._pages(lambda client: _of_series(client, *case.key), {}, INSTANCE, "the images of a series")
        uids = {item[INSTANCE] for item in found if INSTANCE in item}
        if not uids:
            raise MedsegError(
                Code.MISSING,
                "the archive has no images of the series any more",
                where=case.case_id,
                got="an empty list",
                remedy="leave it out with --on-bad-case skip",
            )
        return uids

    def _pages(
        self, method: Callable[[Any], Callable[..., Any]], query: Mapping[str, str], tag: str, what: str
    ) -> Iterator[dict[str, str]]:
        """All results of a search, page by page. Servers that ignore the offset send the same page again."""
        seen: set[str] = set()
        offset = 0
        while True:
            page = self.server.ask(
                lambda client, offset=offset: _page(  # type: ignore[misc]
                    method(client)(search_filters=dict(query), fields=[STUDY], limit=PAGE, offset=offset)
                ),
                what,
            )
            new = [item for item in page if item.get(tag, "") not in seen]
            if not new:
                return
            seen |= {item.get(tag, "") for item in new}
            if len(seen) > MAX_RESULTS:
                raise _endless(self.server.name, what, "narrow the query, by --query StudyDate=20260101-20260331")
            yield from new
            offset += len(page)


class DicomWebSink:
    """An archive that stores SEG and RTSTRUCT.

    Args:
        url: of its DICOMweb service.
        same_as: URL of the archive that the scans come from: its credentials are good for the same server.
    """

    replaces = False

    def __init__(self, url: str, same_as: str | None = None) -> None:
        same = same_as is not None and urlsplit(url)[:2] == urlsplit(same_as)[:2]
        self.server = Server(url, "TO", "FROM" if same else None)
        self.url = self.server.url

    def begin(self, *, may_replace: bool) -> None:
        """Nothing is ever replaced: other input, models or options give other UIDs."""

    def takes(self, name: str) -> bool:
        """DICOM is delivered; other files stay."""
        return name.endswith((ENDINGS[Form.DICOM_SEG], ENDINGS[Form.RTSTRUCT]))

    def standing(self, names: Collection[str]) -> dict[str, str]:
        """Nothing: objects have UIDs, not names."""
        return {}

    def deliver(self, files: Mapping[str, Path], identity: str) -> None:
        """Store objects. Their UIDs follow from `identity`: stored again, after a crash, they are the same objects.
        Servers that refuse what they have already are asked for it; what they have counts as stored.

        Raises:
            MedsegError: E_ARCHIVE.
        """
        import pydicom

        datasets = []
        for name, path in sorted(files.items()):
            dataset = pydicom.dcmread(path)
            dataset.SeriesInstanceUID = _uid(f"{identity} {name} series")
            dataset.SOPInstanceUID = _uid(f"{identity} {name}")
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.save_as(path, enforce_file_format=True)  # the digest of what is delivered goes into the manifest
            datasets.append(dataset)

        def store(client: Any) -> list[str]:
            client.set_chunk_size(WHOLE)
            refused = client.store_instances(datasets).get("FailedSOPSequence") or ()
            return [str(item.get("FailureReason", "unknown")) for item in refused]

        try:
            failed = self.server.ask(store, "to store SEG or RTSTRUCT")
        except Unreachable:
            raise
        except MedsegError:
            if self._has(datasets):
                return
            raise
        if failed and not self._has(datasets):
            raise MedsegError(
                Code.ARCHIVE,
                "the server did not store what was drawn",
                where=self.server.name,
                expected=f"{len(datasets)} objects stored",
                got=f"{len(failed)} refused, FailureReason {failed[0]:.16}",
                remedy="look into the server's log: does it take SEG and RTSTRUCT?",
            )

    def _has(self, datasets: Sequence[Any]) -> bool:
        """Whether the archive has objects of these UIDs."""
        for dataset in datasets:
            series = str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
            try:
                found = self.server.ask(
                    lambda client, series=series: _page(client.search_for_instances(*series)),  # type: ignore[misc]
                    "whether it has SEG or RTSTRUCT already",
                )
            except Unreachable:
                raise
            except MedsegError:  # 404: it has no such series
                return False
            if str(dataset.SOPInstanceUID) not in {item.get(INSTANCE) for item in found}:
                return False
        return True

    def end(self, folder: Path) -> None:
        """The manifest stays where it is."""


def _uid(name: str) -> str:
    """A UID that follows from a name (DICOM PS3.5 B.2: 2.25 and a UUID as a number)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def _of_series(client: Any, study: str, series: str) -> Callable[..., Any]:
    def search(**options: Any) -> Any:
        return client.search_for_instances(study, series, **options)

    return search


def _page(answer: object) -> list[dict[str, str]]:
    """Tag → value of each result of a search, as far as they are used.

    Raises:
        ValueError: this is no DICOM JSON (PS3.18, F.2).
    """
    if not isinstance(answer, list):
        raise ValueError("results are no list")
    return [{tag: value for tag in (STUDY, SERIES, INSTANCE, MODALITY) if (value := _value(i, tag))} for i in answer]


def _value(item: object, tag: str) -> str | None:
    """The first value of a tag in DICOM JSON."""
    attribute = item.get(tag, {}) if isinstance(item, dict) else None
    values = attribute.get("Value") or [None] if isinstance(attribute, dict) else None
    if not isinstance(values, list):
        raise ValueError("a result is no data set")
    value = values[0]
    if value is not None and not (isinstance(value, str) and value.isascii() and len(value) <= MAX_LETTERS):
        raise ValueError("a value is no UID and no code")
    return value


def _within(chunks: Iterable[bytes], room: int, case: RemoteCase) -> Iterator[bytes]:
    """The pieces of an answer, as long as there is room for them."""
    for chunk in chunks:
        room -= len(chunk)
        if room < 0:
            raise MedsegError(
                Code.LIMIT,
                "the series is larger than the folder for temporary files holds",
                where=case.case_id,
                remedy="make room, or set TMPDIR to a folder that has some",
            )
        yield chunk


def _instance_of(path: Path, case: RemoteCase, number: int) -> str:
    """SOPInstanceUID of a file that was fetched."""
    try:
        dataset, _, _ = parse(path, [int(INSTANCE, 16)])
        element = dataset.get_item(int(INSTANCE, 16))
        if element is not None and isinstance(element.value, bytes):
            return element.value.decode("latin-1").strip(" \0")
        fault, cause = "it has no SOPInstanceUID", None
    except MedsegError as error:
        fault, cause = error.message, error
    raise MedsegError(
        Code.MALFORMED,
        "the archive sent what is no DICOM image",
        where=case.case_id,
        got=f"image {number}: {fault}",
        remedy="look at the series with the archive's own viewer",
    ) from cause


def _endless(where: str, what: str, remedy: str) -> MedsegError:
    return MedsegError(
        Code.LIMIT,
        "the archive's answer has no end",
        where=where,
        expected=f"at most {MAX_RESULTS} results when asked for {what}",
        remedy=remedy,
    )
