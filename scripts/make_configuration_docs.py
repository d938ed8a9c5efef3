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

from medseg.config import PART_GROUPS, PLAIN_GROUPS, configs_folder, group_options
from medseg.registry import described_fields
from medseg.training.experiment import Experiment

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


def options(group: str) -> list[str]:
    """The YAML files of a group with their first comments."""
    lines = []
    for name in group_options(group):
        text = (configs_folder() / group / f"{name}.yaml").read_text(encoding="utf-8")
        comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
        lines.append(f"- `{group}={name}`: {' '.join(comments)}")
    return lines


def document() -> str:
    """The whole page."""
    table = ["| key | default | meaning |", "|---|---|---|"]
    groups = {*PLAIN_GROUPS, *PART_GROUPS}
    top = [
        row
        for field, row in zip(dataclasses.fields(Experiment), rows(Experiment, ""), strict=True)
        if field.name not in groups
    ]
    parts = [HEAD, "\n".join(["## At the top", "", *table, *top, ""])]
    for group, cls in PLAIN_GROUPS.items():
        parts.append("\n".join([f"## {group}", "", *options(group), "", *table, *rows(cls, group), ""]))
    for group, registry in PART_GROUPS.items():
        parts.append("\n".join([f"## {group}", "", *options(group), ""]))
        for name in registry.names():
            parts.append(
                "\n".join([f"### {group}.name: {name}", "", *table, *rows(registry.part(name).config, group), ""])
            )
    for group in ("preset", "experiment", "debug"):
        parts.append("\n".join([f"## {group}", "", *options(group), ""]))
    return "\n".join(parts)


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
