"""JSON and YAML of strangers: what is nested without end, or grows when it is read, is damage like any other.

The standard parsers answer such text with RecursionError, or with a table of a billion entries made of ten aliases.
Here both are the errors that callers expect of damaged text anyway.
"""

from __future__ import annotations

import json
from typing import Any

import yaml
from yaml import YAMLError

from medseg.errors import Code, MedsegError

__all__ = ["YAMLError", "check_format", "check_yaml", "parse_json", "parse_yaml"]

MAX_DEPTH = 64
"""Levels of lists and tables within each other. What medseg writes has fewer than ten."""

MAX_VERSION = 40
"""Characters of a stranger's version that a message repeats."""

YAML_ERRORS = (YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises: its constructors and escapes let through what their values raise (a month 13, `!!bool maybe`)."""


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or is nested deeper than Python's parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or tables are nested without end") from error


def check_format(content: Any, known: int, *, where: object) -> None:
    """Refuse what another version of medseg wrote, in words of its own: it is not damaged.

    Args:
        content: a table of medseg's with `format`, a whole number, and perhaps `medseg`, a version.
        known: the format that this version reads and writes.
        where: the file, for the message.
    Raises:
        MedsegError: E_VERSION.
        ValueError, KeyError, TypeError: it is no such table.
    """
    found = content["format"]
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError("its format is no whole number")
    if found != known:
        writer = content.get("medseg")
        named = f" of medseg {ascii(writer[:MAX_VERSION])[1:-1]}" if isinstance(writer, str) else ""
        raise MedsegError(
            Code.VERSION,
            "this was written by another version of medseg",
            where=where,
            expected=f"format {known}",
            got=f"format {str(found)[:MAX_VERSION]}{named}",
            remedy="install that version of medseg, or make it again with this one",
        )


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: plain values, no objects.

    Raises:
        YAMLError: as `check_yaml`.
    """
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except YAMLError:
        raise
    except YAML_ERRORS as error:
        raise YAMLError(f"{type(error).__name__}: {error}") from error


def check_yaml(text: str) -> None:
    """Refuse YAML that must not be made into values.

    Raises:
        YAMLError: it is no YAML, is nested deeper than `MAX_DEPTH`, or has aliases, with which ten lines become a
            billion values; medseg writes none. Others of `YAML_ERRORS` for escapes of no character.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise YAMLError(f"aliases (*{event.anchor}) are not read")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise YAMLError(f"nested deeper than {MAX_DEPTH} levels")
