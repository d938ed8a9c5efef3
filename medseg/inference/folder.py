"""Many scans through one warm model into label files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from medseg.bundle import BUNDLE_FILE
from medseg.data.cases import load_image
from medseg.data.inputs import find_inputs
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.formats.dicom.export import IDENTIFIERS_REMARK, Form
from medseg.formats.label_table import CaseRecord, read_cases, read_labels, write_table
from medseg.formats.remarks import gathered_warnings, remarks
from medseg.inference.export import Export, files_of
from medseg.inference.predictor import Predictor
from medseg.labels import TABLE_FILE, Labels
from medseg.volume import Volume

PREVIEW_FOLDER = "previews"
"""Below the label files: pictures beside them would be taken for label files by whoever reads the folder."""


def predict_inputs(
    predictor: Predictor,
    inputs: Sequence[Path],
    output: Path,
    console: Console,
    *,
    forms: tuple[Form, ...] = (Form.NIFTI,),
    reading: Reading = STRICT,
    overwrite: bool = False,
    draw_preview: Callable[..., None] | None = None,
) -> list[Path]:
    """Predict scans and write the files of each, with `predictions.json` beside them.

    Args:
        predictor: the loaded model.
        inputs: files, DICOM series folders, trees and zips of them, folders of many cases.
        output: folder for the files; made if need be.
        console: where the user reads.
        forms: which files each case gets.
        reading: what is asked of the readers beyond their strict defaults.
        overwrite: replace files that exist.
        draw_preview: `reports.overlay.save_overlay`, or None for no pictures.
    Returns:
        The files, case by case.
    Raises:
        MedsegError: E_NO_CASES if nothing is found; E_OUTPUT, before any work, if a file exists or cannot be written
            for a case; what reading or the model refuse. Cases before the refused one are written, the refused one
            leaves no file.
    """
    info = predictor.bundle.info
    with console.status("looking at the inputs"), gathered_warnings() as warnings:
        cases = find_inputs(inputs, channels=info.channels, modality=info.modality, reading=reading)
    _say(console, warnings)
    export = Export(info, forms, reading)
    export.check(cases)
    _check_output(output, cases, export, overwrite=overwrite)
    records = _earlier_records(output, info.labels, overwrite=overwrite)
    previews = output / PREVIEW_FOLDER
    (output if draw_preview is None else previews).mkdir(parents=True, exist_ok=True)
    write_predictions_table(output, info.labels, records)
    if set(forms) - {Form.NIFTI}:
        _say(console, [IDENTIFIERS_REMARK])
    written: list[Path] = []
    for number, case in enumerate(cases, start=1):
        with console.status(f"{case.case_id} ({number} of {len(cases)})"), gathered_warnings() as warnings:
            image = _with_modality_note(load_image(case, channels=info.channels, reading=reading), info.modality)
            indices = predictor.predict_indices(image)
            label = predictor.in_file_values(indices)
            files = export.write(case, indices, label, output)
            records[case.case_id] = CaseRecord(tuple(file.name for file in files), image.notes)
            write_predictions_table(output, info.labels, records)
            if draw_preview is not None:
                picture = previews / f"{case.case_id}.png"
                draw_preview(picture, image, labels=info.labels, predicted=label, title=case.case_id)
        written += files
        names = ", ".join([str(files[0]), *(file.name for file in files[1:])])
        console.print(f"{number}/{len(cases)}  {names}  {_shape(label)}", highlight=False, soft_wrap=True, markup=False)
        _say(console, remarks(image.notes, warnings))
    return written


def _with_modality_note(image: Volume, trained_on: str | None) -> Volume:
    """The scan, with a note where it is of another modality than the model's; a single scan is what the user chose."""
    if None in (image.modality, trained_on) or image.modality == trained_on:
        return image
    note = f"the scan is {image.modality}, the model was trained on {trained_on}: do not expect sense of its labels"
    return replace(image, notes=(*image.notes, note))


def refuse_swapped(run: Path, inputs: Sequence[Path]) -> None:
    """Refuse a RUN that is none, and say so where the arguments look swapped.

    Raises:
        MedsegError: E_RUN.
    """
    if (run / BUNDLE_FILE).is_file():
        return
    swapped = next((path for path in inputs if (path / BUNDLE_FILE).is_file()), None)
    inside = sorted((path.parent for path in run.glob(f"*/{BUNDLE_FILE}")), key=lambda p: p.stat().st_mtime)
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
        expected=f"a folder with {BUNDLE_FILE}, as medseg train writes it",
        got="a file" if run.is_file() else None,
        remedy=remedy,
    )


def label_name(case_id: str, image: Volume) -> str:
    """Name of a case's label file: NIfTI for volumes, PNG for pictures."""
    return f"{case_id}.png" if image.grid.is_picture else f"{case_id}.nii.gz"


def write_predictions_table(folder: Path, labels: Labels, cases: dict[str, CaseRecord] | None = None) -> None:
    """Write which value means which class, and what is to be known of each case."""
    write_table(folder / TABLE_FILE, labels.to_json(), cases)


def _check_output(output: Path, cases: Sequence[Case], export: Export, *, overwrite: bool) -> None:
    """Refuse to replace anything, and under no circumstances the scans."""
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
    if existing and not overwrite:
        raise MedsegError(
            Code.OUTPUT,
            f"{len(existing)} label file(s) exist already",
            where=existing[0],
            remedy="choose another folder with -o, or replace them with --overwrite",
        )


def _earlier_records(output: Path, labels: Labels, *, overwrite: bool) -> dict[str, CaseRecord]:
    """What the folder's table says of cases that were predicted before.

    Raises:
        MedsegError: E_OUTPUT where it speaks of other classes: one table cannot stand for both.
    """
    try:
        earlier, records = read_labels(output / TABLE_FILE), read_cases(output / TABLE_FILE)
    except MedsegError:
        if overwrite:
            return {}
        raise
    if earlier is None or earlier == labels:
        return records
    if overwrite:
        return {}
    raise MedsegError(
        Code.OUTPUT,
        f"the folder holds predictions of another model: its {TABLE_FILE} names other classes",
        where=output,
        expected=labels.to_json(),
        got=earlier.to_json(),
        remedy="choose another folder with -o, or replace it with --overwrite",
    )


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(f"note: {line}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def _shape(label: Volume) -> str:
    spacing = "×".join(f"{s:.3g}" for s in label.grid.spacing_mm)
    unit = "px" if label.grid.is_picture else "mm"
    return f"{'×'.join(str(s) for s in label.grid.shape)} at {spacing} {unit}, {label.array.dtype}"
