"""Object storage (s3://, gs://, az://) by fsspec: scans are fetched case by case, label files uploaded whole.

An object appears when its upload is complete, and not before: that is what object stores promise, and why other file
systems are not taken here (their names appear first). Credentials and end points are those of the store's own tools:
AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, … never part of the command line.

Which objects make a case: an image file (or the channel files CASE_0000, CASE_0001, … of a model of several channels),
and all DICOM files of one folder. Its id is its path below the URL, with "_" between folders. Labels are no cases: what
lies in a folder that is named as one of labels, and files that are named as the label of another one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from medseg.data.inputs import find_inputs, refuse_same_ids
from medseg.data.layouts import CHANNEL_SUFFIX, LABEL_FOLDERS, split_off_labels
from medseg.errors import DISK_FAULTS, Code, MedsegError
from medseg.formats import IMAGE_SUFFIXES, Reading, strip_suffix
from medseg.formats.dicom.files import DICOM_SUFFIXES
from medseg.inference.case_statistics import STATISTICS_FILE
from medseg.inference.manifest import MANIFEST_FILE
from medseg.labels import TABLE_FILE
from medseg.remote.exchange import RemoteCase, Unreachable

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Scheme → what speaks it. Uploads to all of them are whole or not there."""
TABLES = (TABLE_FILE, MANIFEST_FILE, STATISTICS_FILE)
"""What stays in the output folder, and is uploaded too when the work ends."""
STAMPS = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "updated")
"""What stores tell of an object's content, the best first."""
MAX_DISK_SHARE = 0.8
"""Share of the free disk that one case may fill."""
CHUNK_BYTES = 2**20


class Store:
    """What lies below one URL of an object store; connected when it is first asked.

    Args:
        url: "s3://bucket/folder".
        option: of the command line, for messages.
    Raises:
        MedsegError: E_CONFIG for a URL that is none, or that holds a password.
    """

    def __init__(self, url: str, option: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in PACKAGES or not parts.netloc or "@" in parts.netloc:
            raise MedsegError(
                Code.CONFIG,
                "this is no place in an object store",
                where=option,
                expected="s3://bucket/folder (or gs://, az://), without user and password",
                got=f"{parts.scheme}://…" if parts.scheme else "no scheme",
                remedy="folders on this disk are named without --from, and by -o",
            )
        self.url, self.scheme = url.rstrip("/"), parts.scheme
        self.root = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        self._system: Any = None

    def holds(self, other: Store) -> bool:
        """Whether another place is this one, or lies in it."""
        return f"{other.root}/".startswith(f"{self.root}/")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_system": None}

    @property
    def system(self) -> Any:
        """The fsspec file system.

        Raises:
            MedsegError: E_MISSING where the package that speaks its scheme is not installed.
        """
        if self._system is None:
            try:
                import fsspec

                self._system = fsspec.filesystem(self.scheme, use_listings_cache=False)
            except ImportError as error:
                package = PACKAGES[self.scheme]
                raise MedsegError(
                    Code.MISSING,
                    "the object store needs a package that is not installed",
                    where=f"{self.scheme}://",
                    expected=package,
                    remedy='pip install "medseg[s3]"' if package == "s3fs" else f"pip install {package}",
                ) from error
        return self._system

    def listed(self) -> dict[str, Mapping[str, Any]]:
        """Path below the root → what the store tells of the object; hidden ones are left out.

        Raises:
            MedsegError: E_ARCHIVE.
        """
        with self.refusals("what lies there"):
            found = self.system.find(self.root, detail=True)
        relative = {key[len(self.root) :].lstrip("/"): info for key, info in found.items()}
        return {name: i for name, i in relative.items() if name and not any(p[:1] == "." for p in name.split("/"))}

    def get(self, name: str, path: Path) -> None:
        """Fetch an object. Raises MedsegError: E_MISSING, E_ARCHIVE; OSError of this disk."""
        with self.refusals("an object"):
            self.system.get_file(f"{self.root}/{name}", str(path))

    def put(self, path: Path, name: str) -> None:
        """Upload a file; the object is there whole when this returns. Raises MedsegError: E_ARCHIVE."""
        with self.refusals("to store an object"):
            self.system.put_file(str(path), f"{self.root}/{name}")

    def digest(self, name: str) -> str | None:
        """SHA-256 of an object's content; None where there is none. Raises MedsegError: E_ARCHIVE."""
        digest = hashlib.sha256()
        try:
            with self.refusals("an object"), self.system.open(f"{self.root}/{name}", "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
        except MedsegError as error:
            if error.code is not Code.MISSING:
                raise
            return None
        return digest.hexdigest()

    @contextmanager
    def refusals(self, what: str) -> Iterator[None]:
        """What goes wrong between two machines, as refusals that name the scheme alone."""
        try:
            yield
        except MedsegError:
            raise
        except FileNotFoundError as error:
            raise MedsegError(
                Code.MISSING,
                "the object store has nothing of this name",
                where=f"{self.scheme}://",
                expected=what,
                remedy="check the name of the bucket and the folder",
            ) from error
        except Exception as error:  # of each store's own kind: botocore's, aiohttp's, google's
            if isinstance(error, OSError) and error.errno in DISK_FAULTS:
                raise
            denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
            raise Unreachable(
                Code.ARCHIVE,
                "the object store refuses the credentials, or wants some" if denied else "the object store refuses",
                where=f"{self.scheme}://",
                expected=what,
                got=type(error).__name__,
                remedy="set the variables of its own tools (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, …)",
            ) from error


class StorageSource:
    """The scans below a URL.

    Args:
        url: "s3://bucket/folder".
        channels: of the model.
        reading: how its files are read.
    """

    def __init__(self, url: str, channels: tuple[str, ...], reading: Reading) -> None:
        self.store = Store(url, "--from")
        self.channels, self.reading = channels, reading

    def cases(self) -> list[RemoteCase]:
        """The scans, by their paths below the URL.

        Raises:
            MedsegError: E_ARCHIVE; E_NO_CASES where there is no image; E_DUPLICATE_ID.
        """
        listed = self.store.listed()
        paths = _without_labels(PurePosixPath(name) for name in sorted(listed))
        with_images = {path.parent for path in paths if _is_image(path)}
        # By folder and name: joined into an id, different ones may become the same, and are refused.
        groups: dict[tuple[PurePosixPath, str, bool], list[str]] = defaultdict(list)
        for path in paths:
            if _is_image(path):
                stem = strip_suffix(path.name)
                channel = CHANNEL_SUFFIX.fullmatch(stem) if len(self.channels) > 1 else None
                groups[path.parent, channel["id"] if channel else stem, channel is not None].append(str(path))
            elif _may_be_slice(path) and path.parent not in with_images:
                groups[path.parent, "", False].append(str(path))
        if not groups:
            raise MedsegError(
                Code.NO_CASES,
                "no images lie in the object store",
                where=f"{self.store.scheme}://",
                expected="image files, or folders of DICOM files",
                got=f"{len(listed)} objects",
                remedy="check the folder; zips are not looked into",
            )
        cases = [
            RemoteCase(
                "_".join((*folder.parts, name) if name else folder.parts) or PurePosixPath(self.store.root).name,
                (),
                None,
                key=(_digest({name: listed[name] for name in names}), *names),
                num_bytes=sum(int(listed[name].get("size") or 0) for name in names),
            )
            for (folder, name, _), names in groups.items()
        ]
        refuse_same_ids(cases)
        return sorted(cases, key=lambda case: case.case_id)

    def digest(self, case: RemoteCase) -> str:
        """SHA-256 of the names, sizes and stamps of its objects when they were listed."""
        return case.key[0]

    def fetch(self, case: RemoteCase, folder: Path) -> tuple[Path, ...]:
        """Fetch the objects of a case.

        Raises:
            MedsegError: E_LIMIT for what the disk does not hold; E_MULTI_SERIES for several scans in one folder;
                E_ARCHIVE, E_MISSING, and what `find_inputs` refuses.
        """
        room = int(shutil.disk_usage(folder).free * MAX_DISK_SHARE)
        if case.num_bytes > room:
            raise MedsegError(
                Code.LIMIT,
                "the scan is larger than the folder for temporary files holds",
                where=case.case_id,
                expected=f"{room} bytes at most",
                got=f"{case.num_bytes} bytes",
                remedy="make room, or set TMPDIR to a folder that has some",
            )
        for name in case.key[1:]:
            self.store.get(name, folder / PurePosixPath(name).name)
        found = find_inputs([folder], channels=self.channels, reading=self.reading)
        if len(found) != 1:
            raise MedsegError(
                Code.MULTI_SERIES,
                f"the folder holds {len(found)} scans",
                where=case.case_id,
                expected="one DICOM series in a folder",
                remedy="put each series into a folder of its own",
            )
        return tuple(image for image in found[0].images if isinstance(image, Path)) or (folder,)


class StorageSink:
    """The objects below a URL.

    Args:
        url: "s3://bucket/folder".
    """

    replaces = True

    def __init__(self, url: str) -> None:
        self.store = Store(url, "--to")
        self.url = self.store.url

    def begin(self, *, may_replace: bool) -> None:
        """Refuse to replace anything unasked.

        Raises:
            MedsegError: E_OUTPUT; E_ARCHIVE.
        """
        if not may_replace and self.store.listed():
            raise MedsegError(
                Code.OUTPUT,
                "the place in the object store is not empty",
                where="--to",
                remedy="choose another, go on with --resume, or replace what is there with --overwrite",
            )

    def takes(self, name: str) -> bool:
        """Every file of a case."""
        return True

    def standing(self, names: Collection[str]) -> dict[str, str]:
        """The objects of these names, read to know whether they are still what was delivered.

        Raises:
            MedsegError: E_ARCHIVE.
        """
        return {name: digest for name in names if (digest := self.store.digest(name)) is not None}

    def deliver(self, files: Mapping[str, Path], identity: str) -> None:
        """Upload files, each whole.

        Raises:
            MedsegError: E_ARCHIVE.
        """
        for name, path in sorted(files.items()):
            self.store.put(path, name)

    def end(self, folder: Path) -> None:
        """Upload the manifest and the tables of the output folder; without a manifest nothing was delivered, and a
        table alone would keep the same command from going on.

        Raises:
            MedsegError: E_ARCHIVE.
        """
        if not (folder / MANIFEST_FILE).is_file():
            return
        for name in TABLES:
            if (folder / name).is_file():
                self.store.put(folder / name, name)


def _without_labels(paths: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Objects that may be scans, as `find_inputs` tells them from labels."""
    kept = [path for path in paths if not any(part.lower() in LABEL_FOLDERS for part in path.parent.parts)]
    stems: dict[PurePosixPath, dict[str, Path]] = defaultdict(dict)
    for path in kept:
        if _is_image(path):
            stems[path.parent][strip_suffix(path.name)] = Path(path)
    labels = {folder / file.name for folder, found in stems.items() for file in split_off_labels(found)[1].values()}
    return [path for path in kept if path not in labels]


def _is_image(path: PurePosixPath) -> bool:
    name = path.name.lower()
    return name.endswith(IMAGE_SUFFIXES) and not name.endswith(DICOM_SUFFIXES)


def _may_be_slice(path: PurePosixPath) -> bool:
    """Slices of DICOM series have an ending of their own, none, or a number."""
    return path.name.lower().endswith(DICOM_SUFFIXES) or not path.suffix or path.suffix[1:].isdigit()


def _digest(objects: Mapping[str, Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, info in sorted(objects.items()):
        stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
        digest.update(f"{name}\0{info.get('size')}\0{stamp}\0".encode())
    return digest.hexdigest()
