"""A run's folder before and after there is a run in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from medseg.bundle import BUNDLE_FILE, FOLDS_FILE
from medseg.data.plan.file import PLAN_FILE
from medseg.data.splits import SPLIT_FILE
from medseg.errors import Code, MedsegError
from medseg.training.beginning import SURVEY_FILE
from medseg.training.experiment import CONFIG_FILE, PLACES_FILE

REFUSED_FILE = "refused.txt"
"""In the folder of a run of a sweep: why it did not begin, or ended. The sweep goes on without it."""


def has_begun(run: Path) -> bool:
    """Whether a run has settled what it begins with, so that it can go on."""
    return (run / CONFIG_FILE).is_file() and ((run / BUNDLE_FILE).is_file() or (run / FOLDS_FILE).is_file())


def used_folder(folder: Path, others: Sequence[str]) -> MedsegError:
    """The refusal to begin a run where something lies already."""
    return MedsegError(
        Code.OUTPUT,
        "the run's folder is not empty: a run would overwrite what is there",
        where=folder,
        got=", ".join(others[:5]),
        remedy="choose another hydra.run.dir, or go on with the run in it by: medseg train resume=RUN",
    )


def remove_unstarted(folder: Path) -> None:
    """Remove what a run wrote that was refused before it had a plan; the folder too if nothing else is in it."""
    if (folder / BUNDLE_FILE).exists() or (folder / FOLDS_FILE).exists():
        return
    settled = (folder / name for name in (CONFIG_FILE, PLACES_FILE, SPLIT_FILE, SURVEY_FILE, PLAN_FILE))
    for path in (*folder.glob("*.log"), *settled):  # Hydra names its log for the verb or the task
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def write_refusal(folder: Path, why: MedsegError | str) -> None:
    """Leave word in the folder of a run of a sweep, if the disk takes it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFUSED_FILE).write_text(f"{why}\n", encoding="utf-8")


def refusals_in(sweep: Path) -> list[MedsegError]:
    """The refusals that `write_refusal` left in the folders of a sweep, in their order; other words are none."""
    found = []
    for path in sorted(sweep.glob(f"*/{REFUSED_FILE}")):
        code, _, rest = path.read_text(encoding="utf-8", errors="replace").strip().partition(": ")
        with suppress(ValueError):  # a trial that was ended early, or what somebody else wrote there
            found.append(MedsegError(Code(code), rest, where=None))
    return found
