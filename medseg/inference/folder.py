"""Many scans through warm models into label files.

Reading, predicting and writing of successive scans overlap (`medseg.inference.overlap`). Every finished case is a line
of the manifest (`medseg.inference.manifest`) before its files get their names: whatever ends the work, what is there is
whole and is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from medseg.data.inputs import Refused, find_inputs
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.export import IDENTIFIERS_REMARK, Form
from medseg.formats.label_table import CaseRecord, read_cases, read_labels, write_table
from medseg.formats.remarks import gathered_warnings
from medseg.inference.case_statistics import STATISTICS_FILE, write_statistics
from medseg.inference.ensemble import Ensemble
from medseg.inference.exchange import HERE, Exchange
from medseg.inference.export import Export, files_of, tidy
from medseg.inference.job import Job, Options, say
from medseg.inference.manifest import Manifest, context_of, model_digest, options_of
from medseg.inference.members import is_model
from medseg.inference.overlap import overlapped
from medseg.inference.progress import cases_bar
from medseg.inference.subset import Subset, choose, whole
from medseg.labels import TABLE_FILE, Labels
from medseg.volume import Volume


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        files: the label files that were written, case by case.
        num_before: cases that were done before.
        bad: id → code and message of the cases that were left out.
    """

    files: tuple[Path, ...]
    num_before: int
    bad: Mapping[str, Mapping[str, str]]


Engine = Callable[[Job, Sequence[Case]], None]
"""What does the work: it brings each case through the stages of a job."""


def in_this_process(job: Job, cases: Sequence[Case]) -> None:
    """One after the other; the next is read and the one before is written meanwhile."""
    overlapped(cases, job.read, job.predict, job.write)


def predict_inputs(
    ensemble: Ensemble,
    inputs: Sequence[Path],
    output: Path,
    console: Console,
    options: Options | None = None,
    *,
    exchange: Exchange = HERE,
    engine: Engine = in_this_process,
) -> Outcome:
    """Predict scans and write the files of each, with `predictions.json` and the manifest beside them.

    Args:
        ensemble: the loaded models.
        inputs: files, DICOM series folders, trees and zips of them, folders of many cases.
        output: folder for the files; made if need be.
        console: where the user reads.
        options: what is written, and how.
        exchange: where files go.
        engine: who works.
    Raises:
        MedsegError: E_NO_CASES if nothing is found; E_NAME for an unknown class; E_OUTPUT, before any work, if a file
            exists or cannot be written for a case, and later if the disk refuses; what reading or the model refuse,
            unless bad cases are skipped. Cases before the refused one are written, the refused one leaves no file.
    """
    options = options or Options()
    info = ensemble.info
    with console.status("looking at the inputs"), gathered_warnings() as warnings:
        unusable: Refused | None = [] if options.on_bad_case == "skip" else None
        cases = find_inputs(
            inputs, channels=info.channels, modality=info.modality, reading=options.reading, refused=unusable
        )
    say(console, warnings)
    refused = _refused(export_of(ensemble, options), cases, unusable)
    return predict_cases(ensemble, cases, output, console, options, refused=refused, exchange=exchange, engine=engine)


def predict_cases(
    ensemble: Ensemble,
    cases: Sequence[Case],
    output: Path,
    console: Console,
    options: Options,
    *,
    refused: Mapping[str, MedsegError] = MappingProxyType({}),
    exchange: Exchange = HERE,
    engine: Engine = in_this_process,
) -> Outcome:
    """As `predict_inputs`, of cases that were found elsewhere.

    Args:
        ensemble: the loaded models.
        cases: all that is to be done; their ids differ.
        output: folder for the files.
        console: where the user reads.
        options: what is written, and how.
        refused: cases that are known to be bad before they are read.
        exchange: where scans come from, and files go.
        engine: who works.
    Raises:
        MedsegError: as `predict_inputs`, and what the exchange and the engine refuse.
    """
    subset = subset_of(ensemble, options)
    export = export_of(ensemble, options)
    manifest = Manifest(output, model_digest(ensemble), _options(ensemble, options), context_of(ensemble))
    _check_output(output, cases, export, manifest, options)
    records = _earlier_records(output, subset.labels, manifest, overwrite=options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    tidy(output)
    write_predictions_table(output, subset.labels, records | manifest.records())
    if set(options.forms) - {Form.NIFTI}:
        say(console, [IDENTIFIERS_REMARK])
    for line in ensemble.describe():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if options.resume:
        say(console, _redone(manifest, cases))
    with cases_bar(console, len(cases)) as bar:
        job = Job(ensemble, subset, export, manifest, options, console, bar, len(cases), refused, exchange)
        try:
            engine(job, cases)
        except KeyboardInterrupt:
            say(console, [f"stopped: {job.num_done} of {len(cases)} cases are done; go on with --resume"])
            raise
        finally:
            manifest.close()
            write_predictions_table(output, subset.labels, records | manifest.records())
            if options.statistics:
                write_statistics(output / STATISTICS_FILE, manifest.rows())
    outcome = Outcome(tuple(job.files), job.num_before, job.bad)
    _conclude(console, len(cases), outcome)
    return outcome


def subset_of(ensemble: Ensemble, options: Options) -> Subset:
    """The classes that are written.

    Raises:
        MedsegError: E_NAME for an unknown one.
    """
    labels = ensemble.info.labels
    return choose(labels, options.classes) if options.classes is not None else whole(labels)


def export_of(ensemble: Ensemble, options: Options) -> Export:
    """How label maps become files."""
    labels = subset_of(ensemble, options).labels
    return Export(ensemble.info, options.forms, options.reading, ensemble.model_names, labels)


def _options(ensemble: Ensemble, options: Options) -> dict[str, Any]:
    """All that decides what the files of a case hold, beside the models."""
    labels = ensemble.info.labels
    return {
        **options_of(ensemble),
        "format": [str(form) for form in options.forms],
        "classes": options.classes and sorted(name.strip() for name in options.classes.split(",")),
        "statistics": options.statistics,
        "probabilities": list(labels.region_names or labels.names) if options.probabilities else None,
        "uncertainty": options.uncertainty,
        "preview": options.draw_preview is not None,
        "reading": asdict(options.reading),
    }


def _refused(export: Export, cases: Sequence[Case], unusable: Refused | None) -> dict[str, MedsegError]:
    """The cases that are known to be bad before they are read; these end the work where `unusable` is None."""
    if unusable is None:
        export.check(cases)
        return {}
    export.check(())
    refused = {case.case_id: error for case in cases for source, error in unusable if source in case.images}
    for case in cases:
        try:
            export.check([] if case.case_id in refused else [case])
        except MedsegError as error:
            refused[case.case_id] = error
    return refused


def _redone(manifest: Manifest, cases: Sequence[Case]) -> list[str]:
    """What is done again because another model or other options made it, one line for each kind."""
    counts: dict[str, int] = {}
    for case in cases:
        entry = manifest.entries.get(case.case_id)
        if entry is not None and entry.failed is None and entry.session != manifest.session:
            other = manifest.difference(entry.session)
            counts[other] = counts.get(other, 0) + 1
    return [f"done again: {count} cases that {other} made" for other, count in counts.items()]


def _conclude(console: Console, num_cases: int, outcome: Outcome) -> None:
    if num_cases > 1 or outcome.num_before or outcome.bad:
        parts = [f"{num_cases - outcome.num_before - len(outcome.bad)} predicted"]
        parts += [f"{outcome.num_before} done before"] if outcome.num_before else []
        parts += [f"{len(outcome.bad)} bad and left out"] if outcome.bad else []
        console.print(
            f"{num_cases} {'case' if num_cases == 1 else 'cases'}: {', '.join(parts)}", highlight=False, markup=False
        )
    for case_id, failed in outcome.bad.items():
        line = f"bad: {case_id}: {failed['code']}: {failed['message']}"
        console.print(line, style="red", highlight=False, soft_wrap=True, markup=False)


def refuse_swapped(run: Path, inputs: Sequence[Path]) -> None:
    """Refuse a RUN that is none, and say so where the arguments look swapped.

    Raises:
        MedsegError: E_RUN.
    """
    if is_model(run):
        return
    swapped = next((path for path in inputs if _may_be_model(path)), None)
    inside = sorted((path for path in run.glob("*") if _may_be_model(path)), key=lambda p: p.stat().st_mtime)
    if swapped is not None:
        remedy = f"did you swap them? RUN comes first, then the scans: medseg predict {swapped} {run} -o OUT"
    elif inside:
        remedy = f"did you mean the last run in it: {inside[-1]} ?"
    else:
        remedy = "give the run's folder: medseg train prints it when it starts and when it ends"
    raise MedsegError(
        Code.RUN,
        "this is not a run of medseg" if run.exists() else "there is no such run",
        where=run,
        expected="a folder that medseg train or medseg select made, or what medseg export made of it",
        got="a file" if run.is_file() else None,
        remedy=remedy,
    )


def _may_be_model(path: Path) -> bool:
    """`is_model`, where nobody said that it should be one: damaged zips of scans are none."""
    try:
        return is_model(path)
    except MedsegError:
        return False


def label_name(case_id: str, image: Volume) -> str:
    """Name of a case's label file: NIfTI for volumes, PNG for pictures."""
    return f"{case_id}.png" if image.grid.is_picture else f"{case_id}.nii.gz"


def write_predictions_table(folder: Path, labels: Labels, cases: dict[str, CaseRecord] | None = None) -> None:
    """Write which value means which class, and what is to be known of each case."""
    write_table(folder / TABLE_FILE, labels.to_json(), cases)


def _check_output(output: Path, cases: Sequence[Case], export: Export, manifest: Manifest, options: Options) -> None:
    """Refuse to replace anything unasked, and under no circumstances the scans."""
    if output.exists() and not output.is_dir():
        raise MedsegError(Code.OUTPUT, "the output is not a folder", where=output, remedy="give a folder with -o")
    sources = {file.resolve() for case in cases for file in files_of(case.images)}
    existing = [path for case in cases for name in export.names(case.case_id) if (path := output / name).exists()]
    if sources & {path.resolve() for path in existing}:
        raise MedsegError(
            Code.OUTPUT,
            "the labels would replace the scans that they are made from",
            where=output,
            remedy="choose another folder with -o",
        )
    ours = [path for path in existing if path.name in manifest.written]
    refused = [path for path in existing if not options.resume or path not in ours]
    if refused and not options.overwrite:
        skip = ", skip what is done with --resume" if ours and not options.resume else ""
        raise MedsegError(
            Code.OUTPUT,
            f"{len(refused)} label file(s) exist already",
            where=refused[0],
            remedy=f"choose another folder with -o{skip}, or replace them with --overwrite",
        )


def _earlier_records(output: Path, labels: Labels, manifest: Manifest, *, overwrite: bool) -> dict[str, CaseRecord]:
    """What the folder's table says of cases that were predicted or converted before.

    Raises:
        MedsegError: E_OUTPUT where it speaks of other classes: one table cannot stand for both.
    """
    try:
        earlier, records = read_labels(output / TABLE_FILE), read_cases(output / TABLE_FILE)
    except MedsegError:
        if not overwrite:
            raise
        manifest.reset()
        return {}
    if earlier is None or earlier == labels:
        return records
    if overwrite:
        manifest.reset()
        return {}
    raise MedsegError(
        Code.OUTPUT,
        f"the folder holds predictions of another model: its {TABLE_FILE} names other classes",
        where=output,
        expected=labels.to_json(),
        got=earlier.to_json(),
        remedy="choose another folder with -o, or replace it with --overwrite",
    )
