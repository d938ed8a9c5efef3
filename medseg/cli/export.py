"""medseg export."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export", short_help="Put a trained model into one file, to hand on.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="BUNDLE", type=click.Path(path_type=Path),
              help="The bundle: a name that ends in .zip, or a folder.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
def export(run: Path, output: Path, overwrite: bool) -> None:
    """Write the bundle of RUN: a folder that medseg train or medseg select made.

    It holds the weights of the best checkpoint (of each fold, of each run of an ensemble), plan, classes,
    post-processing, the model card, and a manifest: size and SHA-256 of each file, versions, revision of the code,
    seeds, a fingerprint of the training data. It holds no scans and no paths; the model card names cases by their ids.

    medseg predict, verify and export take the bundle wherever they take a RUN, and so does trainer.initial. Before it
    is used every file is checked; anything but JSON, YAML, Markdown and safetensors is refused, and no code is run.

    \b
      medseg export runs/2026-01-31_10-00-00_unet -o liver.zip
      medseg predict liver.zip scan.nii.gz -o labels
      medseg verify liver.zip
    """
    from rich.console import Console

    from medseg.inference.folder import refuse_swapped
    from medseg.inference.packing import export_bundle
    from medseg.program import command

    refuse_swapped(run, ())
    manifest = export_bundle(run, output, overwrite=overwrite)
    size = sum(file.size for file in manifest.files.values())
    Console().print(
        f"written: {output}, {len(manifest.files)} files, {size / 1e6:.1f} MB\n"
        f"use: {command('predict', output)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
