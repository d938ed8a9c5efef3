"""The help of `medseg train` and `medseg plan`: every key with its value and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is not imported before it is needed
    from medseg.tasks import Task

HELP_OPTIONS = ("--help", "-h")
SHORTENED = 28
"""Characters of a value that are shown."""


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is wanted, and Hydra has no other option to answer to."""
    options = [argument for argument in arguments if argument.startswith("-")]
    return bool(options) and all(option in HELP_OPTIONS for option in options)


def print_help(config_name: str, arguments: Sequence[str]) -> None:
    """Print what the configuration is made of, with the options and values of `arguments`.

    Args:
        config_name: a YAML of `configs/`, without suffix.
        arguments: what stands after the verb.
    Raises:
        MedsegError: E_CONFIG for keys, values or options that do not exist.
    """
    from rich.console import Console
    from rich.table import Table

    from medseg.config import composed
    from medseg.tasks import TASKS, configs_folder, task_of

    task = task_of(arguments)
    values, header, footer = composed(config_name, [a for a in arguments if not a.startswith("-")])
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(header.replace("$$", "$"))  # doubled for the template that Hydra fills in
    say("== Groups (group=option) ==")
    say(f"  task: {', '.join(TASKS)}")
    for group in sorted(path.name for path in configs_folder().iterdir() if path.is_dir()):
        if options := task.options(group):
            say(f"  {group}: {', '.join(options)}")
    say("\n== Keys (key=value), and what they mean: the first sentence of docs/configuration.md ==")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for key, text in meanings(values, task):
        table.add_row(f"{key}={_shown(values, key)}", text)
    console.print(table, highlight=False, markup=False)
    say("\n" + footer)


def meanings(values: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """The keys of a configuration with the first sentence of what they mean, as the dataclasses say it.

    Args:
        values: the configuration: its parts decide which keys there are.
        task: what is learnt.
    """
    from medseg.registry import described_fields

    stated = described_fields(task.experiment)
    found = [(key, text) for key, _, text in stated if key.split(".")[0] not in task.groups]
    for group, (_, cls) in task.plain.items():
        found += [(key, text) for key, _, text in described_fields(cls, group)]
    for group, registry in task.parts.items():
        name = str(values[group]["name"])
        found.append((f"{group}.name", f"Set by {group}={name}: one of {', '.join(registry.names())}."))
        found += [(key, text) for key, _, text in described_fields(registry.part(name).config, group)]
    return [(key, first_sentence(text)) for key, text in found]


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    sentence = re.split(r"(?<=[^.][a-z0-9)\]\"`])\.(?=\s+[A-Z\"]|$)", text, maxsplit=1)[0].rstrip(".")
    return sentence if sentence.endswith("…") else f"{sentence}."


def _shown(values: Mapping[str, Any], key: str) -> str:
    value: Any = values
    for name in key.split("."):
        value = value[name]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHORTENED else text[: SHORTENED - 1] + "…"
