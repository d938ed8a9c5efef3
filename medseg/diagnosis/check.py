"""One line of the diagnosis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

QUOTED_PATH = re.compile(r"""(['"])[^'"]*[\\/][^'"]*\1""")
PATH = re.compile(r"[^\s:;,'\"]*[\\/][^\s:;,'\"]*(?:\s[^:;,'\"]*[\\/][^\s:;,'\"]*)*")
"""What has a slash in it, and what stands between two such: names of folders may have spaces."""
LIBRARY = re.compile(r"[^\\/]*\.(?:so|dylib|dll|pyd|py)(?:\.\d+)*(?=['\"]?$)")
"""Of a path, the end that names code: it tells what is broken, and nothing of who is here."""
MAX_LINE, MAX_SHORT = 1000, 200
"""Characters of an error's first line that are looked at, and that are kept."""


class Status(StrEnum):
    """How a check ended, from good to bad."""

    OK = "ok"
    WARN = "warn"
    """Works, but worse than it could, or not for all files."""
    FAIL = "fail"
    """Training or prediction will not work."""


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found. Holds no path and no name of a machine or user.

    Args:
        name: what was looked at.
        status: how it ended.
        found: what is there.
        remedy: what to do; None where nothing need be done.
    """

    name: str
    status: Status
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Check:
    """All is well."""
    return Check(name, Status.OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """It works, but worse than it could."""
    return Check(name, Status.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """It does not work."""
    return Check(name, Status.FAIL, found, remedy)


def in_short(error: BaseException) -> str:
    """The kind and first line of an error, without paths: they name users, and may be those of others than this one."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = PATH.sub(_without_folders, QUOTED_PATH.sub(_without_folders, lines[0][:MAX_LINE]))
    return f"{type(error).__name__}: {line}"[:MAX_SHORT]


def _without_folders(path: re.Match[str]) -> str:
    """A library's own name, or an ellipsis."""
    named = LIBRARY.search(path.group())
    return "…" if named is None else named.group()


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
