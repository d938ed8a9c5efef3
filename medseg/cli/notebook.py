"""medseg notebook: Jupyter on the notebooks that come with medseg."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click

from medseg.errors import Code, MedsegError

RUNS_VARIABLE = "MEDSEG_RUNS"
"""What tells the notebooks where a run is, or a folder of runs."""
INSPECTION = "04_inspect_predictions.ipynb"
"""The notebook about a run."""
USUAL_RUNS = ("runs", "demo/runs")
"""Where `medseg train` and `medseg demo` put runs."""
LONGEST_LINE = 100
"""Columns of what is said of a notebook, on wide terminals."""
SERVERS = ("jupyterlab", "notebook")
"""Jupyter's programs, the best first."""
SILENT = (
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
)
"""medseg opens no connection unless asked: JupyterLab would look for news and newer versions."""
SETTINGS = Path(__file__).resolve().parent / "jupyter"
"""Defaults of JupyterLab's settings, searched beside the user's: without them it asks whether to fetch news."""


@click.command("notebook", short_help="Open the notebooks in Jupyter.")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", "folder", default="medseg-notebooks", show_default=True,
              type=click.Path(path_type=Path), help="Folder for copies of the notebooks, yours to change.")  # fmt: skip
@click.option("--browser/--no-browser", default=True, show_default=True,
              help="Open a browser; otherwise the address is printed.")  # fmt: skip
@click.option("--port", default=8888, show_default=True, help="Of this machine; the next ones if it is taken.")
@click.option("--allow-root", is_flag=True, help="Also start as root, as in a container: Jupyter refuses it otherwise.")
@click.option("--list", "only_list", is_flag=True, help="Say which notebooks there are, and what they teach.")
def notebook(run: Path | None, folder: Path, browser: bool, port: int, allow_root: bool, only_list: bool) -> None:
    """Open the notebooks that come with medseg in Jupyter: what a data set holds, how a network works, predictions.

    RUN is a run to look at, or a folder of runs; by default ./runs or ./demo/runs. The notebooks are copied: copies
    that are there already stay as they are.

    \b
      medseg notebook
      medseg notebook runs/2026-01-31_10-00-00_unet
      medseg notebook --no-browser --port 9000         on a server, seen through ssh -L 9000:localhost:9000
    """
    shipped = shipped_notebooks()
    if only_list:
        for path in shipped:
            title, says = first_words(path)
            width = min(shutil.get_terminal_size().columns, LONGEST_LINE)
            click.echo(f"{path.name:<36} {title}")
            click.echo(click.wrap_text(says, width, initial_indent="    ", subsequent_indent="    "))
        return
    server = _server()
    runs = _runs(run)
    fresh = copy_notebooks(shipped, folder)
    click.echo(f"notebooks: {folder.resolve()} ({fresh} new, {len(shipped) - fresh} as they were)")
    click.echo(f"runs:      {runs or 'none; make one with medseg demo, or name one: medseg notebook RUN'}")
    arguments = [sys.executable, "-m", server, *SILENT, f"--ServerApp.root_dir={folder.resolve()}"]
    arguments += [f"--ServerApp.port={port}", f"--ServerApp.open_browser={browser}"]
    arguments += [f"--ServerApp.allow_root={allow_root}"]
    if run is not None:
        arguments.append(str(folder.resolve() / INSPECTION))
    searched = [str(SETTINGS), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    environment = {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, searched))}
    if runs is not None:
        environment[RUNS_VARIABLE] = str(runs)
    sys.exit(_serve(arguments, environment))


def shipped_notebooks() -> list[Path]:
    """The notebooks, inside an installed wheel or at the top of the source tree, in their order.

    Raises:
        MedsegError: E_MISSING from an installation without them.
    """
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "notebooks", package.parent / "notebooks"
    folder = inside if inside.is_dir() else beside
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise MedsegError(
            Code.MISSING, "this installation has no notebooks", where=package.name, remedy="install medseg again"
        )
    return found


def first_words(path: Path) -> tuple[str, str]:
    """The title of a notebook, and the first sentence below it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[0]["source"])
    title, _, rest = text.partition("\n")
    return title.lstrip("# ").strip(), _without_marks(rest.strip().split("\n\n")[0])


def _without_marks(text: str) -> str:
    """A paragraph of Markdown as plain text, in one line."""
    from markdown_it import MarkdownIt

    (inline,) = MarkdownIt().parseInline(text)
    words = "".join(" " if part.type.endswith("break") else part.content for part in inline.children or ())
    whole_sentences = re.match(r".*[.?!]", line := " ".join(words.split()))  # what follows announces a list
    return whole_sentences.group() if whole_sentences else line


def copy_notebooks(shipped: Sequence[Path], folder: Path) -> int:
    """Copy those that are not there yet; returns their number.

    Raises:
        MedsegError: E_OUTPUT if the folder cannot be written.
    """
    from medseg.formats.atomic import whole_file

    missing = [path for path in shipped if not (folder / path.name).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:  # half a notebook would stay as it is the next time
            with whole_file(folder / path.name, path.suffix) as temporary:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise MedsegError(
            Code.OUTPUT,
            "the notebooks cannot be copied",
            where=folder,
            got=error.strerror,
            remedy="give another with -o",
        ) from error
    return len(missing)


def _server() -> str:
    """The module that starts Jupyter.

    Raises:
        MedsegError: E_MISSING where it is not installed.
    """
    for name in SERVERS:
        if find_spec(name) is not None:
            return name
    raise MedsegError(
        Code.MISSING,
        "Jupyter is not installed",
        expected=" or ".join(SERVERS),
        remedy=f"{sys.executable} -m pip install 'medseg[notebook]'",
    )


def _runs(run: Path | None) -> Path | None:
    """Where the runs are that the notebooks look at; None where none was named and none is in a usual place.

    Raises:
        MedsegError: E_MISSING, or E_RUN for a folder without runs.
    """
    if run is None:
        run = next((Path(name) for name in USUAL_RUNS if any(Path(name).glob("**/bundle.json"))), None)
        return None if run is None else run.resolve()
    if not run.is_dir():
        raise MedsegError(
            Code.MISSING, "there is no such folder", where=run, expected="a run of medseg train, or a folder of runs"
        )
    from medseg.reports.browse import find_runs

    find_runs(run)
    return run.resolve()


def _serve(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Run Jupyter until it ends; Ctrl-C is its own affair, and it goes when this program is told to go."""
    with subprocess.Popen(arguments, env=environment) as process:  # noqa: S603, our own interpreter and arguments
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # Jupyter got it too, and asks whether it is meant
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
