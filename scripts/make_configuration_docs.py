#!/usr/bin/env python3
"""Write docs/configuration.md: every key of `medseg train`, its default and what it means, from the dataclasses.

python scripts/make_configuration_docs.py            write it
python scripts/make_configuration_docs.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from medseg.registry import described_fields
from medseg.tasks import SEGMENTATION, TASKS, Task, configs_folder

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Every key of `medseg train`

Written by `scripts/make_configuration_docs.py` from the dataclasses beside the parts. Set a key on the command line,
`medseg train data.root=FOLDER optimizer.lr=1e-3`, or in a YAML of your own (`--config-dir`).
"""


def rows(cls: type, prefix: str) -> list[str]:
    """Table rows of a dataclass, nested ones included."""
    return [
        f"| `{key}` | `{json.dumps(default)}` | {text.replace('|', chr(92) + '|')} |"
        for key, default, text in described_fields(cls, prefix)
    ]


def options(task: Task, group: str) -> list[str]:
    """The YAML files of a group with their first comments."""
    lines = []
    for name in task.options(group):
        text = (configs_folder() / group / f"{name}.yaml").read_text(encoding="utf-8")
        comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
        lines.append(f"- `{group}={name}`: {' '.join(comments)}")
    return lines


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, task in TASKS.items():
        parts += [] if name == SEGMENTATION else [f"# task={name}\n"]
        parts += sections(task, shown=set(parts))
    for group in ("preset", "experiment", "debug"):
        parts.append("\n".join([f"## {group}", "", *options(TASKS[SEGMENTATION], group), ""]))
    return "\n".join(parts)


def sections(task: Task, shown: set[str]) -> list[str]:
    """What states a run of a task; of what another task has the same, its name only."""
    table = ["| key | default | meaning |", "|---|---|---|"]
    top = [
        row
        for field, row in zip(dataclasses.fields(task.experiment), rows(task.experiment, ""), strict=True)  # type: ignore[arg-type]
        if field.name not in task.groups
    ]
    found = ["\n".join(["## At the top", "", *table, *top, ""])]
    for group, (_, cls) in task.plain.items():
        found.append("\n".join([f"## {group}", "", *options(task, group), "", *table, *rows(cls, group), ""]))
    for group, registry in task.parts.items():
        found.append("\n".join([f"## {group}", "", *options(task, group), ""]))
        for name in registry.names():
            keys = rows(registry.part(name).config, group)
            found.append("\n".join([f"### {group}.name: {name}", "", *table, *keys, ""]))
    return [part for part in found if part not in shown]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = document()
    if parser.parse_args().check:
        raise SystemExit(0 if TARGET.read_text(encoding="utf-8") == text else 1)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
