"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

OPTIONS = (
    click.option("--series", metavar="UID", help="SeriesInstanceUID to read where DICOM files hold several."),
    click.option("--resample-irregular", is_flag=True,
                 help="Mend gantry tilt, gaps and uneven spacing of a DICOM series instead of refusing it."),
    click.option("--without-preamble", is_flag=True, help='Try DICOM on files without "DICM" at byte 128.'),
    click.option("--form", type=click.Choice(["sform", "qform"]),
                 help="What places NIfTI files that set both; without it those in which they disagree are refused."),
    click.option("--without-form", is_flag=True,
                 help="Read NIfTI files that set neither: their axes are then taken for right, anterior, superior."),
)  # fmt: skip
"""How files are read beyond the strict defaults: the fields of `medseg.formats.Reading`."""


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how files are read, the same for every verb that reads scans.

    Args:
        command: takes `reading`, a `Reading`, in their place.
    """

    @wraps(command)
    def with_reading(
        *,
        series: str | None,
        resample_irregular: bool,
        without_preamble: bool,
        form: Any,
        without_form: bool,
        **others: Any,
    ) -> Any:
        from medseg.formats import Reading

        reading = Reading(
            series=series,
            resample_irregular=resample_irregular,
            without_preamble=without_preamble,
            form=form,
            without_form=without_form,
        )
        return command(reading=reading, **others)

    for option in reversed(OPTIONS):
        with_reading = option(with_reading)
    return with_reading
