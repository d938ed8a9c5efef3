"""`report.html` of predictions against references: `medseg evaluate … --report`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from medseg.data.cases import load_image
from medseg.data.inputs import find_inputs
from medseg.data.layouts import Case
from medseg.formats import STRICT, Reading, open_label
from medseg.reports.evaluation import Evaluation
from medseg.reports.html.page import REPORT_FILE, Remark, Report, write_report
from medseg.reports.html.pictures import CaseFiles, draw_extremes
from medseg.reports.html.predictions import manifest_of, remarks_of
from medseg.reports.html.run import sha256, versions
from medseg.reports.pairs import MissingPolicy, Pair, match_pairs


def write_evaluation_report(
    folder: Path,
    evaluation: Evaluation,
    predicted: Path,
    reference: Path,
    *,
    images: Path | None = None,
    missing: MissingPolicy = "error",
    reading: Reading = STRICT,
) -> Path:
    """Write the report of an evaluation.

    Args:
        folder: gets the page; holds metrics.json of the evaluation.
        evaluation: as `evaluate_folders` gave it.
        predicted: what was evaluated.
        reference: against what.
        images: the scans, with the same case names; without them pictures show masks only.
        missing: what a reference without a prediction was taken as.
        reading: what was asked of the readers beyond their strict defaults.
    Returns:
        The page.
    Raises:
        MedsegError: E_OUTPUT; what `find_inputs` refuses of `images`; E_LABEL.
    """
    pairs = {pair.case: pair for pair in match_pairs(predicted, reference, missing=missing)}
    everything = match_pairs(predicted, reference, missing="count")
    scans = _scans(images, list(pairs), reading)
    pictures, problems = draw_extremes(evaluation, _opener(pairs, scans, reading))
    remarks = _remarks(predicted, [pair.case for pair in everything if pair.predicted is None], missing)
    remarks += [Remark("warning", f"no picture: {error.code} {error.message}", [c]) for c, error in problems.items()]
    names = ", ".join(evaluation.labels.foreground)
    path = folder / REPORT_FILE
    num_cases = len(evaluation.cases)
    write_report(
        path,
        Report(
            title=f"Evaluation: {names if len(names) < 80 else f'{len(evaluation.labels.foreground)} classes'}",
            subtitle=f"{num_cases} {'case' if num_cases == 1 else 'cases'}: predictions of {predicted.name!r} against "
            f"references of {reference.name!r}.",
            evaluation=evaluation,
            pictures=pictures,
            remarks=remarks,
            manifest=_manifest(folder, predicted, list(pairs.values())),
        ),
    )
    return path


def _scans(images: Path | None, cases: Sequence[str], reading: Reading) -> dict[str, Case]:
    """Case id → its scan; a single scan belongs to a single case whatever they are called."""
    if images is None:
        return {}
    found = find_inputs([images], reading=reading)
    if len(found) == len(cases) == 1:
        return {cases[0]: found[0]}
    return {case.case_id: case for case in found}


def _opener(pairs: dict[str, Pair], scans: dict[str, Case], reading: Reading) -> Callable[[str], CaseFiles]:
    def open_case(case: str) -> CaseFiles:
        pair, scan = pairs[case], scans.get(case)
        return CaseFiles(
            None if scan is None else load_image(scan, reading=reading),
            open_label(pair.reference, reading),
            None if pair.predicted is None else open_label(pair.predicted, reading),
        )

    return open_case


def _remarks(predicted: Path, without: Sequence[str], missing: MissingPolicy) -> list[Remark]:
    found: list[Remark] = []
    if without:
        what = {"count": "counted as empty", "skip": "left out: the means are not those of all references"}[missing]
        count = f"{len(without)} {'reference has' if len(without) == 1 else 'references have'}"
        found.append(Remark("failure", f"{count} no prediction, and {what}", without))
    return [*found, *(remarks_of(predicted) if predicted.is_dir() else ())]


def _manifest(folder: Path, predicted: Path, pairs: Sequence[Pair]) -> dict[str, str]:
    predictions = [pair.predicted for pair in pairs if pair.predicted is not None]
    return {
        **(manifest_of(predicted) if predicted.is_dir() else {}),
        "evaluated with": versions(),
        "SHA-256 of metrics.json": sha256(folder / "metrics.json"),
        f"SHA-256 of {len(predictions)} predictions": _digest(predictions),
        f"SHA-256 of {len(pairs)} references": _digest([pair.reference for pair in pairs]),
    }


def _digest(paths: Sequence[Path]) -> str:
    """One digest of the digests of files, in the order of the cases: `sha256sum FILE… | cut -c-64 | sha256sum`."""
    lines = "".join(f"{sha256(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()
