"""After a training: which post-processing the validation cases are better with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from medseg.data.cases import Case
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.inference.postprocess import POSTPROCESSING_FILE, PostProcessing, decide_postprocessing
from medseg.labels import Labels
from medseg.reports.progress import counting_bar

ENDINGS = (".nii.gz", ".png")
"""Of the label files that a validation writes: volumes, pictures."""


def forget_postprocessing(run: Path) -> None:
    """Remove what was decided for other weights than the run has now."""
    for path in (run / POSTPROCESSING_FILE, (run / POSTPROCESSING_FILE).with_suffix(".md")):
        path.unlink(missing_ok=True)


def postprocess_run(
    run: Path,
    folders: Sequence[Path],
    cases: Mapping[str, Case],
    labels: Labels,
    console: Console,
    *,
    reading: Reading = STRICT,
) -> PostProcessing:
    """Decide on the label files of validation cases, write `postprocessing.json` and .md into a run, and say so.

    Args:
        run: a run, a run of several folds or an ensemble: what will predict with it.
        folders: of label files by case, each predicted by a model that has not seen the case.
        cases: id → validation case.
        labels: the classes.
        console: where the user reads.
        reading: what is asked of the readers beyond their strict defaults.
    Raises:
        MedsegError: E_MISSING if a case has no label file.
    """
    candidates = {case: [folder / f"{case}{ending}" for folder in folders for ending in ENDINGS] for case in cases}
    found = {case: next((path for path in paths if path.is_file()), None) for case, paths in candidates.items()}
    missing = [case for case, path in found.items() if path is None]
    if missing:
        raise MedsegError(
            Code.MISSING,
            f"{len(missing)} validation case(s) have no prediction",
            where=", ".join(missing[:10]),
            remedy="finish the run: medseg train resume=RUN",
        )
    predictions = {case: path for case, path in found.items() if path is not None}
    with counting_bar(console, "post-processing") as progress:
        decided = decide_postprocessing(run, predictions, cases, labels, reading=reading, progress=progress)
    console.print(
        f"post-processing: {decided.describe()} (reasons in {(run / POSTPROCESSING_FILE).with_suffix('.md')})",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return decided
