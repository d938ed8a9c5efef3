"""`Report` → one HTML file. What comes from files is text, never markup: Jinja escapes it, Markdown may hold no HTML,
and the page forbids itself every script but its own and every address (Content-Security-Policy)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

import medseg
from medseg.formats.atomic import whole_file
from medseg.metrics.masks import State
from medseg.metrics.metric import Metric
from medseg.reports.calibrated import SOURCE, pooled
from medseg.reports.confidence import few
from medseg.reports.curves import Curve, curves_figure
from medseg.reports.evaluation import FOREGROUND, Evaluation
from medseg.reports.evaluation_files import EMPTY_MASKS
from medseg.reports.html.figures import agreement_figure, distribution_figure, drawing, reliability_figure, to_svg
from medseg.reports.html.pictures import Picture
from medseg.reports.html.tables import cases_table, classes_table, rows_table, shown_metrics, tiles, volumes_table
from medseg.reports.model_card import DISCLAIMER
from medseg.reports.tables import calibration_line
from medseg.statistics import LEVEL
from medseg.volume import WORLD_FRAME

REPORT_FILE = "report.html"
DISTRIBUTIONS = ("dice", "surface_dice", "hd95")
"""Metrics that are drawn; those that were asked for by name besides."""
MAX_NAMED = 12
"""Cases that a failure names; the table has all."""
MAX_REMARKS = 200
"""Remarks of a page; the last line says how many more there are."""


@dataclass(frozen=True)
class Remark:
    """Something that a reader must know.

    Args:
        kind: how bad it is.
        text: one sentence.
        cases: the cases that it is about.
    """

    kind: str
    text: str
    cases: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Args:
        title: its heading.
        subtitle: one sentence: what was measured, on what.
        evaluation: the numbers; None where nothing was measured.
        pictures: of cases.
        remarks: failures and warnings beside those that the evaluation knows.
        curves: name of a training ("" where there is one only) → its history.
        card: Markdown of the model card.
        manifest: what the numbers come from: versions, device, seed, digests.
        fold_of: case → fold, where there are several.
    """

    title: str
    subtitle: str
    evaluation: Evaluation | None
    pictures: Sequence[Picture] = ()
    remarks: Sequence[Remark] = ()
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    card: str | None = None
    manifest: Mapping[str, str] = field(default_factory=dict)
    fold_of: Mapping[str, int] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all.

    Raises:
        MedsegError: E_OUTPUT.
    """
    with whole_file(path, ".html") as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page as text."""
    with drawing():
        return _render(report)


def _render(report: Report) -> str:
    return render_template(
        "report.html.j2",
        report=report,
        card=None if report.card is None else markdown(report.card),
        remarks=_remarks(report),
        curves={name: _curves(i, name, curves) for i, (name, curves) in enumerate(report.curves.items())},
        **({} if report.evaluation is None else _measured(report, report.evaluation)),
    )


def render_template(name: str, **values: object) -> str:
    """A page of a template, with the style, the script and the policy that all pages have.

    Args:
        name: of a file in `templates/`.
        values: what it shows.
    """
    script, style = _resource("report.js"), _resource("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template(name).render(
        script=Markup(script),  # noqa: S704 (our own file)
        style=Markup(style),  # noqa: S704
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        disclaimer=_inline(DISCLAIMER),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=medseg.__version__,
        level=f"{LEVEL:.0%}",
        **values,
    )


def markdown(text: str) -> Markup:
    """Markdown of ours with names of files in it as HTML: no tags, no links, no images; headings two levels lower."""
    tokens = _markdown().parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"
    return Markup(_markdown().renderer.render(tokens, _markdown().options, {}))  # noqa: S704 (html=False escapes)


def _measured(report: Report, evaluation: Evaluation) -> dict[str, object]:
    """What the template says about an evaluation."""
    cases = evaluation.cases
    pictured = {picture.case: f"#picture-{i}" for i, picture in enumerate(report.pictures)}
    numbers = {case: i for i, case in enumerate(cases)}
    drawn = [m for m in evaluation.metrics if m.name in DISTRIBUTIONS or (not m.default and m.better)]
    volumes = volumes_table(evaluation)
    agreement = None
    if volumes is not None:
        metric = next(m for m in evaluation.metrics if m.name == "predicted_volume")
        found = agreement_figure(evaluation, metric)
        agreement = found and (to_svg(found[0], "volumes", "Bland–Altman plots of volumes", cases), found[1])
    interval = evaluation.intervals[FOREGROUND, "dice"]
    return {
        "tiles": tiles(evaluation),
        "warning": few(evaluation) if interval.warning else None,
        "classes": classes_table(evaluation),
        "cases": cases_table(evaluation, report.fold_of, pictured),
        "rows": rows_table(evaluation) if len(evaluation.labels.foreground) > 1 else None,
        "volumes": volumes,
        "agreement": agreement,
        "distributions": [
            (m, to_svg(distribution_figure(evaluation, m), m.name.replace("_", ""), f"{m.title} per class", cases))
            for m in drawn
        ],
        "calibration": _calibration(evaluation) if evaluation.calibrations else None,
        "number_of": numbers,
        "is_volume": evaluation.frame == WORLD_FRAME,
        "definitions": [(m, m.column(evaluation.frame), _definition(m)) for m in shown_metrics(evaluation)],
        "tolerance": f"{evaluation.tolerance_mm:g} {_length_unit(evaluation)}",
        "empty_masks": EMPTY_MASKS,
        "drawn_by": "patients" if evaluation.patients else "cases",
    }


def _calibration(evaluation: Evaluation) -> tuple[str, str, Markup]:
    """What it comes to, what it is, and the reliability diagram over the voxels of all cases."""
    panels = {"the scan": False, "near the structures": True}
    bins = {title: pooled(evaluation.calibrations, near=near) for title, near in panels.items()}
    return calibration_line(evaluation), SOURCE, to_svg(reliability_figure(bins), "calibration", "reliability diagram")


def _length_unit(evaluation: Evaluation) -> str:
    """Of lengths."""
    return next((m.unit(evaluation.frame) for m in evaluation.metrics if m.dimension == "length"), "mm")


def _definition(metric: Metric) -> str:
    """The first paragraph of the metric's own words."""
    return " ".join((metric.function.__doc__ or "").split("\n\n")[0].split())


def _remarks(report: Report) -> list[Remark]:
    """What went wrong: structures missed or invented, by class, then what the report was given."""
    found: list[Remark] = []
    evaluation = report.evaluation
    if evaluation is not None:
        for name in evaluation.labels.foreground:
            of_class = [row for row in evaluation.rows if row.class_name == name]
            count = {state: [r.case for r in of_class if r.state is state] for state in State}
            missed, spurious = count[State.MISSED], count[State.SPURIOUS]
            if missed:
                total = len(missed) + len(count[State.PRESENT])
                found.append(Remark("failure", f"{name} was missed entirely in {len(missed)} of {total} cases", missed))
            if spurious:
                total = len(spurious) + len(count[State.ABSENT])
                text = f"{name} was found in {len(spurious)} of {total} cases that do not have it"
                found.append(Remark("failure", text, spurious))
    found += report.remarks
    more = len(found) - MAX_REMARKS
    return found if more <= 0 else [*found[:MAX_REMARKS], Remark("note", f"and {more} more")]


def _curves(number: int, name: str, curves: Mapping[str, Curve]) -> Markup:
    return to_svg(curves_figure(dict(curves)), f"curves{number}", f"training curves {name}".strip())


@cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    return parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])


def _inline(text: str) -> Markup:
    return Markup(_markdown().renderInline(text))  # noqa: S704 (html=False escapes)


def _resource(name: str) -> str:
    return (files("medseg.reports.html") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_resource),
    )
    environment.globals["max_named"] = MAX_NAMED
    return environment.get_template(name)
