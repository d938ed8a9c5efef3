"""What the verbs ask before they know whether there is anything to classify: it imports next to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medseg.errors import Code, MedsegError

TABLE_FILE = "predictions.csv"
"""The predicted classes, in the folder of `medseg predict`."""


def is_predictions(path: Path) -> bool:
    """Whether a path is what `Predictions.write` wrote: the folder, or the table in it."""
    table = path / TABLE_FILE if path.is_dir() else path
    return table.name.lower().endswith(".csv") and table.is_file()


def refuse_options(
    stated: Mapping[str, object],
    taken: str = "--checkpoint, --device, --precision, --batch-size, "
    "--on-bad-case, --overwrite, and how files are read",
) -> None:
    """Refuse options that only serve segmentation.

    Args:
        stated: option → whether it was given.
        taken: the options that serve classification.
    Raises:
        MedsegError: E_CONFIG.
    """
    given = [name for name, value in stated.items() if value]
    if given:
        raise MedsegError(
            Code.CONFIG,
            f"classification does not take {', '.join(given)}",
            where=given[0],
            expected=taken,
            remedy="leave it out: predictions.csv holds the class and all probabilities",
        )
