"""Which classes are left and right of each other: asked at a terminal, before anything is read."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.prompt import Prompt

from medseg.data.augment import AugmentConfig, swapped_classes
from medseg.data.layouts import DataFolder
from medseg.data.survey import labels_declared
from medseg.errors import MedsegError
from medseg.training.experiment import Experiment

YES, NONE, EDIT = "yes", "none", "edit"
_answers: dict[tuple[str, ...], dict[str, str]] = {}
"""What was answered in this process, by the names of the classes: the next job of a sweep does not ask again."""


def with_sides(experiment: Experiment, folder: DataFolder, console: Console) -> Experiment:
    """The experiment with the pairs that the user agrees to, where names tell some and somebody is there to ask.

    The answer becomes `augment.swap`, and so stands in the configuration of the run: its folds, and the run when it
    goes on, do not ask again. Without an answer `augment.swap` stays open, and the names decide.

    Args:
        experiment: as stated; one that states `augment.swap` is left as it is.
        folder: the cases that were found, with the labels that it declares.
        console: where the user reads.
    Raises:
        MedsegError: E_LABEL if the declared labels are no table.
    """
    augment, data = experiment.augment, experiment.data
    if augment.swap is not None or not is_somebody_there(console):
        return experiment
    labels, _ = labels_declared(folder, data.labels, data.regions_order)
    if labels is None:  # classes without names have no sides
        return experiment
    names = labels.declared
    found = swapped_classes(augment, names)
    if not found:
        return experiment
    if names not in _answers:
        try:
            _answers[names] = _ask(names, found, console)
        except EOFError:  # nobody was there after all
            console.print()
            return experiment
    return dataclasses.replace(experiment, augment=dataclasses.replace(augment, swap=_answers[names]))


def is_somebody_there(console: Console) -> bool:
    """Whether a question would be read and could be answered: a terminal on both sides, and this process in front.

    A process behind (`medseg train … &`) would be stopped for reading. Of several processes none may wait alone. In a
    notebook (`!medseg train …`) there is a terminal, and nobody can type there.
    """
    if os.environ.get("CI") or "JPY_PARENT_PID" in os.environ or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return False
    if not (console.is_terminal and sys.stdin is not None and sys.stdin.isatty()):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, OSError):  # no job control here
        return True


def _ask(names: tuple[str, ...], found: Mapping[str, str], console: Console) -> dict[str, str]:
    """Show the pairs that the names tell, and take the user's answer."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(f"sides      by their names these classes are left and right of each other: {in_words(found)}")
    say("           Wherever left and right are mirrored, in training or in prediction, they change places.")
    answer = Prompt.ask("           Is that so?", console=console, choices=[YES, NONE, EDIT], default=YES)
    pairs = {YES: dict(found), NONE: {}}.get(answer)
    if pairs is None:
        say("\n".join(f"{number:>12} {name}" for number, name in enumerate(names[1:], start=1)))
    while pairs is None:
        text = Prompt.ask("           Pairs by number, such as 1=2 5=7", console=console)
        try:
            pairs = swapped_classes(AugmentConfig(swap=pairs_of_numbers(text, names)), names)
        except (ValueError, MedsegError):
            say(f"           not understood: numbers from 1 to {len(names) - 1}, each once: 1=2 5=7")
    say(f"           kept as augment.swap in the run's configuration: {in_words(pairs) or 'no pairs'}")
    return pairs


def pairs_of_numbers(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """Pairs of classes as a user types them ("1=2 5=7"), by name.

    Args:
        text: pairs with blanks or commas in between; nothing is no pair.
        names: of all classes, the background first.
    Raises:
        ValueError: this is not what a pair looks like, or there is no such class.
    """
    pairs = {}
    for pair in re.split(r"[\s,;]+", re.sub(r"\s*=\s*", "=", text).strip()):
        if not pair:
            continue
        left, right = (int(number) for number in pair.split("="))
        if not (0 < left < len(names) and 0 < right < len(names)) or names[left] in pairs:
            raise ValueError(f"no such pair: {pair}")
        pairs[names[left]] = names[right]
    return pairs


def in_words(pairs: Mapping[str, str]) -> str:
    """Pairs for people."""
    return ", ".join(f"{left} ↔ {right}" for left, right in pairs.items())
