"""One line of the diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


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
    """The kind and first line of an error, without the name of the user's folder."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text.replace(str(Path.home()), "~")[:200]


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
