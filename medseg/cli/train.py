"""medseg plan and medseg train: the verbs that speak Hydra's key=value."""

from __future__ import annotations

from pathlib import Path

import click

from medseg.cli.keys import asks_for_help, print_help

PLAN_HELP = """Plan without training: `medseg plan key=value ...` (Hydra, any key of train).

Reads the cases once and says what a training would do with them and why, and which cases are unlike the rest.
Writes plan.yaml (edit it, then: medseg train plan=FOLDER) and survey.json.

`medseg plan --help` shows the groups, all keys with their meaning, and examples."""
HYDRA = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
TRAIN_HELP = """Train a model: `medseg train key=value ...` (Hydra).

`medseg train --help` shows the groups, all keys with their meaning, and examples."""


@click.command(
    "plan",
    help=PLAN_HELP,
    short_help="Say what a training would do with a folder of cases, and why.",
    add_help_option=False,
    context_settings=HYDRA,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def plan(arguments: tuple[str, ...]) -> None:
    """Compose the configuration as Hydra does and plan."""
    if asks_for_help(arguments):
        print_help("plan", arguments)
        return
    from medseg.config import run_hydra
    from medseg.training.plan_data import plan_data

    stated = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    run_hydra("plan", arguments, lambda experiment, folder: plan_data(experiment, folder, stated=stated))


@click.command(
    "train",
    help=TRAIN_HELP,
    short_help="Train a model on a folder of cases.",
    add_help_option=False,
    context_settings=HYDRA,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> None:
    """Compose the configuration as Hydra does and train."""
    if asks_for_help(arguments):
        from medseg.tasks import task_of

        print_help(task_of(arguments).config, arguments)
        return
    from medseg.config import resumed, run_hydra
    from medseg.tasks import task_named, task_of
    from medseg.training.distributed import begun_before, is_follower, refuse_sweep
    from medseg.training.run_folder import has_begun
    from medseg.training.train import follow, log_to

    refuse_sweep(arguments)
    if is_follower():
        follow()
        return
    to_resume = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if not to_resume and (begun := begun_before()) is not None and has_begun(begun):
        to_resume, arguments = [str(begun)], ()
    if to_resume:
        run = Path(to_resume[-1]).expanduser().absolute()
        experiment = resumed(run, [a for a in arguments if not a.startswith("resume=")])
        log_to(run)
        task_named(experiment.task).run(experiment, run)
    else:
        task = task_of(arguments)
        run_hydra(task.config, arguments, task.run)
