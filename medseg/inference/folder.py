"""Many scans through one warm model into label files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from medseg.data.cases import find_inputs, load_image
from medseg.errors import Code, MedsegError
from medseg.formats import write_label
from medseg.formats.atomic import whole_file
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
    overwrite: bool = False,
    draw_preview: Callable[..., None] | None = None,
) -> list[Path]:
    """Predict scans and write one label file each.

    Args:
        predictor: the loaded model.
        inputs: files, DICOM series folders, folders of many cases.
        output: folder for the label files; made if need be.
        console: where the user reads.
        overwrite: replace label files that exist.
        draw_preview: `reports.overlay.save_overlay`, or None for no pictures.
    Returns:
        The label files.
    Raises:
        MedsegError: E_NO_CASES if nothing is found; E_OUTPUT if a label file exists, before any work; what reading
            or the model refuse. Cases before the refused one are written, the refused one leaves no file.
    """
    info = predictor.bundle.info
    cases = find_inputs(inputs, channels=info.channels)
    if output.exists() and not output.is_dir():
        raise MedsegError(Code.OUTPUT, "the output is not a folder", where=output, remedy="give a folder with -o")
    sources = {file.resolve() for case in cases for file in case.images}
    suffix = ".nii.gz" if info.plan.orientation else ".png"
    existing = [path for case in cases if (path := output / f"{case.case_id}{suffix}").exists()]
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
    previews = output / PREVIEW_FOLDER
    (output if draw_preview is None else previews).mkdir(parents=True, exist_ok=True)
    write_predictions_table(output, info.labels)
    written = []
    for number, case in enumerate(cases, start=1):
        with console.status(f"{case.case_id} ({number} of {len(cases)})"):
            image = load_image(case, channels=info.channels)
            label = predictor.predict(image)
            path = output / label_name(case.case_id, image)
            write_label(path, label)
            if draw_preview is not None:
                draw_preview(
                    previews / f"{case.case_id}.png",
                    image,
                    labels=info.labels,
                    predicted=label,
                    title=case.case_id,
                )
        written.append(path)
        console.print(f"{number}/{len(cases)}  {path}  {_shape(label)}", highlight=False, soft_wrap=True)
    return written


def label_name(case_id: str, image: Volume) -> str:
    """Name of a case's label file: NIfTI for volumes, PNG for pictures."""
    return f"{case_id}.png" if image.grid.is_picture else f"{case_id}.nii.gz"


def write_predictions_table(folder: Path, labels: Labels) -> None:
    """Write which value means which class."""
    with whole_file(folder / TABLE_FILE, ".json") as temporary:
        temporary.write_text(json.dumps({"labels": labels.to_json()}, indent=2), encoding="utf-8")


def _shape(label: Volume) -> str:
    spacing = "×".join(f"{s:.3g}" for s in label.grid.spacing_mm)
    unit = "px" if label.grid.is_picture else "mm"
    return f"{'×'.join(str(s) for s in label.grid.shape)} at {spacing} {unit}, {label.array.dtype}"
