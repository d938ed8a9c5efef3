"""The report: its numbers, what it shows, that it is safe and needs nothing else, and that a browser runs it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from medseg.cli.evaluate import evaluate as evaluate_verb
from medseg.errors import MedsegError
from medseg.formats import open_label, write_image, write_label
from medseg.labels import Labels
from medseg.metrics.case import class_masks
from medseg.metrics.masks import State
from medseg.metrics.metric import metrics
from medseg.reports.crossvalidation import CrossValidation, read_evaluation
from medseg.reports.evaluation import FOREGROUND, Evaluation, Row, evaluate_folders
from medseg.reports.extremes import extremes
from medseg.reports.html.comparison import write_evaluation_report
from medseg.reports.html.figures import distribution_figure
from medseg.reports.html.page import Remark, Report, markdown, render, write_report
from medseg.reports.html.pictures import MAX_BYTES, NO_SCANS
from medseg.reports.html.run import write_run_report
from medseg.reports.html.tables import MAX_ROWS, number
from medseg.volume import Grid, Volume

PEER = Path(__file__).resolve().parent.parent / ".peers" / "bin" / "python"
LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2})
SHAPE = (14, 16, 18)
AFFINE = np.diag([2.0, 1.5, 1.0, 1.0])
NASTY = """<script>alert(1)</script>&"'$x_1$"""


@dataclass
class Page(HTMLParser):
    """A page as a reader without JavaScript has it.

    Args:
        tables: id → rows of texts of their cells; the first row is the head.
        ids: all ids, in order.
        sources: what `src` and `href` name.
        text: all text but scripts and styles.
    """

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._rows: list[list[str]] | None = None
        self._in: str = ""
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for value in [named.get("id")] if value]
        self.sources += [v for k, v in named.items() if k in ("src", "href", "xlink:href") and v]
        assert not any(k.startswith("on") for k in named), named
        if tag in ("script", "style"):
            self._in = tag
        if tag == "table":
            self._rows = self.tables.setdefault(named.get("id") or f"table {len(self.tables)}", [])
        if tag == "tr" and self._rows is not None:
            self._rows.append([])
        if tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._cell = True
        if tag == "small" and self._rows and self._rows[-1]:
            self._rows[-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""
        if tag in ("td", "th"):
            self._cell = False
        if tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        if self._in:
            return
        self.text += data
        if self._rows and self._cell:
            self._rows[-1][-1] += data


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def organs(rng: np.random.Generator, *, spleen: bool = True, errors: float = 0.0) -> np.ndarray:
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[2:9, 3:11, 2:9] = 1
    if spleen:
        array[9:13, 5:13, 10:16] = 2
    flipped = (rng.random(SHAPE) < errors) & (array > 0)
    array[flipped] = 0
    return array


@dataclass(frozen=True)
class Folders:
    predicted: Path
    reference: Path
    images: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Seven cases, better from one to the next; the spleen of b is missed, that of c is spurious."""
    root, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    found = Folders(root / "pred", root / "ref", root / "scans")
    for folder in (found.predicted, found.reference, found.images):
        folder.mkdir()
    grid = Grid(SHAPE, AFFINE)
    for i, case in enumerate("abcdefg"):
        truth = organs(rng, spleen=case != "c")
        guess = organs(rng, spleen=case != "b", errors=0.3 - 0.04 * i)
        image = (truth * 50 + rng.normal(size=SHAPE) * 10).astype(np.float32)
        write_label(found.reference / f"{case}.nii.gz", Volume(truth, grid))
        write_label(found.predicted / f"{case}.nii.gz", Volume(guess, grid))
        write_image(found.images / f"{case}.nii.gz", Volume(image[None], grid))
    return found


@dataclass(frozen=True)
class Written:
    path: Path
    text: str
    page: Page
    evaluation: Evaluation
    document: dict


@pytest.fixture(scope="module")
def written(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("out")
    evaluation = evaluate_folders(folders.predicted, folders.reference, labels=LABELS)
    evaluation.write(out)
    path = write_evaluation_report(out, evaluation, folders.predicted, folders.reference, images=folders.images)
    text = path.read_text(encoding="utf-8")
    return Written(path, text, parsed(text), evaluation, json.loads((out / "metrics.json").read_text()))


def test_the_numbers_are_those_of_metrics_json(written: Written) -> None:
    frame, summary = written.evaluation.frame, written.document["summary"]
    head, *rows = written.page.tables["classes"]
    assert [row[0] for row in rows] == ["liver", "spleen", "mean"]
    for row in rows:
        entry = summary[FOREGROUND if row[0] == "mean" else row[0]]
        cells = dict(zip(head, row, strict=True))
        dice = entry["metrics"]["dice"]
        assert cells["n"] == str(dice["n"]) and cells["missed"] == str(entry["num_missed"])
        assert cells["spurious"] == str(entry["num_spurious"])
        assert (cells["median"], cells["SD"]) == (f"{dice['median']:.3f}", f"{dice['std']:.3f}")
        for metric in metrics(("dice", "iou", "sensitivity", "hd95", "surface_dice")):
            values = entry["metrics"][metric.column(frame)]
            title = next(t for t in head if t.split(" (")[0] == metric.title)
            mean, low, high = (number(metric, values[key]) for key in ("mean", "low", "high"))
            assert cells[title] == f"{mean} | {low}–{high}"
    scores = {(row["case"], row["class"]): row for row in written.document["cases"]}
    _, *rows = written.page.tables["rows"]
    assert len(rows) == len(scores)
    for row in rows:
        stored = scores[row[0], row[1]]
        assert row[2] == stored["state"]
        assert row[3] == ("–" if stored["dice"] is None else f"{stored['dice']:.3f}")
    head, *rows = written.page.tables["volumes"]
    for row in rows:
        stored = written.document["volume_agreement"][row[0]]
        assert row[1:3] == [str(stored["n"]), f"{stored['bias']:+.3g}"]


def test_the_summary_warns_of_few_patients(written: Written) -> None:
    summary = written.document["summary"][FOREGROUND]["metrics"]["dice"]
    text = " ".join(written.page.text.split())
    assert f"mean Dice{summary['mean']:.3f}95% CI {summary['low']:.3f}–{summary['high']:.3f}" in text
    assert f"Intervals {written.document['warning']}" in text
    many = Evaluation(
        tuple(Row(f"c{i}", "liver", State.PRESENT, {"dice": i / 60}) for i in range(60)),
        Labels.from_mapping({"background": 0, "liver": 1}),
    )
    assert "tend to be too narrow" not in parsed(render(Report("t", "s", many))).text


def test_missed_and_spurious_structures_are_shown(written: Written) -> None:
    text = " ".join(written.page.text.split())
    assert "spleen was missed entirely in 1 of 6 cases: b" in text
    assert "spleen was found in 1 of 1 cases that do not have it: c" in text
    head, *rows = written.page.tables["cases"]
    by_case = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert by_case["b"]["missed"] == "spleen" and by_case["c"]["spurious"] == "spleen"
    assert by_case["a"]["missed"] == by_case["a"]["spurious"] == ""
    # A cross for both in each drawing, which leads to the case.
    for case in ("b", "c"):
        anchor = f"#case-{written.evaluation.cases.index(case)}"
        links = [source for source in written.page.sources if source == anchor]
        assert len(links) > 3 and anchor[1:] in written.page.ids
        assert written.text.count(f'<a href="{anchor}"><title>{case}</title>') == 8  # two classes in four drawings


def test_the_worst_case_comes_first_also_without_javascript(written: Written) -> None:
    _, *rows = written.page.tables["cases"]
    means = written.evaluation.case_means("dice")
    assert [row[0] for row in rows] == sorted(means, key=lambda case: means[case])
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    _, *rows = written.page.tables["rows"]
    dice = [math.inf if row[3] == "–" else float(row[3]) for row in rows]
    assert dice == sorted(dice)


def test_the_page_needs_nothing_but_itself(written: Written) -> None:
    text = written.text
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:image/)", text)
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1))  # type: ignore[union-attr]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len(written.page.ids) == len(set(written.page.ids))
    targets = {source[1:] for source in written.page.sources if source.startswith("#")}
    assert targets <= set(written.page.ids)
    assert "Not a medical device" in written.page.text
    assert str(written.path.parent) not in text


def test_what_comes_from_files_is_text() -> None:
    labels = Labels(("background", NASTY, "b"), ((0,), (1,), (2,)))
    values = {"dice": 0.5, "hd95": 2.0, "predicted_volume": 3.0, "reference_volume": 2.0}
    rows = tuple(
        Row(f"{NASTY}{i}", name, state, {k: v + 0.1 * i for k, v in values.items()})
        for i in range(3)
        for name, state in ((NASTY, State.PRESENT), ("b", State.MISSED))
    )
    card = f"# Model card: x\n\n{NASTY} ![x](http://evil/x.png) [y](javascript:alert(1)) <img src=x onerror=alert(1)>\n"
    report = Report(
        NASTY, NASTY, Evaluation(rows, labels), remarks=[Remark("warning", NASTY, [NASTY])], card=card,
        manifest={NASTY: NASTY}, curves={NASTY: {"train_loss": ([1, 2], [1, 0.5]), f"val_dice_{NASTY}": ([1], [0.1])}},
    )  # fmt: skip
    page = parsed(render(report))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.tables["cases"][1][0].startswith(NASTY)
    assert page.tables["classes"][1][0] == NASTY
    assert not any("evil" in source or "javascript" in source for source in page.sources)
    assert page.text.count("<script>alert(1)</script>") > 10


def test_markdown_keeps_tables_and_drops_links() -> None:
    shown = markdown("# A\n\n## B\n\n| a | b |\n|---|---:|\n| `x` | **1** |\n\n- <b>c</b>\n")
    assert "<h3>A</h3>" in shown and "<h4>B</h4>" in shown and "<td><code>x</code></td>" in shown
    assert "<strong>1</strong>" in shown and "&lt;b&gt;c&lt;/b&gt;" in shown
    assert "<a" not in markdown("[x](http://y) <http://z>") and "<img" not in markdown("![x](data:image/png;base64,AA)")


def large(num_cases: int, num_classes: int) -> Evaluation:
    rng = np.random.default_rng(0)
    labels = Labels.from_mapping({"background": 0, **{f"organ_{i}": i for i in range(1, num_classes + 1)}})
    names = [m.name for m in metrics()]
    rows = tuple(
        Row(f"case_{i:04d}", name, State.PRESENT, dict(zip(names, rng.random(len(names)).tolist(), strict=True)))
        for i in range(num_cases)
        for name in labels.foreground
    )
    return Evaluation(rows, labels)


def test_the_page_of_500_cases_is_bounded() -> None:
    evaluation = large(500, 12)
    text = render(Report("many", "", evaluation))
    assert len(text.encode()) < 5_000_000
    page = parsed(text)
    assert len(page.tables["cases"]) == 501
    assert len(page.tables["rows"]) == MAX_ROWS + 1
    assert f"The {MAX_ROWS} rows with the lowest Dice of 6000; metrics.csv has all." in page.text
    assert "Not drawn: organ_" in parsed(render(Report("", "", large(2, 13)))).text


def test_extremes() -> None:
    def of(*dice: float) -> dict[str, str]:
        rows = tuple(Row(str(i), "liver", State.PRESENT, {"dice": d}) for i, d in enumerate(dice))
        return extremes(Evaluation(rows, Labels.from_mapping({"background": 0, "liver": 1})))

    assert of(math.nan) == {}
    assert of(0.5) == {"worst": "0"}
    assert of(0.5, 0.2) == {"worst": "1", "best": "0"}
    assert of(0.5, math.nan, 0.2, 0.9) == {"worst": "2", "median": "0", "best": "3"}
    six = of(0.5, 0.1, 0.2, 0.9, 0.3, 0.8, 0.7)
    assert six == {"worst": "1", "2nd-worst": "2", "3rd-worst": "4", "median": "0", "best": "3"}
    assert list(six) == ["worst", "2nd-worst", "3rd-worst", "median", "best"]


def test_pictures_of_the_worst_the_median_and_the_best(written: Written) -> None:
    shown = re.findall(r"<figcaption><b>([\w-]+)</b> <a href=\"#case-(\d+)\">(\w)</a>", written.text)
    assert [(role, case) for role, _, case in shown] == list(extremes(written.evaluation).items())
    pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)\" width=\"(\d+)\" height=\"(\d+)\"", written.text)
    assert len(pictures) == len(shown)
    for data, width, height in pictures:
        raw = base64.b64decode(data)
        with Image.open(io.BytesIO(raw)) as image:
            assert image.format == "JPEG" and image.size == (int(width), int(height))
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        assert len(raw) <= MAX_BYTES
        orange = (abs(pixels - (0xE6, 0x9F, 0x00)) < 30).all(axis=-1)
        assert orange.sum() > 100  # the liver's line
    assert NO_SCANS not in written.page.text


def test_pictures_without_scans_and_with_scans_of_another_grid(folders: Folders, tmp_path: Path) -> None:
    evaluation = evaluate_folders(folders.predicted, folders.reference, labels=LABELS)
    evaluation.write(tmp_path)
    page = parsed(write_evaluation_report(tmp_path, evaluation, folders.predicted, folders.reference).read_text())
    assert page.text.count(NO_SCANS) == len(extremes(evaluation))
    moved = tmp_path / "moved"
    moved.mkdir()
    for case in evaluation.cases:
        write_image(moved / f"{case}.nii.gz", Volume(np.zeros((1, 5, 6, 7), np.float32), Grid((5, 6, 7), AFFINE)))
    path = write_evaluation_report(tmp_path, evaluation, folders.predicted, folders.reference, images=moved)
    page = parsed(path.read_text())
    assert page.text.count("no picture: E_GRID") == len(extremes(evaluation)) and "img" not in page.tags


def run_verb(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(evaluate_verb, [str(a) for a in arguments])
    if isinstance(result.exception, MedsegError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_the_verb_writes_it_and_names_cases_without_a_prediction(folders: Folders, tmp_path: Path) -> None:
    code, said = run_verb(folders.predicted, folders.reference, "--report")
    assert code == 2 and "-o FOLDER" in said
    code, said = run_verb(folders.predicted, folders.reference, "--images", folders.images, "-o", tmp_path / "x")
    assert code == 2 and "--report" in said and not (tmp_path / "x").exists()

    fewer = tmp_path / "pred"
    shutil.copytree(folders.predicted, fewer)
    (fewer / "d.nii.gz").unlink()
    labels = '{"background": 0, "liver": 1, "spleen": 2}'
    for policy, words in (("count", "and counted as empty: d"), ("skip", "and left out: the means are not those")):
        out = tmp_path / policy
        code, said = run_verb(
            fewer, folders.reference, "-o", out, "--report", "--images", folders.images, "--missing", policy,
            "--labels", labels, "--metrics", "default,cldice",
        )  # fmt: skip
        assert code == 0 and "report.html" in said, said
        page = parsed((out / "report.html").read_text())
        assert f"1 reference has no prediction, {words}" in " ".join(page.text.split())
        assert "clDice" in page.tables["classes"][0]
    assert "liver was missed entirely in 1 of 7 cases: d" in " ".join(
        parsed((tmp_path / "count" / "report.html").read_text()).text.split()
    )


def test_notes_of_the_predictions_are_told(folders: Folders, tmp_path: Path) -> None:
    predicted = tmp_path / "pred"
    shutil.copytree(folders.predicted, predicted)
    table = {"labels": LABELS.to_json(), "cases": {"a": {"files": ["a.nii.gz"], "notes": ["lossy JPEG"]}}}
    (predicted / "predictions.json").write_text(json.dumps(table))
    lines = [
        {"session": "s", "format": 1, "model": "abc", "options": {"step": 0.5}, "device": "cpu, 2 threads"},
        {"case": "a", "session": "s", "input": "1", "files": {}, "notes": [], "warnings": ["the scan is MR"]},
        {"case": "z", "session": "s", "input": None, "files": {}, "failed": {"code": "E_GAP", "message": "m"}},
        {"case": "y", "session": "s", "input": None, "files": {}, "failed": {"code": "E_GAP", "message": "m"}},
        {"case": "y", "session": "s", "input": "2", "files": {}, "notes": []},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"case": "cut sho'
    (predicted / "predictions.jsonl").write_text(text)
    code, said = run_verb(predicted, folders.reference, "-o", tmp_path / "out", "--report")
    assert code == 0, said
    page = parsed((tmp_path / "out" / "report.html").read_text())
    words = " ".join(page.text.split())
    assert "lossy JPEG: a" in words and "the scan is MR: a" in words
    assert "not predicted: E_GAP m: z" in words and words.count("E_GAP") == 1
    manifest = dict(row for table in page.tables.values() for row in table if len(row) == 2)
    assert manifest["model (SHA-256)"] == "abc" and manifest["predicted on"] == "cpu, 2 threads"


def test_pictures_in_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("pred", "ref", "scans"):
        (tmp_path / name).mkdir()
    for case in "ab":
        truth = np.zeros((40, 50), np.uint8)
        truth[8:30, 10:40] = 255
        guess = np.roll(truth, ord(case) - 94, axis=0)
        for name, array in (("ref", truth), ("pred", guess)):
            Image.fromarray(array).save(tmp_path / name / f"{case}.png")
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "scans" / f"{case}.png")
    code, said = run_verb(
        tmp_path / "pred", tmp_path / "ref", "-o", tmp_path / "out", "--report", "--images", tmp_path / "scans"
    )
    assert code == 0, said
    page = parsed((tmp_path / "out" / "report.html").read_text())
    assert "HD95 (px)" in page.tables["classes"][0] and page.tags.count("img") == 2
    assert "radiological" not in page.text
    assert "rows" not in page.tables  # one class: the table of cases says it all


def test_a_run_has_one(tiny_run) -> None:
    text = (tiny_run.run / "report.html").read_text()
    page = parsed(text)
    document = json.loads((tiny_run.run / "validation" / "metrics.json").read_text())
    _, *rows = page.tables["classes"]
    for row in rows:
        stored = document["summary"][FOREGROUND if row[0] == "mean" else row[0]]["metrics"]["dice"]["mean"]
        assert row[4].split(" | ")[0] == ("–" if stored is None else f"{stored:.3f}")
    assert len(page.tables["cases"]) - 1 == document["num_cases"]
    drawn = list((tiny_run.run / "validation" / "overlays").glob("*.png"))
    assert page.tags.count("img") == len(drawn) == 2
    words = " ".join(page.text.split())
    assert (
        "Model card" in words and "Known failures" in words and "learning rate" in words and "validation Dice" in words
    )
    assert "which flatters it a little" in words
    digest = hashlib.sha256((tiny_run.run / "checkpoints" / "best.safetensors").read_bytes()).hexdigest()
    manifest = dict(row for table in page.tables.values() for row in table if len(row) == 2)
    assert manifest["SHA-256 of best.safetensors"] == digest and manifest["seed"] == "0"
    assert manifest["device"].startswith("cpu (") and "torch" in manifest["versions"]
    for path in (tiny_run.data, tiny_run.run):
        assert str(path) not in text


def test_a_run_without_one(tiny_run, tmp_path: Path) -> None:
    from rich.console import Console

    from medseg.config import compose
    from medseg.training.train import train

    settings = [f"data.root='{tiny_run.data}'", "data.plan.base_width=4", "data.plan.patch_size=[16,24,24]",
                "trainer.device=cpu", "trainer.max_steps=1", "trainer.overfit_cases=1",
                "trainer.final_predictions=false", "trainer.report=false"]  # fmt: skip
    with (tmp_path / "log.txt").open("w") as log:
        train(compose("train", settings), tmp_path / "run", Console(file=log))
    assert (tmp_path / "run" / "model_card.md").exists() and not (tmp_path / "run" / "report.html").exists()
    path = write_run_report(tmp_path / "run", {"": tmp_path / "run"}, None, {})
    page = parsed(path.read_text())
    assert "were not predicted" in page.text and "cases" not in page.tables and "learning rate" in page.text


def test_folds_are_one_report(tiny_run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.run, tmp_path / "fold_0")
    shutil.copytree(tiny_run.run, tmp_path / "fold_1")
    labels = LABELS_OF(tiny_run)
    whole = read_evaluation(tiny_run.run / "validation", labels)
    folds = {}
    for fold, case in enumerate(whole.cases):
        folds[fold] = replace(whole, rows=tuple(row for row in whole.rows if row.case == case))
        overlays = tmp_path / f"fold_{fold}" / "validation" / "overlays"
        (source,) = overlays.glob(f"*_{case}.png")
        source.rename(overlays / f"worst_{case}.png")
    members = {f"fold {fold}": tmp_path / f"fold_{fold}" for fold in folds}
    survey = json.loads((tmp_path / "fold_0" / "survey.json").read_text())
    survey["quarantine"] = [{"case_id": "broken", "code": "E_TRUNCATED", "message": "the file ends too early"}]
    (tmp_path / "fold_0" / "survey.json").write_text(json.dumps(survey))
    page = parsed(write_run_report(tmp_path, members, CrossValidation(folds), {"seed": 3}).read_text())
    head, *rows = page.tables["cases"]
    assert {row[0]: row[1] for row in rows} == {case: str(i) for i, case in enumerate(whole.cases)} and head[
        1
    ] == "fold"
    words = " ".join(page.text.split())
    assert "E_TRUNCATED the file ends too early: broken" in words
    assert page.tags.count("img") == 2 and "fold 0" in words and "fold 1" in words
    assert page.text.count("SHA-256 of fold 1: best.safetensors") == 1


def LABELS_OF(tiny_run) -> Labels:
    from medseg.bundle import BundleInfo

    return BundleInfo.read(tiny_run.run).labels


# ---- a real browser ----


def browser(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *root]
    return subprocess.run([found, *options, *arguments], capture_output=True, text=True, timeout=120, check=True)


def dom(path: Path, fragment: str, folder: Path) -> str:
    result = browser("--enable-logging=stderr", "--dump-dom", f"{path.as_uri()}{fragment}", folder=folder)
    assert "CONSOLE" not in result.stderr, result.stderr  # an error of the script, or the policy refused something
    return result.stdout


def visible(text: str) -> list[list[str]]:
    """Rows of the table of cases that a reader sees."""
    body = text[text.index('id="cases"') :]
    body = body[: body.index("</table>")]
    return parsed("<table id=x>" + re.sub(r"<tr[^>]* hidden=\"\".*?</tr>", "", body, flags=re.DOTALL)).tables["x"][1:]


def test_a_browser_sorts_and_filters(written: Written, tmp_path: Path) -> None:
    means = written.evaluation.case_means("dice")
    best_first = sorted(means, key=lambda case: -means[case])
    text = dom(written.path, "#t=cases&sort=1&desc=1", tmp_path)
    assert [row[0] for row in visible(text)] == best_first
    assert 'aria-sort="descending"' in text
    assert [row[0] for row in visible(dom(written.path, "#t=cases&sort=0", tmp_path))] == sorted(means)
    limit = sorted(means.values())[3] + 1e-9
    text = dom(written.path, f"#t=cases&sort=1&q=dice%3E{limit:.6f}", tmp_path)
    shown = [row[0] for row in visible(text)]
    assert shown and set(shown) == {case for case in means if round(means[case], 3) > limit}
    assert f"{len(shown)} of 7 rows" in text
    assert [row[0] for row in visible(dom(written.path, "#t=cases&q=spleen", tmp_path))] != []
    # Undefined values come last either way.
    rows = dom(written.path, "#t=rows&sort=3&desc=1", tmp_path)
    assert "<details open" in rows


def test_a_browser_runs_no_script_of_a_file(tmp_path: Path) -> None:
    """The policy stops a script even if one got into the page."""
    evaluation = large(3, 2)
    text = render(Report("x", "", evaluation)).replace("</main>", "<script>document.title='hacked'</script></main>")
    (tmp_path / "x.html").write_text(text)
    result = browser("--dump-dom", (tmp_path / "x.html").as_uri(), folder=tmp_path)
    assert "<title>x</title>" in result.stdout and '<html lang="en" class="js">' in result.stdout


def test_a_browser_draws_it_light_dark_and_on_paper(written: Written, tmp_path: Path) -> None:
    shots = {}
    for name, option in (("light", ""), ("dark", "--force-dark-mode")):
        path = tmp_path / f"{name}.png"
        arguments = [option] if option else []
        browser(*arguments, "--window-size=1200,2500", f"--screenshot={path}", written.path.as_uri(), folder=tmp_path)
        shots[name] = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert shots["light"][5, 5] == 255 and shots["dark"][5, 5] < 60
    assert shots["light"].std() > 20
    pdf = tmp_path / "page.pdf"
    browser("--no-pdf-header-footer", f"--print-to-pdf={pdf}", written.path.as_uri(), folder=tmp_path)
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 3 <= pages <= 9


# ---- a peer ----

NNUNET = """
import sys
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

predicted, reference, out = sys.argv[1:4]
if __name__ == "__main__":
    compute_metrics_on_folder(reference, predicted, out, SimpleITKIO(), ".nii.gz", [1, 2], None, 1)
"""


def counted(case: str, folders: Folders) -> dict[str, dict[str, int]]:
    """What nnU-Net counts, of each class of a case, by the counts that all our metrics come from."""
    predicted, reference = (open_label(folder / f"{case}.nii.gz") for folder in (folders.predicted, folders.reference))
    indices = [LABELS.to_index(volume.array) for volume in (predicted, reference)]
    each = class_masks(*indices, reference.grid, num_classes=3, tolerance_mm=1.0)
    return {
        str(value): {
            "TP": m.tp,
            "FP": m.fp,
            "FN": m.fn,
            "TN": m.tn,
            "n_pred": m.num_predicted,
            "n_ref": m.num_reference,
        }
        for value, m in enumerate(each, start=1)
    }


def test_all_of_each_case_is_nnunets(folders: Folders, tmp_path: Path) -> None:
    """nnU-Net's summary.json on the same files: exactly the same counts, Dice and IoU, and means of Dice and IoU."""
    if not PEER.exists():
        pytest.skip("nnU-Net is not installed: python scripts/make_peers.py")
    script, out = tmp_path / "evaluate.py", tmp_path / "summary.json"
    script.write_text(NNUNET)
    arguments = [str(PEER), str(script), str(folders.predicted), str(folders.reference), str(out)]
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    theirs = json.loads(out.read_text())
    ours = evaluate_folders(folders.predicted, folders.reference, labels=LABELS)
    compared = 0
    for entry in theirs["metric_per_case"]:
        case = Path(entry["reference_file"]).name.removesuffix(".nii.gz")
        counts = counted(case, folders)
        for value, scores in entry["metrics"].items():
            assert {name: scores[name] for name in scores if name not in ("Dice", "IoU")} == counts[value], case
            row = next(r for r in ours.rows if (r.case, r.class_name) == (case, LABELS.names[int(value)]))
            for name, key in (("dice", "Dice"), ("iou", "IoU")):
                mine, other = row.values[name], scores[key]
                assert mine == other or (math.isnan(mine) and math.isnan(other)), (case, name)
                compared += 1
    assert compared == 2 * 2 * 7
    for value in ("1", "2"):
        for name, key in (("dice", "Dice"), ("iou", "IoU")):
            mean = theirs["mean"][value][key]
            assert ours.mean(name, LABELS.names[int(value)]) == pytest.approx(mean, rel=1e-12)


def test_the_axis_of_shares_begins_below_the_lowest() -> None:
    def axis(*dice: float) -> tuple[float, float]:
        rows = [Row(str(i), "liver", State.PRESENT, {"dice": value}) for i, value in enumerate(dice)]
        (metric,) = metrics(("dice",))
        figure = distribution_figure(Evaluation(tuple(rows), LABELS), metric)
        return figure.axes[0].get_xlim()

    assert axis(0.87, 0.92) == pytest.approx((0.78, 1.02))
    assert axis(0.63, 0.92) == pytest.approx((0.58, 1.02))
    assert axis(0.61, 0.92) == pytest.approx((0.48, 1.02))
    assert axis(0.0, 1.0) == pytest.approx((-0.02, 1.02))


def test_writing_into_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        write_report(tmp_path / "none" / "report.html", Report("t", "s", None))
