"""medseg verify."""

from __future__ import annotations

import sys
from pathlib import Path

import click

EXIT_CHANGED = 3
"""Everything was looked at, and something is not what it was."""
MOST_SHOWN = 40
"""Files that a table shows one by one; of more only those that are not as they were."""


@click.command("verify", short_help="Check that the files of a run, bundle or prediction are what they were.")
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of a table.")
def verify(path: Path, as_json: bool) -> None:
    """Compare all files of RUN with the SHA-256 that were written down when it was made.

    RUN is a folder that medseg train or medseg select made, a bundle of medseg export (folder or zip), or a folder of
    medseg predict. Of a run that is not done only the checkpoints are checked: they carry their own SHA-256. Files that
    came later are listed and nothing is said of them; in a bundle they are wrong.

    A manifest proves that nothing was damaged or changed by accident: whoever changes a file on purpose can change the
    manifest too. Compare the manifest's own SHA-256, or the zip's, with what its author says.

    \b
    Exit status: 0 all is as it was; 2 refused; 3 something is missing, changed or damaged.
    """
    from medseg.inference.verification import Status
    from medseg.inference.verification import verify as verify_files

    verification = verify_files(path)
    if as_json:
        click.echo(verification.to_json())
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        colours = {Status.OK: "green", Status.WRONG: "red", Status.UNKNOWN: "dim"}
        everything = len(verification.findings) <= MOST_SHOWN
        shown = [f for f in verification.findings if everything or f.status is not Status.OK]
        console = Console()
        if shown:
            table = Table("file", "status", "what", title=verification.kind)
            for finding in shown:
                status = Text(finding.status, style=colours[finding.status])
                table.add_row(Text(finding.name), status, Text(finding.detail))
            console.print(table)
        counts = {status: sum(f.status is status for f in verification.findings) for status in Status}
        console.print(", ".join(f"{number} {status}" for status, number in counts.items() if number), highlight=False)
    if not verification.is_ok:
        sys.exit(EXIT_CHANGED)
