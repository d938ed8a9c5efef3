"""medseg doctor."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import click

from medseg import __version__

EXIT_UNWELL = 1
"""Something that training or prediction needs does not work."""


@click.command("doctor", short_help="What this machine can do, and what to do where it cannot.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of a table.")
@click.option("--runs", metavar="FOLDER", default="runs", show_default=True, type=click.Path(path_type=Path),
              help="Where runs will be written; it need not be there.")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="The device that must work: auto (what there is), cpu, cuda or cuda:N.")  # fmt: skip
def doctor(as_json: bool, runs: Path, device: str) -> None:
    """Look at versions, devices, precisions, decoders, memory and disks, and say for each fault what to do.

    Precisions are tried on the device, and files are written where runs will go; nothing is left behind. The exit
    status is 1 where something needed does not work; with --device cuda also where there is no GPU.

    Nothing printed names a person, a machine or a folder: paste it into a bug report.

    \b
      medseg doctor
      medseg doctor --device cuda --runs /scratch/runs
      medseg doctor --json
    """
    try:
        from medseg.diagnosis import Status, diagnose
    except (ImportError, OSError) as error:  # the patient cannot even be looked at
        _say_unimportable(error, as_json)
        sys.exit(EXIT_UNWELL)

    diagnosis = diagnose(runs, device)
    if as_json:
        click.echo(diagnosis.to_json())
    else:
        from rich.console import Console

        from medseg.diagnosis.table import print_diagnosis

        print_diagnosis(diagnosis, Console())
    if diagnosis.status is Status.FAIL:
        sys.exit(EXIT_UNWELL)


def _say_unimportable(error: Exception, as_json: bool) -> None:
    """A diagnosis of one line: a package that medseg needs cannot be imported."""
    found = f"{type(error).__name__}: {error}".replace(str(Path.home()), "~").splitlines()[0]
    remedy = "install medseg again: pip install . (or: make clean demo)"
    if as_json:
        check = {"name": "packages", "status": "fail", "found": found, "remedy": remedy}
        environment = {"medseg": __version__, "python": platform.python_version()}
        click.echo(json.dumps({"format": 1, "status": "fail", "environment": environment, "checks": [check]}, indent=2))
    else:
        click.echo(f"fail  packages  {found}\n                → {remedy}")
