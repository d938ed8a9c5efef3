"""DICOM archives over DICOMweb: QIDO-RS finds series, WADO-RS fetches them, STOW-RS stores what was drawn.

Source:
    DICOM PS3.18, Web Services: 8.3.4 and 10.6 (search), 10.4 (retrieve), 10.5 (store).
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.export import ENDINGS, Form
from medseg.formats.dicom.files import series_names
from medseg.remote.exchange import RemoteCase
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
            modality = _value(item, MODALITY) or self.query.get("Modality", "")
            study, series = _value(item, STUDY), _value(item, SERIES)
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
        from pydicom.errors import InvalidDicomError

        for path in folder.iterdir():  # of an attempt that broke off
            path.unlink()
        study, series = case.key
        room = min(MAX_SERIES_BYTES, int(shutil.disk_usage(folder).free * MAX_DISK_SHARE))
        received: set[str] = set()
        try:
            parts = client.iter_series(study, series, media_types=(("application/dicom", "*"),))
            for number, dataset in enumerate(parts):
                path = folder / f"{number:06d}.dcm"
                dataset.save_as(path, enforce_file_format=True)
                received.add(str(dataset.get("SOPInstanceUID", "")))
                room -= path.stat().st_size
                if room < 0:
                    raise MedsegError(
                        Code.LIMIT,
                        "the series is larger than the folder for temporary files holds",
                        where=case.case_id,
                        got=f"more than {number} images",
                        remedy="make room, or set TMPDIR to a folder that has some",
                    )
        except (InvalidDicomError, AttributeError, KeyError, TypeError, NotImplementedError, EOFError) as error:
            raise MedsegError(
                Code.MALFORMED,
                "the archive sent what is no DICOM image",
                where=case.case_id,
                got=f"{type(error).__name__} in image {len(received) + 1}",
                remedy="look at the series with the archive's own viewer",
            ) from error
        return received

    def _instances(self, case: RemoteCase) -> set[str]:
        found = self._pages(lambda client: _of_series(client, *case.key), {}, INSTANCE, "the images of a series")
        uids = {uid for item in found if (uid := _value(item, INSTANCE))}
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
    ) -> Iterator[Mapping[str, Any]]:
        """All results of a search, page by page. Servers that ignore the offset send the same page again."""
        seen: set[str] = set()
        offset = 0
        while True:
            page = self.server.ask(
                lambda client, offset=offset: method(client)(  # type: ignore[misc]
                    search_filters=dict(query), fields=[STUDY], limit=PAGE, offset=offset
                ),
                what,
            )
            new = [item for item in page if (_value(item, tag) or "") not in seen]
            if not new:
                return
            seen |= {_value(item, tag) or "" for item in new}
            yield from new
            offset += len(page)


class DicomWebSink:
    """An archive that stores SEG and RTSTRUCT.

    Args:
        url: of its DICOMweb service.
        same_as: URL of the archive that the scans come from: its credentials are good for the same server.
    """

    def __init__(self, url: str, same_as: str | None = None) -> None:
        same = same_as is not None and urlsplit(url)[:2] == urlsplit(same_as)[:2]
        self.server = Server(url, "TO", "FROM" if same else None)

    def begin(self, *, may_replace: bool) -> None:
        """Nothing is ever replaced: other input, models or options give other UIDs."""

    def takes(self, name: str) -> bool:
        """DICOM is delivered; other files stay."""
        return name.endswith((ENDINGS[Form.DICOM_SEG], ENDINGS[Form.RTSTRUCT]))

    def deliver(self, files: Mapping[str, Path], identity: str) -> None:
        """Store objects. Their UIDs follow from `identity`: stored again, after a crash, they are the same objects.

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

        def store(client: Any) -> Any:
            client.set_chunk_size(WHOLE)
            return client.store_instances(datasets)

        answer = self.server.ask(store, "to store SEG or RTSTRUCT")
        failed = list(answer.get("FailedSOPSequence") or ())
        if failed:
            raise MedsegError(
                Code.ARCHIVE,
                "the server did not store what was drawn",
                where=self.server.name,
                expected=f"{len(datasets)} objects stored",
                got=f"{len(failed)} refused, FailureReason {failed[0].get('FailureReason', 'unknown')}",
                remedy="look into the server's log: does it take SEG and RTSTRUCT?",
            )

    def end(self, folder: Path) -> None:
        """The manifest stays where it is."""


def _uid(name: str) -> str:
    """A UID that follows from a name (DICOM PS3.5 B.2: 2.25 and a UUID as a number)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def _of_series(client: Any, study: str, series: str) -> Callable[..., Any]:
    def search(**options: Any) -> Any:
        return client.search_for_instances(study, series, **options)

    return search


def _value(item: Mapping[str, Any], tag: str) -> str | None:
    """The first value of a tag in DICOM JSON."""
    values = item.get(tag, {}).get("Value") or [None]
    return None if values[0] is None else str(values[0])
