"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

T = TypeVar("T")


def reading_options(command: Callable[..., T]) -> Callable[..., T]:
    """The options of how DICOM is read, the same for every verb that reads it."""
    for option in (
        click.option("--without-preamble", is_flag=True, help='Try DICOM on files without "DICM" at byte 128.'),
        click.option("--resample-irregular", is_flag=True,
                     help="Mend gantry tilt, gaps and uneven spacing of a DICOM series instead of refusing it."),
        click.option("--series", metavar="UID", help="SeriesInstanceUID to read where DICOM files hold several."),
    ):  # fmt: skip
        command = option(command)
    return command
