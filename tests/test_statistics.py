"""Intervals, agreement, tests between models: against scipy, by hand, and on the wrong inputs."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from medseg.cli import cli
from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.reports.comparison import compare, print_comparison, read_metrics
from medseg.reports.crossvalidation import CrossValidation
from medseg.reports.evaluation import FOREGROUND, Evaluation, Row
from medseg.reports.evaluation_files import to_json
from medseg.statistics import agreement, bootstrap_means, holm, paired_test

# --- intervals of means ---


@pytest.mark.parametrize("n", [12, 80])
def test_intervals_agree_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.beta(6, 1, (n, 2))
    for k, found in enumerate(bootstrap_means(values, num_resamples=20_000)):
        scipy = stats.bootstrap((values[:, k],), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
        width = scipy.high - scipy.low
        assert found.mean == pytest.approx(values[:, k].mean())
        assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.03 * width)
        assert found.low < found.mean < found.high


def test_patients_are_drawn_with_all_their_cases() -> None:
    """Ten equal cases of each patient say no more than one of each."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=15)
    repeated, patients = np.repeat(of_patient, 10), [f"p{i:02}" for i in np.repeat(np.arange(15), 10)]
    (once,) = bootstrap_means(of_patient)
    (clustered,) = bootstrap_means(repeated, patients)
    (as_if_independent,) = bootstrap_means(repeated)
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert clustered.num_patients == 15
    assert as_if_independent.high - as_if_independent.low < 0.5 * (once.high - once.low)


def test_intervals_cover_what_they_say() -> None:
    """Of 200 samples of 60 patients about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(3)
    samples = rng.exponential(size=(60, 200))
    hits = sum(i.low <= 1 <= i.high for i in bootstrap_means(samples, num_resamples=2000))
    assert 0.89 <= hits / 200 <= 0.99


def test_few_patients_are_warned_about_and_seeds_repeat() -> None:
    values = np.random.default_rng(1).random(50)
    assert bootstrap_means(values)[0].warning is None
    assert "49 patients" in (bootstrap_means(values[:49])[0].warning or "")
    assert bootstrap_means(values) == bootstrap_means(values)
    assert bootstrap_means(values) != bootstrap_means(values, seed=1)


def test_undefined_values_and_too_few() -> None:
    table = np.array([[1.0, math.nan, 2.0], [3.0, math.nan, 2.0], [5.0, 7.0, 2.0], [math.nan, math.nan, 2.0]])
    some, single, constant = bootstrap_means(table)
    assert (some.mean, some.num_patients) == (3.0, 3)
    assert 1 <= some.low < 3 < some.high <= 5
    assert (single.mean, single.num_patients) == (7.0, 1) and math.isnan(single.low)
    assert (constant.low, constant.mean, constant.high) == (2.0, 2.0, 2.0)
    (nothing,) = bootstrap_means([])
    assert math.isnan(nothing.mean) and nothing.num_patients == 0


@settings(max_examples=30, deadline=None)
@example([0.0, 2.06e-112], 0.0, 1.0)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(-5, 5), st.floats(0.1, 10))
def test_intervals_move_with_the_values(values: list[float], shift: float, scale: float) -> None:
    (found,), (moved,) = (bootstrap_means(v, num_resamples=300) for v in (values, np.array(values) * scale + shift))
    assert moved.mean == pytest.approx(found.mean * scale + shift, abs=1e-9)
    if found.high - found.low > 1e-6:
        ends = (found.low * scale + shift, found.high * scale + shift)
        assert (moved.low, moved.high) == pytest.approx(ends, abs=1e-6 + 0.1 * (ends[1] - ends[0]))


# --- agreement of volumes ---


def test_agreement_by_hand_and_by_anova() -> None:
    """Shrout and Fleiss 1979, table 2, first two judges; ICC(2,1) by the sums of squares of a two-way layout."""
    judges = np.array([[9, 2], [6, 1], [8, 4], [7, 1], [10, 5], [6, 2]], dtype=float)
    found = agreement(judges[:, 0], judges[:, 1])
    difference = judges[:, 0] - judges[:, 1]
    assert found.bias == pytest.approx(31 / 6)
    assert (found.low, found.high) == pytest.approx(
        (found.bias - 1.96 * np.std(difference, ddof=1), found.bias + 1.96 * np.std(difference, ddof=1)), rel=1e-4
    )
    assert found.pearson == pytest.approx(np.corrcoef(judges.T)[0, 1])
    n, k = judges.shape
    total = ((judges - judges.mean()) ** 2).sum()
    between = k * ((judges.mean(1) - judges.mean()) ** 2).sum()
    of_judges = n * ((judges.mean(0) - judges.mean()) ** 2).sum()
    bms, jms, ems = between / (n - 1), of_judges / (k - 1), (total - between - of_judges) / ((n - 1) * (k - 1))
    assert found.icc == pytest.approx((bms - ems) / (bms + (k - 1) * ems + k * (jms - ems) / n))


def test_a_constant_factor_correlates_and_does_not_agree() -> None:
    reference = np.linspace(1, 5, 20)
    double, same = agreement(2 * reference, reference), agreement(reference, reference)
    assert double.pearson == pytest.approx(1) and double.icc < 0.5 and double.bias == pytest.approx(3)
    assert (same.bias, same.low, same.high) == (0, 0, 0) and same.icc == pytest.approx(1)
    assert math.isnan(agreement([1.0, 2.0], [3.0, 3.0]).pearson)
    assert math.isnan(agreement([2.0, 2.0], [2.0, 2.0]).icc)
    assert agreement([1.0, math.nan, 3.0], [1.0, 2.0, 2.0]).n == 2
    assert math.isnan(agreement([1.0], [2.0]).low) and math.isnan(agreement([], []).bias)


# --- tests between two models ---


def test_paired_test_agrees_with_scipy_and_with_ranks_by_hand() -> None:
    first = np.array([0.80, 0.81, 0.90, 0.60, 0.70, 0.75, 0.85])
    second = first + np.array([0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.0])
    found = paired_test(first, second)
    assert found.p == pytest.approx(stats.wilcoxon((second - first)[:6]).pvalue)
    assert found.effect == pytest.approx((1 + 2 + 4 + 5 + 6 - 3) / 21)  # ranks in favour less those against
    assert (found.num_higher, found.num_lower) == (5, 1)
    assert found.difference.mean == pytest.approx((second - first).mean())
    turned = paired_test(second, first)
    assert (turned.p, turned.effect) == (pytest.approx(found.p), pytest.approx(-found.effect))


def test_exact_p_by_all_signs() -> None:
    differences = np.array([1.0, 2.0, 3.5, -0.5, 5.0])
    ranks = stats.rankdata(np.abs(differences))
    observed = abs((ranks * np.sign(differences)).sum())
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    expected = (np.abs(ranks @ signs) >= observed).mean()
    assert paired_test(np.zeros(5), differences).p == pytest.approx(expected)


def test_cases_of_a_patient_count_once() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.3, 1, 8)
    patients = [f"p{i}" for i in np.repeat(np.arange(8), 6)]
    once = paired_test(np.zeros(8), differences)
    repeated = paired_test(np.zeros(48), np.repeat(differences, 6), patients)
    assert repeated.p == pytest.approx(once.p)
    assert repeated.difference.low == pytest.approx(once.difference.low)
    assert paired_test(np.zeros(48), np.repeat(differences, 6)).p < once.p


def test_nothing_to_compare() -> None:
    same = paired_test([0.5, 0.6], [0.5, 0.6])
    assert (same.p, same.effect, same.num_higher) == (1.0, 0.0, 0)
    assert math.isnan(paired_test([math.nan], [1.0]).p)


def test_holm_by_hand() -> None:
    found = holm([0.01, 0.04, 0.03, math.nan, 0.005])
    assert found[[0, 1, 2, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(found[3])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_stepwise_procedure_rejects(p: list[float]) -> None:
    level, rejected = 0.05, set()
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - rank) > level:
            break
        rejected.add(int(index))
    assert {i for i, q in enumerate(holm(p)) if q <= level} == rejected


# --- two evaluations ---

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2})


def evaluation(dice: np.ndarray, labels: Labels = LABELS, **options) -> Evaluation:
    """From Dice of shape (cases, classes); a NaN is a structure that is in neither mask."""
    rows = []
    for i, of_case in enumerate(dice):
        for name, value in zip(labels.foreground, of_case, strict=True):
            absent = math.isnan(value)
            volume = 0.0 if absent else 10.0 + i
            values = {"dice": value, "hd95": math.nan if absent else 10 * (1 - value), "reference_volume": volume}
            rows.append(Row(f"c{i:02}", name, State.ABSENT if absent else State.PRESENT, values))
    return Evaluation(tuple(rows), labels, **options)


def dice_of(seed: int, shift: float = 0.0, n: int = 20) -> np.ndarray:
    base = np.random.default_rng(99).uniform(0.6, 0.8, (n, 2))
    return base + np.random.default_rng(seed).normal(shift, 0.02, (n, 2))


def test_a_better_model_is_found_and_an_equal_one_is_not() -> None:
    better = compare(evaluation(dice_of(1)), evaluation(dice_of(2, 0.05)))
    verdicts = {(row.class_name, row.metric.name): row.verdict for row in better.rows}
    names = ("liver", "spleen", FOREGROUND)
    assert verdicts == {(name, metric): "second better" for name in names for metric in ("dice", "hd95")}
    row = better.rows[0]
    assert row.p_holm >= row.test.p and row.n == 20
    assert row.means[1] - row.means[0] == pytest.approx(row.test.difference.mean)
    assert {r.verdict for r in compare(evaluation(dice_of(2, 0.05)), evaluation(dice_of(1))).rows} == {"second worse"}
    assert {r.verdict for r in compare(evaluation(dice_of(1)), evaluation(dice_of(2))).rows} == {""}


def test_a_false_alarm_costs_where_the_other_model_rightly_found_nothing() -> None:
    first, second = dice_of(1), dice_of(1)
    first[3, 1], second[3, 1] = math.nan, 0.0
    a, b = evaluation(first), evaluation(second)
    b = Evaluation(
        tuple(
            Row(r.case, r.class_name, State.SPURIOUS, {**r.values, "reference_volume": 0.0})
            if (r.case, r.class_name) == ("c03", "spleen")
            else r
            for r in b.rows
        ),
        LABELS,
    )
    for pair, sign in (((a, b), -1), ((b, a), 1)):
        row = next(r for r in compare(*pair).rows if (r.class_name, r.metric.name) == ("spleen", "dice"))
        assert row.n == 20
        assert row.test.difference.mean == pytest.approx(sign / 20)
    first[3, 1] = second[3, 1] = math.nan
    assert compare(evaluation(first), evaluation(second)).rows[2].n == 19


def test_unpaired_evaluations_are_refused() -> None:
    a = evaluation(dice_of(1))
    fewer = evaluation(dice_of(1, n=17))
    with pytest.raises(MedsegError, match=r"E_UNPAIRED(.*\n)*.*c17, c18, c19 not in the second"):
        compare(a, fewer)
    with pytest.raises(MedsegError, match=r"E_UNPAIRED(.*\n)*.*not in the first"):
        compare(fewer, a)
    other = Labels.from_mapping({"background": 0, "liver": 1, "kidney": 2})
    with pytest.raises(MedsegError, match=r"classes(.*\n)*.*spleen not in the second; kidney not in the first"):
        compare(a, evaluation(dice_of(1), other))
    with pytest.raises(MedsegError, match=r"tolerance(.*\n)*.*2.0 and 1.0"):
        compare(a, evaluation(dice_of(1), tolerance_mm=1.0))
    moved = evaluation(dice_of(1))
    moved.rows[4].values["reference_volume"] *= 1.01
    with pytest.raises(MedsegError, match=r"other references(.*\n)*.*c02"):
        compare(a, moved)
    with pytest.raises(MedsegError, match=r"E_NAME(.*\n)*.*cldice(.*\n)*.*--metrics"):
        compare(a, a, names=("cldice",))


def test_verb_and_files(tmp_path: Path) -> None:
    for name, dice in (("a", dice_of(1)), ("b", dice_of(2, 0.05))):
        evaluation(dice).write(tmp_path / name)
    out = tmp_path / "comparison.json"
    done = CliRunner().invoke(
        cli, ["compare", str(tmp_path / "a" / "metrics.json"), str(tmp_path / "b"), "--metrics", "dice", "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "20 cases" in done.output and "better" in done.output
    document = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert [row["class"] for row in document["rows"]] == ["liver", "spleen", FOREGROUND]
    assert {row["verdict"] for row in document["rows"]} == {"second better"}
    for wrong in (tmp_path / "none", tmp_path / "a" / "metrics.csv"):
        with pytest.raises(MedsegError, match="E_RUN"):
            read_metrics(wrong)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(MedsegError, match="E_RUN"):
        read_metrics(tmp_path)


def test_patients_come_through_the_files(tmp_path: Path) -> None:
    """Twenty cases of four patients are four values of the test, and nobody's name stands in the file."""
    patients = {f"c{i:02}": f"Doe^{i % 4}" for i in range(20)}
    first, second = (evaluation(dice, patients=patients) for dice in (dice_of(1), dice_of(2, 0.05)))
    known = compare(first, second)
    assert (known.num_cases, known.num_patients, known.units) == (20, 4, "patients")
    assert min(row.test.p for row in known.rows) >= 0.125 > compare(first, second, patients={}).rows[0].test.p
    for name, one in (("a", first), ("b", second)):
        one.write(tmp_path / name)
    text = (tmp_path / "a" / "metrics.json").read_text()
    assert "Doe" not in text and "from 4 patients" in json.loads(text)["warning"]
    read = compare(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"))
    assert [row.test.p for row in read.rows] == [row.test.p for row in known.rows]
    assert read.to_json() == known.to_json()
    unknown = compare(evaluation(dice_of(1)), evaluation(dice_of(2, 0.05)))
    assert unknown.units == "cases" and "over cases" in unknown.to_json()["p"]
    assert "from 20 cases" in (to_json(evaluation(dice_of(1)))["warning"] or "")


def test_folds_keep_their_patients_apart() -> None:
    parts = [
        replace(evaluation(dice_of(n)), patients={f"c{i:02}": f"patient {i // 2}" for i in range(20)}) for n in (1, 2)
    ]
    parts[1] = replace(
        parts[1],
        rows=tuple(replace(row, case=f"d{row.case}") for row in parts[1].rows),
        patients={f"d{case}": patient for case, patient in parts[1].patients.items()},
    )
    pooled = CrossValidation({0: parts[0], 1: parts[1]}).pooled
    assert len(pooled.cases) == 40 and len(set(pooled.patients.values())) == 20


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_its_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, record=True)
    print_comparison(compare(evaluation(dice_of(1)), evaluation(dice_of(2, 0.05))), console)
    text = console.export_text()
    assert "…" not in text.replace(" … ", "")
    assert "from 20 cases" in text
    rows = [line for line in text.splitlines() if line.rstrip().endswith("better")]
    assert len(rows) == 6 and rows[0].split()[:2] == ["liver", "Dice"] and rows[4].split()[0] == "mean"


def test_summaries_carry_intervals_and_volume_agreement(tmp_path: Path) -> None:
    patients = {f"c{i:02}": f"p{i // 4}" for i in range(20)}
    known, unknown = evaluation(dice_of(1), patients=patients), evaluation(dice_of(1))
    assert known.intervals["liver", "dice"].num_patients == 5
    assert unknown.intervals["liver", "dice"].num_patients == 20
    for row in unknown.rows:
        row.values["predicted_volume"] = row.values["reference_volume"] * 1.1
    unknown = Evaluation(unknown.rows, LABELS)
    unknown.write(tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    dice = document["summary"]["liver"]["metrics"]["dice"]
    assert dice["low"] < dice["mean"] < dice["high"]
    assert (
        document["summary"][FOREGROUND]["metrics"]["dice"]["low"]
        < document["summary"][FOREGROUND]["metrics"]["dice"]["mean"]
    )
    assert "20 cases" in document["warning"]
    volumes = document["volume_agreement"]["spleen"]
    assert volumes["bias"] == pytest.approx(np.mean([1.0 + i / 10 for i in range(20)]))
    assert volumes["pearson"] == pytest.approx(1)
    with (tmp_path / "summary.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if (r["class"], r["metric"]) == ("liver", "dice"))
    assert float(row["low"]) == pytest.approx(dice["low"], rel=1e-5)
