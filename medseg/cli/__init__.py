"""The verbs, one module each. Nothing heavy is imported before the verb is known: `medseg --help` must answer at once.

A new verb is a module with a click command, whose function imports what it needs, and a name in `VERBS`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click

from medseg import __version__
from medseg.cli.compare import compare
from medseg.cli.convert import convert
from medseg.cli.demo import demo
from medseg.cli.doctor import doctor
from medseg.cli.evaluate import evaluate
from medseg.cli.export import export
from medseg.cli.inspect import inspect
from medseg.cli.measure import measure
from medseg.cli.notebook import notebook
from medseg.cli.predict import predict
from medseg.cli.prepare import prepare
from medseg.cli.select import select
from medseg.cli.survival import survival
from medseg.cli.train import plan, train
from medseg.cli.tune import tune
from medseg.cli.verify import verify
from medseg.errors import MedsegError, of_machine

VERBS = (
    inspect,
    convert,
    plan,
    prepare,
    train,
    tune,
    select,
    export,
    predict,
    evaluate,
    compare,
    measure,
    survival,
    verify,
    notebook,
    doctor,
    demo,
)
"""In the order of use."""
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

HELP = """From a folder of medical scans to a trained, validated, usable segmentation model.

\b
  medseg demo                                     the whole way on a phantom, in minutes
  medseg inspect FOLDER                           what lies in a folder of DICOM or images, and what is wrong
  medseg convert SERIES scan.nii.gz               DICOM, SEG and RTSTRUCT to NIfTI, and labels back to DICOM
  medseg plan data.root=FOLDER                    what a training would do with your cases, and why
  medseg prepare data.root=FOLDER                 read and prepare them before a training, also on a cluster
  medseg train data.root=FOLDER                   train on them
  medseg tune KEY=A,B... -o FOLDER                search for settings, trial after trial
  medseg select RUN RUN... -o ENSEMBLE            compare runs, and put the best ones together
  medseg export RUN -o model.zip                  one file to hand on; predict takes it as its RUN
  medseg predict RUN SCAN... -o OUT               label scans the model has never seen
  medseg evaluate PREDICTIONS REFERENCES -o OUT   honest numbers, per case and class
  medseg compare SCORES SCORES                    which of two models is better, and whether that is chance
  medseg measure IMAGE LABEL -o features.csv      shape, intensity, texture and edges of structures, as a table
  medseg survival features.csv outcomes.csv       Cox model and Kaplan–Meier over such tables
  medseg verify RUN                               whether its files are what they were when it was made
  medseg notebook RUN                             look at it in Jupyter, slice by slice; and see how networks work
  medseg doctor                                   what this machine can do, and what to do where it cannot

For research use only; not a medical device."""


class Verbs(click.Group):
    """Verbs in the order of use, not of the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


@click.group(cls=Verbs, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="medseg")
def cli() -> None:
    """The program."""


for verb in VERBS:
    cli.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a verb; refusals become a message and exit status 2."""
    with _sigterm_unwinds():
        _run(list(sys.argv[1:] if arguments is None else arguments))


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """While the block runs SIGTERM ends the program as an exception does: what archives were unpacked to is removed.

    Outside the main thread Python takes no signal handlers, and one that the caller has set stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    received: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException as error:
        if received:  # within the import of a compiled module SystemExit becomes an ImportError
            raise SystemExit(EXIT_TERMINATED) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> None:
    try:
        if arguments[:1] == ["-sc"]:
            _complete(arguments)
        else:
            cli.main(args=arguments, prog_name="medseg", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MedsegError as error:
        _show(error)
        sys.exit(EXIT_REFUSED)
    except (KeyboardInterrupt, click.Abort):  # Abort is a RuntimeError
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:  # logging makes a ValueError of a full disk
        refusal = of_machine(error)
        if refusal is None:
            raise
        _show(refusal)
        sys.exit(EXIT_REFUSED)


def _show(error: MedsegError) -> None:
    first, *rest = str(error).splitlines()
    click.secho(first, fg="red", bold=True, err=True)
    for line in rest:
        click.echo(line, err=True)


def _complete(arguments: Sequence[str]) -> None:
    """Shell completion: Hydra's script asks `medseg -sc query=SHELL` with the line in COMP_LINE."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) > 2 and words[1] in (plan.name, train.name):
        from medseg.config import run_hydra

        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        run_hydra(words[1], arguments, lambda experiment, folder: None)
    else:
        typed = words[1] if len(words) > 1 else ""
        click.echo(" ".join(name for name in cli.commands if name.startswith(typed)))
