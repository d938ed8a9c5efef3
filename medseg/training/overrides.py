"""Command lines of Hydra as text, before Hydra reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.documents import MAX_DEPTH
from medseg.errors import Code, MedsegError

OPTIONS_WITH_VALUE = frozenset(
    ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")
)
"""Hydra's options that are followed by a value; --info may be."""


def options_first(arguments: Sequence[str]) -> list[str]:
    """The command line with its options before its overrides: Hydra's parser takes no options in between.

    Raises:
        MedsegError: E_CONFIG for a bare path, which is most likely meant as the data.
    """
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before in OPTIONS_WITH_VALUE or (before in ("--info", "-i") and "=" not in argument)
        if argument.startswith("-") or is_value:
            options.append(argument)
        elif "=" not in argument and not argument.startswith("~") and Path(argument).expanduser().exists():
            raise MedsegError(
                Code.CONFIG,
                "a path stands where a setting was expected",
                where=argument,
                expected="key=value",
                remedy=f"did you mean data.root={argument} ?",
            )
        else:
            overrides.append(argument)
    refuse_nesting(overrides)
    return options + overrides


def refuse_nesting(overrides: Sequence[str]) -> None:
    """Hydra's parser takes minutes over a value that is nested without end."""
    for override in overrides:
        depth = deepest = 0
        for character in override:
            depth += (character in "[{") - (character in "]}")
            deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            raise MedsegError(
                Code.CONFIG,
                "a value is nested without end",
                where=override.partition("=")[0][:80],
                expected=f"at most {MAX_DEPTH} levels of lists and tables",
            )
