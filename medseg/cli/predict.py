"""medseg predict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from medseg.cli.reading import reading_options

if TYPE_CHECKING:
    from medseg.formats import Reading

EXIT_BAD_CASES = 3
"""All cases were looked at, and some were left out."""


@click.command("predict", short_help="Label scans with a trained model.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the label files.")
@click.option("--checkpoint", default="best", show_default=True, type=click.Choice(["best", "latest"]),
              help="The weights of the best validation, or the last ones.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", show_default=True, type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
              help="What the network computes in; auto: bf16 where the processor has it.")  # fmt: skip
@click.option("--step", default=0.5, show_default=True, help="Distance of tiles as a share of the tile.")
@click.option("--mirror", is_flag=True, help="Average over mirrored passes, where the model was trained so.")
@click.option("--batch-size", type=int, show_default="fastest", help="Tiles in one forward pass.")
@click.option("--compile", "compiled", default="auto", show_default=True, type=click.Choice(["auto", "on", "off"]),
              help="torch.compile; auto: on CUDA, once many tiles were predicted.")  # fmt: skip
@click.option("--skip/--no-skip", default=True, show_default=True,
              help="Compute tiles of one and the same value (air) once. Exact: it only saves time.")  # fmt: skip
@click.option("--format", "forms", show_default="nifti; dicom-seg with --to dicomweb", metavar="LIST",
              help="What to write: nifti, dicom-seg, rtstruct, or several with commas. DICOM needs DICOM.")  # fmt: skip
@click.option("--postprocess/--no-postprocess", default=True, show_default=True,
              help="Keep only the largest component, where postprocessing.md of RUN says that it helps.")  # fmt: skip
@click.option("--classes", metavar="LIST", help="Only these classes, with commas; the others become background.")
@click.option("--statistics", is_flag=True,
              help="Also write statistics.csv: volume, mean intensity, components, touching the border.")  # fmt: skip
@click.option("--probabilities", is_flag=True,
              help="Also write probabilities/CASE.nii.gz: for each class, the background first. Large.")  # fmt: skip
@click.option("--uncertainty", is_flag=True,
              help="Also write uncertainty/CASE.nii.gz, 0 to 1: the entropy of the mean of mirrored passes and folds; "
              "and disagreement/CASE.nii.gz: how much of it is that they differ.")  # fmt: skip
@click.option("--preview", is_flag=True, help="Also save an overlay picture (PNG) of each case.")
@click.option("--resume", is_flag=True, help="Skip the cases that are done: same input, model and options.")
@click.option("--on-bad-case", default="error", show_default=True, type=click.Choice(["error", "skip"]),
              help="A case that cannot be predicted ends the work, or is listed and left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace label files that exist already.")
@click.option("--from", "source", type=(click.Choice(["dicomweb", "storage"]), str), metavar="KIND URL",
              help="Predict what lies elsewhere: dicomweb https://… (a DICOM archive), storage s3://… "
              "(also gs, az). Credentials: see docs/archive.md.")  # fmt: skip
@click.option("--query", "queries", multiple=True, metavar="KEYWORD=VALUE",
              help="Which series of the archive: StudyDate=20260101-20260331, … Repeat for several.")  # fmt: skip
@click.option("--to", "sink", type=(click.Choice(["dicomweb", "storage"]), str), metavar="KIND URL",
              help="Store SEG and RTSTRUCT (dicomweb) or all files (storage) there instead of in OUT.")  # fmt: skip
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
              help="Who works: this process, or a Ray cluster (RAY_ADDRESS, else one of this machine).")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), show_default="one for each GPU, else for each node",
              help="Processes of --engine ray; each holds the models.")  # fmt: skip
@reading_options
def predict(
    run: Path,
    inputs: tuple[Path, ...],
    output: Path,
    checkpoint: str,
    device: str,
    precision: str,
    step: float,
    mirror: bool,
    batch_size: int | None,
    compiled: Literal["auto", "on", "off"],
    skip: bool,
    forms: str | None,
    postprocess: bool,
    classes: str | None,
    statistics: bool,
    probabilities: bool,
    uncertainty: bool,
    preview: bool,
    resume: bool,
    on_bad_case: Literal["error", "skip"],
    overwrite: bool,
    source: tuple[str, str] | None,
    queries: tuple[str, ...],
    sink: tuple[str, str] | None,
    engine: Literal["local", "ray"],
    workers: int | None,
    reading: Reading,
) -> None:
    """Label scans with the models of RUN: a folder that medseg train or medseg select made.

    The folds of a run, and the runs that medseg select put together, answer together: the mean of what they say.

    Each INPUT is a file (NIfTI, PNG, TIFF, enhanced DICOM), a folder or zip with one DICOM series, a tree of many
    series, or a folder of many cases. The models are loaded once. While a case is predicted, the next is read and the
    one before is written: three scans in memory at most. Each label file lies on exactly its scan's grid, in the
    smallest integer type, carries the values that the training labels had, and names them in its NIfTI header.

    OUT/predictions.json says which value means which class, and what is to be known of each case (lossy sources, what
    was resampled). OUT/predictions.jsonl has a line for each case: SHA-256 of input and files, seconds, warnings,
    model, options, versions; bad cases with code and message.

    Thousands of cases: --on-bad-case skip sets bad ones aside. After Ctrl-C, a crash or a repair the same command with
    --resume goes on: what is whole is skipped; what failed, or whose input, model or options have changed, is done
    again; a file that somebody has changed since is never replaced without --overwrite.

    \b
    Exit status: 0 all is predicted; 2 refused, or ended by a bad case; 3 ended, but bad cases were left out;
    130 stopped by Ctrl-C.

    A run of task=classification gives OUT/predictions.csv: for each image its class and the probabilities of all.

    Scans of a DICOM archive or an object store (--from, --to) and clusters (--engine ray): docs/archive.md.

    \b
      medseg predict runs/2026-01-31_10-00-00_unet scan.nii.gz -o labels
      medseg predict RUN patient7/CT_series patient8/CT_series -o labels --preview
      medseg predict RUN folder_of_scans -o labels
      medseg predict RUN folder_of_scans -o labels --resume --on-bad-case skip --statistics
      medseg predict RUN scan.nii.gz -o labels --classes liver,spleen
      medseg predict RUN export.zip -o labels --format nifti,dicom-seg,rtstruct
      medseg predict RUN --from dicomweb https://pacs/dicom-web --to dicomweb https://pacs/dicom-web -o WORK
    """
    from rich.console import Console

    from medseg.classification.bundle import is_classifier
    from medseg.classification.verbs import refuse_options
    from medseg.formats.dicom.export import forms_of
    from medseg.inference.ensemble import Ensemble
    from medseg.inference.folder import predict_inputs, refuse_swapped
    from medseg.inference.job import Options

    if not inputs and source is None:
        raise click.UsageError("Missing argument 'INPUTS...' or option '--from'.")
    if workers is not None and engine != "ray":
        raise click.UsageError("--workers is of --engine ray, which is not asked for.")
    wanted_forms = forms_of(forms or ("dicom-seg" if sink is not None and sink[0] == "dicomweb" else "nifti"))
    refuse_swapped(run, inputs)
    if is_classifier(run):
        from medseg.classification.predict import classify_inputs

        context = click.get_current_context()
        given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        others = {"--from": source, "--to": sink, "--engine": engine != "local", "--format": forms, "--mirror": mirror}
        others |= {"--classes": classes, "--statistics": statistics, "--probabilities": probabilities}
        others |= {"--uncertainty": uncertainty, "--preview": preview, "--resume": resume, "--step": "step" in given}
        others |= {"--skip/--no-skip": "skip" in given, "--postprocess/--no-postprocess": "postprocess" in given}
        refuse_options({**others, "--compile": "compiled" in given, "--workers": workers, "--query": queries})
        found = classify_inputs(
            run,
            inputs,
            output,
            Console(),
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            reading=reading,
            batch_size=batch_size,
            skip_bad=on_bad_case == "skip",
            overwrite=overwrite,
        )
        if found.bad:
            sys.exit(EXIT_BAD_CASES)
        return
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "device": device,
        "precision": precision,
        "step": step,
        "mirror": mirror,
        "batch_size": batch_size,
        "skip": skip,
        "compile": compiled,
        "postprocess": postprocess,
    }
    ensemble = Ensemble.from_run(run, **settings)
    options = Options(
        forms=wanted_forms,
        reading=reading,
        classes=classes,
        statistics=statistics,
        probabilities=probabilities,
        uncertainty=uncertainty,
        draw_preview=_drawing() if preview else None,
        overwrite=overwrite,
        resume=resume,
        on_bad_case=on_bad_case,
    )
    if source is None and sink is None and not queries and engine == "local":
        outcome = predict_inputs(ensemble, inputs, output, Console(), options)
    else:
        from medseg.inference.folder import in_this_process
        from medseg.remote.cluster import ray_engine
        from medseg.remote.predict import predict_remote, query_of

        outcome = predict_remote(
            ensemble,
            inputs,
            output,
            Console(),
            options,
            source=source,
            sink=sink,
            query=query_of(queries),
            engine=in_this_process if engine == "local" else ray_engine(run, settings, workers),
        )
    if outcome.bad:
        sys.exit(EXIT_BAD_CASES)


def _drawing() -> Callable[..., None]:
    """What draws previews; imported only where they are wanted, because matplotlib takes half a second."""
    from medseg.reports.overlay import save_overlay

    return save_overlay
