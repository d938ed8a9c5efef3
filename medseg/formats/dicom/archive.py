"""Zip archives of DICOM files: unpacked into a private folder, once the whole list of their members has been checked.

Names of members may hold the patient's, so messages say a member's number instead. Archives within archives stay files.
"""

from __future__ import annotations

import atexit
import io
import os
import re
import shutil
import stat
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from medseg.errors import Code, MedsegError
from medseg.formats.content import DICOM_MAGIC, DICOM_PREAMBLE_BYTES, is_dicom_start
from medseg.formats.limits import MAX_DEFLATE_RATIO, RATIO_SLACK_BYTES

ZIP_MAGICS = (b"PK\3\4", b"PK\5\6")
"""First bytes of a zip, and of an empty one."""
MAX_MEMBERS = 200_000
"""Most members of an archive: a hundred whole-body CTs."""
MAX_DIRECTORY_BYTES = 2**25
"""Largest table of contents that is parsed (32 MiB): Python needs twenty times its size."""
MAX_RATIO = 100
"""An archive may unpack to this many times its own size: images shrink to a half or a tenth, drawn masks further …"""
ALWAYS_ALLOWED_BYTES = 2**30
"""… and to 1 GiB in any case: masks alone, nearly empty, shrink a thousandfold."""
MAX_DISK_SHARE = 0.8
"""Share of the free disk space that an archive may fill."""
CHUNK_BYTES = 2**20
"""As much of a member is held in memory."""
ENCRYPTED = 0x1 | 0x40
"""Flags of a member under a password (PKWARE, .ZIP File Format Specification, 4.4.4)."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LEFT_OUT = "__MACOSX"
"""Folder in which macOS puts a shadow of every file."""
ZIPS = "zip within the folder"
"""What a scan of a folder counts them as: they are not looked into, so that what is read stays what was named."""
ZIP_REMEDY = "zips within a folder are not looked into: name them one by one, or unpack them"

_Key = tuple[Path, int, int]
_unpacked: dict[_Key, Path] = {}
_lock = threading.Lock()


def is_zip(path: Path) -> bool:
    """True for a regular file that begins as a zip, whatever its name says; not for DICOM, whose preamble is free."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            start = stream.read(DICOM_PREAMBLE_BYTES + len(DICOM_MAGIC))
        return start.startswith(ZIP_MAGICS) and not is_dicom_start(start)
    except OSError:  # whoever opens it as something else will say so
        return False


def unpacked(path: Path) -> Path:
    """The members of a zip in a private temporary folder, which is removed when the process ends.

    An archive is unpacked once per process, unless it changes. Links, paths that leave the folder and whatever is no
    plain file are refused before anything is written; the bytes are counted again while they are inflated.

    Args:
        path: the archive.
    Returns:
        A folder with the archive's name without ".zip".
    Raises:
        MedsegError: E_MISSING; E_MALFORMED for links, special files, unsafe paths and names that stand twice;
            E_UNSUPPORTED for passwords, rare compressions and files that cannot be opened; E_LIMIT for bombs and full
            disks; E_TRUNCATED for cut or damaged archives.
    """
    try:
        status = path.stat()
        key = (path.resolve(), status.st_mtime_ns, status.st_size)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise MedsegError(
            Code.MISSING,
            "there is no such file",
            where=path.name,
            expected="a zip",
            got="nothing",
            remedy="check the path",
        ) from error
    with _lock:
        folder = _unpacked.get(key)
        if folder is None or not folder.is_dir():  # cleaners of temporary folders exist
            folder = _unpacked[key] = _unpack(path, status.st_size)
        return folder


def is_unpacked(path: Path) -> bool:
    """Whether a file or folder lies in what `unpacked` made: no other machine sees it."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in _unpacked.values())


def listed(path: Path) -> dict[PurePosixPath, int]:
    """The files of a zip and the sizes that they claim, checked as `unpacked` checks them; nothing is unpacked.

    Raises:
        MedsegError: as `unpacked`, but for what only the content tells.
    """
    with _open(path) as source:
        with _reading(path):
            infos = zipfile.ZipFile(source).infolist()
        return {relative: info.file_size for info, relative in _checked(infos, path)}


def _unpack(path: Path, size: int) -> Path:
    """A new folder with the members of an archive; nothing stays behind if that fails."""
    with _open(path) as source:
        with _reading(path):
            archive = zipfile.ZipFile(source)
        members = _checked(archive.infolist(), path)
        with _writing(path):
            private = Path(tempfile.mkdtemp(prefix="medseg-"))  # mode 0700
        try:
            _check_sizes([info for info, _ in members], path, size, shutil.disk_usage(private).free)
            stem = path.stem if path.stem.strip(".") else "archive"  # "...zip" has the stem ".."
            folder = private / stem
            with _writing(path):
                folder.mkdir()
            for info, relative in members:
                _write(archive, info, folder / relative, path)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(private, ignore_errors=True)
            raise
    atexit.register(_remove, private, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not at the end of a fork
        shutil.rmtree(folder, ignore_errors=True)


class _Source(io.BufferedReader):
    """The archive, which gives no more at once than a table of contents may have: zipfile asks for all of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise _limit(
                Path(str(self.name)),
                "the archive's table of contents is absurdly large",
                f"at most {MAX_DIRECTORY_BYTES} bytes",
                f"{size} bytes",
            )
        return super().read(size)


def _open(path: Path) -> _Source:
    try:
        return _Source(io.FileIO(path))
    except OSError as error:
        raise MedsegError(
            Code.UNSUPPORTED,
            "the file cannot be opened",
            where=path.name,
            got=error.strerror or type(error).__name__,
            remedy="check its permissions",
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever zipfile raises on damaged archives, as one refusal."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        IndexError,
        ValueError,
        RuntimeError,  # NotImplementedError is one
        OverflowError,
        OSError,
    ) as error:
        raise MedsegError(
            Code.TRUNCATED,
            "the archive is cut or damaged",
            where=path.name,
            got=type(error).__name__,  # its words may hold the name of a member
            remedy="copy or download the file again",
        ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else None
        raise _limit(
            path, "the archive cannot be unpacked to disk", "room for its files", got or type(error).__name__
        ) from error


def _checked(infos: list[zipfile.ZipInfo], path: Path) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive and where they go, after all that can be judged without inflating them."""
    if len(infos) > MAX_MEMBERS:
        raise _limit(path, "the archive holds too many files", f"at most {MAX_MEMBERS}", f"{len(infos)}")
    members: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for number, info in enumerate(infos, start=1):
        relative = _relative(info, path, number)
        if relative.parts[:1] == (LEFT_OUT,):
            continue
        folders.update(relative.parents)
        if _name(info).endswith("/"):
            folders.add(relative)
            continue
        if relative in files:
            raise _malformed(path, "two files of the archive have one name", f"member {number}")
        files.add(relative)
        _check_method(info, path, number)
        members.append((info, relative))
    if not files.isdisjoint(folders):
        raise _malformed(path, "the archive has a file and a folder of one name", "members below a file")
    return members


def _name(info: zipfile.ZipInfo) -> str:
    return info.filename.replace("\\", "/")  # some programs of Windows write backslashes


def _relative(info: zipfile.ZipInfo, path: Path, number: int) -> PurePosixPath:
    """Where a member goes within the folder."""
    name = _name(info)
    mode = info.external_attr >> 16  # of Unix; 0 where another system wrote the archive
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _malformed(path, "the archive holds a link or a special file", f"member {number}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in info.orig_filename or re.match("[A-Za-z]:", name):
        raise _malformed(path, "the archive holds a path that leaves its folder", f"member {number}")
    if not relative.parts and not name.endswith("/"):
        raise _malformed(path, "the archive holds a file without a name", f"member {number}")
    return relative


def _check_method(info: zipfile.ZipInfo, path: Path, number: int) -> None:
    if info.flag_bits & ENCRYPTED:
        problem, expected = "the archive is under a password", "files that are not encrypted"
    elif info.compress_type not in METHODS:
        problem, expected = "the archive's compression is not read", "stored or deflated files"
    else:
        return
    raise MedsegError(
        Code.UNSUPPORTED,
        problem,
        where=path.name,
        expected=expected,
        got=f"member {number}, compression method {info.compress_type}",
        remedy="unpack it yourself and give the folder",
    )


def _check_sizes(infos: list[zipfile.ZipInfo], path: Path, size: int, free: int) -> None:
    """Refuse what no honest archive holds, and what the disk cannot."""
    end = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        if info.header_offset < end:  # members that share bytes: the way to exceed deflate's ratio
            raise _malformed(path, "files of the archive overlap", "two members in one place")
        end = info.header_offset + info.compress_size
        if info.file_size > MAX_DEFLATE_RATIO * (info.compress_size + RATIO_SLACK_BYTES):
            raise _limit(
                path,
                "a file of the archive claims an absurd size",
                f"at most {MAX_DEFLATE_RATIO} times the {info.compress_size} bytes it takes",
                f"{info.file_size} bytes",
            )
    if end > size:
        raise _cut(path, "the archive ends before its last file", end, size)
    total = sum(info.file_size for info in infos)
    if total > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * size):
        most = f"at most {MAX_RATIO} times the archive's {size} bytes, or {ALWAYS_ALLOWED_BYTES} bytes"
        raise _limit(path, "the archive unpacks to an absurd size", most, f"{total} bytes")
    if total > MAX_DISK_SHARE * free:
        most = f"at most {MAX_DISK_SHARE:.0%} of the {free} bytes free for temporary files"
        raise _limit(path, "the disk has no room for the archive's files", most, f"{total} bytes")


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, path: Path) -> None:
    """One member to disk, counting its bytes: headers lie."""
    with _writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as written:
            with _reading(path):
                member = archive.open(info)
            count = 0
            while True:
                with _reading(path):
                    chunk = member.read(CHUNK_BYTES)
                count += len(chunk)
                if count > info.file_size or (not chunk and count < info.file_size):
                    raise _cut(path, "a file of the archive has another size than it should", info.file_size, count)
                if not chunk:
                    return
                written.write(chunk)


def _cut(path: Path, problem: str, expected: int, got: int) -> MedsegError:
    return MedsegError(
        Code.TRUNCATED,
        problem,
        where=path.name,
        expected=f"{expected} bytes",
        got=f"{got} bytes",
        remedy="copy or download the file again",
    )


def _malformed(path: Path, problem: str, got: str) -> MedsegError:
    return MedsegError(
        Code.MALFORMED,
        problem,
        where=path.name,
        expected="plain files in folders",
        got=got,
        remedy="do not trust it: get it again from its source",
    )


def _limit(path: Path, problem: str, expected: str, got: str) -> MedsegError:
    return MedsegError(
        Code.LIMIT,
        problem,
        where=path.name,
        expected=expected,
        got=got,
        remedy="if you trust it, unpack it yourself and give the folder (TMPDIR names the disk for temporary files)",
    )
