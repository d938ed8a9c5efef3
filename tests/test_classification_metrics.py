"""Metrics of classification against scikit-learn, SciPy and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as reference

from medseg.classification.evaluation import CROSS_FITTED, ClassificationEvaluation
from medseg.errors import MedsegError
from medseg.metrics.classification import (
    Counts,
    OperatingPoint,
    auc,
    brier,
    choose_threshold,
    confusion,
    macro_auc,
    roc,
    summarise,
    undefined,
)
from medseg.metrics.classification_intervals import (
    auc_interval,
    clustered_proportion,
    macro_auc_interval,
    proportion,
    summary_intervals,
)


def drawn(seed: int, num: int = 60) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Cases whose scores tie now and then."""
    random = np.random.default_rng(seed)
    positive = random.random(num) < 0.4
    return positive, np.round(np.clip(random.normal(0.4 + 0.2 * positive, 0.2), 0, 1), 1)


@pytest.mark.parametrize("seed", range(5))
def test_area_and_curve_are_those_of_scikit_learn(seed: int) -> None:
    positive, scores = drawn(seed)
    assert auc(positive, scores) == pytest.approx(reference.roc_auc_score(positive, scores), abs=1e-12)
    fall_out, sensitivity, thresholds = reference.roc_curve(positive, scores, drop_intermediate=False)
    curve = roc(positive, scores)
    assert np.allclose(curve.fall_out, fall_out) and np.allclose(curve.sensitivity, sensitivity)
    assert np.array_equal(curve.thresholds, thresholds)


def test_the_variance_of_an_area_is_delongs() -> None:
    positive, scores = drawn(1)
    better = scores[positive][:, None] > scores[~positive][None]
    wins = better + 0.5 * (scores[positive][:, None] == scores[~positive][None])
    variance = wins.mean(axis=1).var(ddof=1) / positive.sum() + wins.mean(axis=0).var(ddof=1) / (~positive).sum()
    found, area = auc_interval(positive, scores), wins.mean()
    error = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    assert found.value == pytest.approx(area)
    assert (found.low, found.high) == pytest.approx(
        [1 / (1 + math.exp(-(logit + s * error))) for s in (-1, 1)], abs=1e-6
    )


def test_cases_of_one_patient_that_are_all_the_same_count_once() -> None:
    positive, scores = drawn(2)
    patients = [f"p{i}" for i in range(len(scores))]
    once = auc_interval(positive, scores)
    twice = auc_interval(np.tile(positive, 2), np.tile(scores, 2), patients * 2)
    taken_for_others = auc_interval(np.tile(positive, 2), np.tile(scores, 2))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert taken_for_others.low > once.low


def test_all_told_apart_is_no_certainty() -> None:
    positive = np.array([False] * 12 + [True] * 8)
    found = auc_interval(positive, positive * 1.0)
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.95
    theta, z, star = found.low, 1.959964, (12 + 8) / 2 - 1  # Newcombe's equation holds at its end
    spread = 1 + star * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    assert (1 - theta) ** 2 == pytest.approx(z**2 * theta * (1 - theta) * spread / (12 * 8), rel=1e-4)
    assert auc_interval(~positive, positive * 1.0).low == 0.0


@pytest.mark.parametrize("hits, trials", [(0, 7), (5, 9), (9, 9), (40, 41)])
def test_shares_have_wilsons_interval(hits: int, trials: int) -> None:
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    found = proportion(hits, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_patients_with_several_cases_widen_the_interval_of_a_share() -> None:
    right = np.repeat([True] * 6 + [False] * 4, 5)
    patients = [f"p{i // 5}" for i in range(50)]
    found, independent = clustered_proportion(right, np.ones(50), patients), proportion(30, 50)
    assert found.value == 0.6 and found.high - found.low > 1.5 * (independent.high - independent.low)


@pytest.mark.parametrize("share, hits", [(1.0, 10), (0.0, 0), (0.5, 5)])
def test_patients_that_are_all_alike_are_no_certainty(share: float, hits: int) -> None:
    right = np.tile([share > 0, share == 1], 10)
    found = clustered_proportion(right, np.ones(20), [f"p{i // 2}" for i in range(20)])
    expected = stats.binomtest(hits, 10).proportion_ci(method="wilson")
    assert found.value == share and (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_all_right_is_no_certainty() -> None:
    truth = np.repeat([0, 1, 2], 8)
    patients = [f"p{i // 2}" for i in range(24)]
    accuracy, *others = summary_intervals(truth, truth, 3, patients)
    expected = stats.binomtest(12, 12).proportion_ci(method="wilson")
    assert (accuracy.low, accuracy.high) == pytest.approx((expected.low, 1.0))
    area = macro_auc_interval(np.eye(3)[truth], truth, patients)
    for found in (*others, area):
        assert found.value == 1.0 and math.isnan(found.low) and math.isnan(found.high)
        assert found.reason.startswith("no interval")
    names = [f"c{i}" for i in range(24)]
    evaluation = ClassificationEvaluation(names, truth, np.eye(3)[truth], ("a", "b", "c"))
    for one in (*evaluation.summary.values(), *evaluation.aucs.values()):
        assert math.isnan(one.low) or one.high - one.low > 0.05
    for row in evaluation.decisions:
        assert all(one.high - one.low > 0.05 for one in row.values.values())


@pytest.mark.parametrize("seed", range(4))
def test_what_a_confusion_matrix_comes_to_is_scikit_learns(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 4, 50)
    predicted = np.where(random.random(50) < 0.6, truth, random.integers(0, 4, 50))
    matrix = confusion(truth, predicted, 4)
    assert np.array_equal(matrix, reference.confusion_matrix(truth, predicted, labels=range(4)))
    expected = [
        reference.accuracy_score(truth, predicted),
        reference.balanced_accuracy_score(truth, predicted),
        reference.f1_score(truth, predicted, average="macro"),
        reference.cohen_kappa_score(truth, predicted),
    ]
    assert np.allclose(summarise(matrix), expected)
    for found, value in zip(summary_intervals(truth, predicted, 4), expected, strict=True):
        assert found.value == pytest.approx(value) and found.low < value < found.high


def test_probabilities_are_scored_as_by_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth, shares = random.integers(0, 3, 40), random.dirichlet([1, 1, 1], 40)
    expected = reference.roc_auc_score(truth, shares, multi_class="ovr", average="macro")
    assert macro_auc(shares, truth) == pytest.approx(expected)
    found = macro_auc_interval(shares, truth)
    assert found.value == pytest.approx(expected) and found.low < expected < found.high
    two = np.stack([1 - shares[:, 0], shares[:, 0]], axis=1)
    assert brier(two, truth == 0).mean() == pytest.approx(2 * reference.brier_score_loss(truth == 0, shares[:, 0]))


def test_operating_points_by_hand() -> None:
    positive = np.array([0, 0, 0, 1, 0, 1, 1, 1], dtype=bool)
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])

    def at(text: str) -> tuple[float, Counts]:
        threshold = choose_threshold(OperatingPoint.parse(text), positive, scores)
        return threshold, Counts.of(positive, scores >= threshold)

    assert at("sensitivity>=0.9") == (pytest.approx(0.35), Counts(tp=4, fp=1, tn=3, fn=0))
    assert at("specificity >= 1.0") == (pytest.approx(0.55), Counts(tp=3, fp=0, tn=4, fn=1))
    assert at("youden")[1] == Counts(tp=3, fp=0, tn=4, fn=1)  # of equally good ones the strictest
    assert at("threshold=0.65") == (0.65, Counts(tp=2, fp=0, tn=4, fn=2))
    assert Counts(3, 1, 4, 2).ratios() == {
        "sensitivity": (3, 5), "specificity": (4, 5), "ppv": (3, 4), "npv": (4, 6), "accuracy": (7, 10)
    }  # fmt: skip


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity>=2", "f1>=0.9", "", "threshold=0.3.1"])
def test_operating_points_that_are_none(text: str) -> None:
    with pytest.raises(MedsegError, match="E_CONFIG.*operating point"):
        OperatingPoint.parse(text)


def test_absent_classes_are_nan_with_a_reason() -> None:
    truth, shares = np.zeros(5, dtype=np.int64), np.tile([[0.5, 0.3, 0.2]], (5, 1))
    assert undefined(truth, ["a", "b", "c"]) == {
        "a": "all cases have this class", "b": "no case has this class", "c": "no case has this class"
    }  # fmt: skip
    found = auc_interval(truth == 1, shares[:, 1])
    assert math.isnan(found.value) and found.reason == "there is no positive case"
    assert math.isnan(choose_threshold(OperatingPoint("youden"), truth == 1, shares[:, 1]))
    evaluation = ClassificationEvaluation(list("vwxyz"), truth, shares, ("a", "b", "c"), points=("youden",))
    content = evaluation.to_json()
    assert content["auc"]["macro"]["value"] is None and content["undefined"]["b"]
    assert content["summary"]["accuracy"]["value"] == 1.0
    nobody = ClassificationEvaluation([], truth[:0], shares[:0], ("a", "b", "c"), points=("youden",))
    assert nobody.to_json()["summary"]["accuracy"]["value"] is None


def test_thresholds_are_never_scored_on_the_cases_they_were_chosen_on() -> None:
    # Scores without meaning: the best threshold of these very cases would look better than chance.
    worth = {"own": [], "other": []}  # type: dict[str, list[float]]
    for seed in range(12):
        random = np.random.default_rng(seed)
        truth, share = random.integers(0, 2, 40), random.random(40)
        shares = np.stack([1 - share, share], axis=1)
        evaluation = ClassificationEvaluation(
            [f"c{i}" for i in range(40)], truth, shares, ("no", "yes"), points=("youden",), seed=seed
        )
        assert evaluation.how_chosen == CROSS_FITTED
        (row,) = (row for row in evaluation.decisions if row.point == "youden")
        worth["other"].append(row.values["sensitivity"].value + row.values["specificity"].value - 1)
        counts = Counts.of(truth == 1, share >= evaluation.choose_thresholds()["yes"]["youden"])
        worth["own"].append(counts.tp / (counts.tp + counts.fn) + counts.tn / (counts.tn + counts.fp) - 1)
    assert np.mean(worth["own"]) > 0.15 > abs(np.mean(worth["other"]))


def test_thresholds_of_other_cases_are_applied_as_they_are() -> None:
    truth, share = np.array([0, 0, 1, 1]), np.array([0.2, 0.6, 0.55, 0.9])
    evaluation = ClassificationEvaluation(
        list("abcd"), truth, np.stack([1 - share, share], axis=1), ("no", "yes"), thresholds={"yes": {"youden": 0.58}}
    )
    most, row = evaluation.decisions
    assert (most.counts, row.counts) == (Counts(2, 1, 1, 0), Counts(1, 1, 1, 1))
    assert row.threshold == 0.58 and "other images" in evaluation.how_chosen
