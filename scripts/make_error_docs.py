#!/usr/bin/env python3
"""Write docs/errors.md: every stable code, how it comes about and what to do, from medseg/errors.py.

python scripts/make_error_docs.py            write it
python scripts/make_error_docs.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import textwrap
from pathlib import Path

from medseg.errors import Code, MedsegError

TARGET = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
SECTIONS = ("Comes of:", "To do:")
"""What the text under each code says behind its meaning, in this order."""
HEAD = """# Every code of a refusal

Written by `scripts/make_error_docs.py` from `medseg/errors.py`. Codes never change their meaning: scripts may rely on
them.

A refusal says what is wrong, where (a file without its folder, a case, a key), what was expected, what came, and what
to do:

```
{example}
```

Verbs end with status 2 where they refuse; `medseg predict` and `medseg inspect` with 3 where they looked at all cases
and some cannot be used; 130 after Ctrl-C, 143 after SIGTERM. Before its first step a training reads every case once and
lists all that are bad; `medseg inspect DATA` does the same without training. `data.on_bad_case=skip`, or
`medseg predict --on-bad-case skip`, leaves them out and lists them.

| code | meaning |
|---|---|
"""
EXAMPLE = MedsegError(
    Code.GRID,
    "the label does not lie on the image's grid: shape (512, 512, 90) against (512, 512, 89)",
    where="case7",
    expected="shape (512, 512, 90), spacing (0.8, 0.8, 2.5) mm",
    got="shape (512, 512, 89), spacing (0.8, 0.8, 2.5) mm",
    remedy="resample it to the image's grid, or check that it belongs to this image",
)


def texts() -> dict[str, tuple[str, ...]]:
    """For each code its meaning, and what stands behind each of `SECTIONS`.

    Raises:
        SystemExit: the text under a code lacks a part.
    """
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(Code))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, tuple[str, ...]] = {}
    for statement, text in itertools.pairwise(body.body):
        match statement, text:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(words))):
                found[Code[name]] = _parts(name, " ".join(words.split()))
    lacking = [code.name for code in Code if code not in found]
    if lacking:
        raise SystemExit(f"medseg/errors.py: no text under {', '.join(lacking)}")
    return found


def _parts(name: str, text: str) -> tuple[str, ...]:
    parts = []
    for section in SECTIONS:
        part, heading, text = text.partition(section)
        if not heading or not part.strip() or not text.strip():
            raise SystemExit(f'medseg/errors.py: the text under {name} lacks "{section}" or what belongs to it')
        parts.append(part.strip())
    return (*parts, text.strip())


def document() -> str:
    """The whole page."""
    found = dict(sorted(texts().items()))
    rows = [f"| [{code}](#{code.lower()}) | {meaning} |" for code, (meaning, *_) in found.items()]
    sections = [
        f"## {code}\n\n{meaning}\n\n- **Comes of** {comes}\n- **To do:** {remedy}\n"
        for code, (meaning, comes, remedy) in found.items()
    ]
    return HEAD.format(example=EXAMPLE) + "\n".join([*rows, "", *sections])


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = document()
    if parser.parse_args().check:
        raise SystemExit(0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text else 1)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
