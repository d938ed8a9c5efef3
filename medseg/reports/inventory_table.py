"""An inventory for people: a table of the scans, then what belongs to none of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from medseg.errors import MedsegError
from medseg.formats.content import damage_with_content
from medseg.formats.dicom.structures import Annotation
from medseg.reports.inventory import Inventory, Scan, counts, place_of, printable, told
from medseg.volume import PIXEL_FRAME

MAX_NAMES = 12
"""Structures of an annotation that the table names."""
MAX_LINES = 20
"""Files of one kind that are listed below the table."""
MAX_PLACES = 5
"""Folders of a series that the table names."""
NONE = "–"
_HEADER = ("case", "patient", "kind", "files", "voxels", "size in mm", "axes")


def show_inventory(inventory: Inventory, console: Console, *, paths: bool = False) -> None:
    """Print what was found.

    Args:
        inventory: what was found.
        console: where the user reads.
        paths: say where things lie, relative to the root.
    """
    if inventory.scans:
        _print_scans(inventory, console, paths)
    catalog = inventory.catalog
    _list(console, "annotations that belong to no series here", [
        _place(inventory, annotation, paths) + f"{_structures(annotation)}: [yellow]{_text(reason)}[/yellow]"
        for annotation, reason in catalog.orphans
    ])  # fmt: skip
    found = [(path, damage_with_content(path, reason)[0]) for path, reason in catalog.damaged]
    if paths:
        damaged = [f"{_text(place_of(catalog, path))}: [red]{_text(reason)}[/red]" for path, reason in found]
    else:
        reasons = Counter(reason for _, reason in found)
        damaged = [f"{count} × [red]{_text(reason)}[/red]" for reason, count in reasons.most_common()]
    _list(console, "damaged files", damaged)
    _list(console, "what to do", _remedies(inventory))
    if catalog.others:
        others = ", ".join(f"{count} {_text(kind)}" for kind, count in catalog.others.items())
        console.print(f"other DICOM files, not read: {others}", highlight=False, soft_wrap=not console.is_terminal)
    console.print(_summary(inventory), highlight=False, soft_wrap=not console.is_terminal)


def _print_scans(inventory: Inventory, console: Console, paths: bool) -> None:
    """One line for each scan, and below it whatever there is to say: a column would be too narrow for that."""
    rows = [_HEADER, *(_cells(scan) for scan in inventory.scans)]
    filled = [c for c in range(len(_HEADER)) if any(row[c] != NONE for row in rows[1:])]
    widths = {c: max(cell_len(row[c]) for row in rows) for c in filled}
    for number, row in enumerate(rows):
        line = "  ".join(row[c] + " " * (widths[c] - cell_len(row[c])) for c in filled).rstrip()
        if number == 0:
            console.print(Text(line, style="bold"), soft_wrap=True)
            continue
        scan = inventory.scans[number - 1]
        console.print(Text(line, style="red" if scan.problem else ""), soft_wrap=True)
        for remark in _remarks(inventory, scan, paths):
            if console.is_terminal:
                console.print(Padding(remark, (0, 0, 0, 4)), highlight=False)
            else:  # a file or a pipe has no width: one line each
                console.print(f"    {remark}", highlight=False, soft_wrap=True)


def _cells(scan: Scan) -> tuple[str, ...]:
    grid = scan.grid
    size = grid is not None and grid.frame != PIXEL_FRAME
    return (
        printable(scan.name),
        scan.series.patient if scan.series else NONE,
        printable(scan.kind) or NONE,
        str(len(scan.files)),
        "×".join(str(n) for n in grid.shape) if grid else NONE,
        "×".join(f"{s:.3g}" for s in grid.spacing_mm) if grid and size else NONE,
        (grid.orientation if grid else "") or NONE,
    )


def _remarks(inventory: Inventory, scan: Scan, paths: bool) -> list[str]:
    drawn = Counter(_structures(annotation) for annotation in scan.annotations)
    lines = [text if count == 1 else f"{count} × {text}" for text, count in drawn.items()]
    error = scan.problem
    if error is not None:
        lines.append(_refusal(scan, error))
    lines += [
        f"{a.kind}: {_refusal(scan, scan.undrawable[a.uid])}" for a in scan.annotations if a.uid in scan.undrawable
    ]
    lines += [f"[yellow]{_text(told(scan, warning))}[/yellow]" for warning in scan.warnings]
    if paths:
        places = [place_of(inventory.catalog, place) for place in scan.places]
        lines += [f"[dim]{_text(place)}[/dim]" for place in places[:MAX_PLACES]]
        if len(places) > MAX_PLACES:
            lines.append(f"[dim]and {len(places) - MAX_PLACES} more[/dim]")
    return lines


def _refusal(scan: Scan, error: MedsegError) -> str:
    got = f": {_text(told(scan, error.got))}" if error.got is not None else ""
    return f"[red]{error.code}[/red] {_text(told(scan, error.message))}{got}"


def _remedies(inventory: Inventory) -> list[str]:
    """What to do about each kind of problem, once."""
    refused = [
        (scan, error) for scan in inventory.scans for error in (scan.problem, *scan.undrawable.values()) if error
    ]
    found = [(str(error.code), told(scan, error.remedy)) for scan, error in refused]
    for path, reason in inventory.catalog.damaged:
        found.append((reason.partition(":")[0], damage_with_content(path, reason)[1]))
    return [f"[red]{code}[/red] {_text(remedy)}" for code, remedy in dict.fromkeys(found) if remedy]


def _structures(annotation: Annotation) -> str:
    """ "RTSTRUCT GTV, spinal cord and 12 more"."""
    names = [_text(s.name) for s in annotation.structures]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"[bold]{annotation.kind}[/bold] {', '.join(names[:MAX_NAMES]) or 'without structures'}{more}"


def _place(inventory: Inventory, annotation: Annotation, paths: bool) -> str:
    return f"[dim]{_text(place_of(inventory.catalog, annotation.path))}:[/dim] " if paths else ""


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"\n[bold]{title}[/bold]")
    for line in lines[:MAX_LINES]:
        console.print(f"  {line}", highlight=False, soft_wrap=not console.is_terminal)
    if len(lines) > MAX_LINES:
        console.print(f"  and {len(lines) - MAX_LINES} more")


def _summary(inventory: Inventory) -> str:
    """ "12 series of 4 patients, 2 with problems; 9 annotations, 1 of them without its series"."""
    number = counts(inventory)
    parts = []
    if number["series"]:
        parts.append(f"{number['series']} series of {_several(number['patients'], 'patient')}")
    if number["images"]:
        parts.append(_several(number["images"], "image file"))
    parts.append(f"{number['with_problems'] or 'none'} with problems")
    if number["annotations"]:
        parts.append(_several(number["annotations"], "annotation"))
    if number["orphans"]:
        parts.append(f"{number['orphans']} of them without its series")
    if number["annotations_with_problems"]:
        parts.append(f"{number['annotations_with_problems']} of them cannot be drawn")
    if number["damaged"]:
        parts.append(_several(number["damaged"], "damaged file"))
    return f"\n[bold]{', '.join(parts)}[/bold]"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _text(text: str | None) -> str:
    """Text from files, safe to print."""
    return escape(printable(text or ""))
