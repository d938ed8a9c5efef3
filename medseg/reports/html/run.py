"""`report.html` of a run: everything from the files that training left, so that the page cannot say anything else."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from medseg.bundle import BundleInfo, checkpoint_path
from medseg.data.facts import read_survey
from medseg.errors import MedsegError
from medseg.reports.crossvalidation import OPTIMISTIC, CrossValidation
from medseg.reports.curves import Curve, read_history
from medseg.reports.evaluation import Evaluation
from medseg.reports.extremes import extremes
from medseg.reports.html.page import REPORT_FILE, Remark, Report, write_report
from medseg.reports.html.pictures import Picture, picture_of_file
from medseg.reports.model_card import CARD_FILE

HISTORY_FILE, SURVEY_FILE, OVERLAYS = "history.csv", "survey.json", "validation/overlays"
"""In the folder of a run, as training names them."""
MAX_WORST = 4
"""Folds whose worst case is shown: those with the lowest."""
DIGESTED = ("config.yaml", "plan.yaml", "split.json")
PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "pydicom")


def write_run_report(
    run: Path,
    members: Mapping[str, Path],
    evaluation: Evaluation | CrossValidation | None,
    facts: Mapping[str, object],
) -> Path:
    """Write the report of a run, or of a run of several folds.

    Args:
        run: the folder that gets the page.
        members: name of a training ("fold 0"; "" where there is one only) → its folder, in the order of the folds.
        evaluation: of the validation cases on their own grids; None if they were not predicted.
        facts: what the manifest tells beside versions and digests, such as device and seed.
    Returns:
        The page.
    Raises:
        MedsegError: E_OUTPUT.
    """
    info = BundleInfo.read(next(iter(members.values())))
    pooled = evaluation.pooled if isinstance(evaluation, CrossValidation) else evaluation
    names = ", ".join(info.labels.foreground)
    if pooled is None:
        subtitle = "The validation cases were not predicted on their own grids (trainer.final_predictions=false)."
    elif isinstance(evaluation, CrossValidation):
        subtitle = f"{len(pooled.cases)} cases, each predicted by the fold that did not train on it, on its own grid."
    else:
        subtitle = f"{len(pooled.cases)} validation cases, predicted by the best checkpoint on their own grids."
    card = run / CARD_FILE
    path = run / REPORT_FILE
    write_report(
        path,
        Report(
            title=f"{info.model['name']}: {names if len(names) < 80 else f'{len(info.labels.foreground)} classes'}",
            subtitle=subtitle,
            evaluation=pooled,
            pictures=_pictures(members, evaluation),
            remarks=_remarks(members, evaluation),
            curves=_curves(members),
            card=card.read_text(encoding="utf-8") if card.is_file() else None,
            manifest=_manifest(members, facts),
            fold_of=evaluation.fold_of if isinstance(evaluation, CrossValidation) else {},
        ),
    )
    return path


def versions() -> str:
    """Versions of what computes, for a manifest."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pictures(members: Mapping[str, Path], evaluation: Evaluation | CrossValidation | None) -> list[Picture]:
    """The pictures that the final validation drew; of several folds the worst of each, and the median and the best."""
    if evaluation is None:
        return []
    if isinstance(evaluation, CrossValidation):
        pooled = evaluation.pooled
        folders = dict(zip(evaluation.folds, members.values(), strict=True))
        drawn = [
            (role, case, folders[number], f"fold {number}")
            for number, of_fold in evaluation.folds.items()
            for role, case in extremes(of_fold).items()
        ]
    else:
        pooled = evaluation
        (folder,) = members.values()
        drawn = [(role, case, folder, "") for role, case in extremes(evaluation).items()]
    dice = pooled.case_means("dice")
    files = {
        case: (role, folder / OVERLAYS / f"{role}_{case}.png", note)
        for role, case, folder, note in drawn
        if (folder / OVERLAYS / f"{role}_{case}.png").is_file()
    }
    if isinstance(evaluation, CrossValidation):
        middle = sorted(evaluation.ranked(), key=lambda item: item[1])[len(evaluation.ranked()) // 2][1]
        worst = sorted((case for case in files if files[case][0] == "worst"), key=lambda case: dice[case])[:MAX_WORST]
        medians = sorted((c for c in files if files[c][0] == "median"), key=lambda case: abs(dice[case] - middle))[:1]
        best = sorted((case for case in files if files[case][0] == "best"), key=lambda case: -dice[case])[:1]
        files = {case: files[case] for case in [*worst, *medians, *best]}
    return [picture_of_file(role, case, path, note) for case, (role, path, note) in files.items()]


def _remarks(members: Mapping[str, Path], evaluation: Evaluation | CrossValidation | None) -> list[Remark]:
    """What training left out and noted of its cases, and what the scores do not tell."""
    survey_file = next(iter(members.values())) / SURVEY_FILE
    survey = read_survey(survey_file) if survey_file.is_file() else {}
    found = [
        Remark("warning", f"left out of training: {problem['code']} {problem['message']}", [problem["case_id"]])
        for problem in survey.get("quarantine", ())
    ]
    found += [Remark("warning", f"left out: {text}") for text in survey.get("left_out", ())]
    notes = Counter(note for case in survey.get("cases", ()) for note in case.get("notes", ()))
    for note in notes:
        of = [case["case_id"] for case in survey["cases"] if note in case.get("notes", ())]
        found.append(Remark("note", note, of))
    if evaluation is not None:
        found.append(Remark("note", OPTIMISTIC))
    return found


def _curves(members: Mapping[str, Path]) -> dict[str, Mapping[str, Curve]]:
    curves: dict[str, Mapping[str, Curve]] = {}
    for name, folder in members.items():
        try:
            curves[name] = read_history(folder / HISTORY_FILE)
        except MedsegError:  # a training that ended before its first entry
            continue
    return curves


def _manifest(members: Mapping[str, Path], facts: Mapping[str, object]) -> dict[str, str]:
    found = {name: str(value) for name, value in facts.items()} | {"versions": versions()}
    for name, folder in members.items():
        paths = [checkpoint_path(folder, "best"), *(folder / file for file in DIGESTED)]
        for path in paths:
            if path.is_file():
                found[f"SHA-256 of {name + ': ' if name else ''}{path.name}"] = sha256(path)
    return found
