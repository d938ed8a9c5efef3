"""Survival analysis against published results and hand calculations."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg.cli import main
from medseg.errors import Code, MedsegError
from medseg.survival.concordance import concordance
from medseg.survival.data import Cohort, read_cohort

pytest.importorskip("lifelines")

SIX_MP = "6 6 6 6+ 7 9+ 10 10+ 11+ 13 16 17+ 19+ 20+ 22 23 25+ 32+ 32+ 34+ 35+"
CONTROL = "1 1 2 2 3 4 4 5 5 8 8 8 8 11 11 12 12 15 17 22 23"
"""Weeks of remission in acute leukaemia, + censored. Freireich et al., Blood 1963, table 1; in every textbook since."""


def leukaemia() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, events, and 1 for those with 6-mercaptopurine."""
    words = [(word, group) for group, text in ((1, SIX_MP), (0, CONTROL)) for word in text.split()]
    time = np.array([float(word.rstrip("+")) for word, _ in words])
    return time, np.array([not word.endswith("+") for word, _ in words]), np.array([group for _, group in words])


def cohort_of(time: np.ndarray, event: np.ndarray, values: np.ndarray, patients: list[str] | None = None) -> Cohort:
    ids = tuple(f"c{i}" for i in range(len(time)))
    features = tuple(f"x{i}" for i in range(values.shape[1]))
    return Cohort(ids, tuple(patients or ids), time.astype(float), event.astype(bool), features, values.astype(float))


def made_up(num: int, num_features: int, seed: int = 0, effect: float = 1.0) -> Cohort:
    """Exponential times whose hazard the first feature doubles and more; a third is censored."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num, num_features))
    time = rng.exponential(np.exp(-effect * values[:, 0]))
    end = rng.exponential(2.5, size=num)
    return cohort_of(np.minimum(time, end), time <= end, values)


def test_kaplan_meier_of_the_leukaemia_patients() -> None:
    from medseg.survival.analysis import kaplan_meier

    time, event, treated = leukaemia()
    curve = kaplan_meier(time[treated == 1], event[treated == 1])
    found = {t: round(float(s), 3) for t, s, n in zip(curve.times, curve.survival, curve.events, strict=True) if n}
    assert found == {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    assert curve.at_risk[list(curve.times).index(10.0)] == 15


def test_logrank_and_hazard_ratio_of_the_leukaemia_patients() -> None:
    """χ² 16.79, and Cox's hazard ratio of placebo 4.82 (Efron): Kleinbaum and Klein, Survival analysis."""
    from scipy import stats

    from medseg.survival import cox
    from medseg.survival.analysis import _logrank

    time, event, treated = leukaemia()
    cohort = cohort_of(time, event, treated[:, None])
    p = _logrank(cohort, treated)
    assert stats.chi2.isf(p, 1) == pytest.approx(16.79, abs=0.01)
    model = cox.fit(cohort)
    assert math.exp(-model.coefficients[0] / model.std[0]) == pytest.approx(4.82, abs=0.01)


ROSSI = {
    "fin": (-0.37942, 0.19138),
    "age": (-0.05744, 0.02200),
    "race": (0.31390, 0.30799),
    "wexp": (-0.14980, 0.21222),
    "mar": (-0.43370, 0.38187),
    "paro": (-0.08487, 0.19576),
    "prio": (0.09150, 0.02865),
}
"""Coefficient and standard error by R's coxph: Fox and Weisberg, Cox proportional-hazards regression for survival data
in R, 2011 (recidivism of 432 men, Rossi et al. 1980)."""


@pytest.fixture
def rossi(tmp_path: Path) -> Path:
    from lifelines.datasets import load_rossi

    path = tmp_path / "rossi.csv"
    load_rossi().to_csv(path, index=False)
    return path


def test_coefficients_of_r_and_the_whole_verb(rossi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["survival", str(rossi), "--time", "week", "--event", "arrest", "-o", str(out)])
    with (out / "cox.csv").open(newline="") as file:
        rows = {row["feature"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(ROSSI)
    for name, (coefficient, error) in ROSSI.items():
        row = {key: float(value) for key, value in rows[name].items() if key != "feature"}
        assert row["coefficient"] == pytest.approx(coefficient, abs=6e-6)
        assert row["hazard_ratio"] == pytest.approx(math.exp(coefficient * row["std"]), rel=1e-4)
        half = math.log(row["high"] / row["low"]) / 2 / row["std"]
        assert half == pytest.approx(1.96 * error, rel=2e-3)
    summary = json.loads((out / "survival.json").read_text())
    assert summary["c_index_of_training_data"]["mean"] == pytest.approx(0.640, abs=5e-4)  # R's concordance
    unseen = summary["c_index_cross_validated"]
    assert unseen["low"] < unseen["mean"] < summary["c_index_of_training_data"]["mean"]
    assert summary["penalty"] == 0
    # Fox and Weisberg: age (and with it the global test) breaks the assumption
    assert float(rows["age"]["proportional_p"]) < 0.01 < float(rows["prio"]["proportional_p"])
    said = capsys.readouterr().out
    assert "cross-validated" in said and "too good" in said
    with (out / "risk.csv").open(newline="") as file:
        risks = list(csv.DictReader(file))
    assert {row["group"] for row in risks} == {"low risk", "high risk"}
    for picture in ("kaplan_meier.png", "hazard_ratios.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_c_index_of_five_by_hand() -> None:
    """Pairs: (1,2) (1,3) (1,4) (1,5) (3,4) (3,5) (4,5), for 2 is censored and 5 the last; 5 of 7 are right."""
    time = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    event = np.array([True, False, True, True, True])
    risk = np.array([4.0, 9.0, 3.0, 1.0, 2.0])
    found = concordance(time, event, risk)
    assert found.mean == pytest.approx(5 / 7)
    assert concordance(time, event, np.zeros(5)).mean == 0.5
    assert concordance(time, event, -time).mean == 1


def test_c_index_of_ties_by_hand() -> None:
    time = np.array([2.0, 2.0, 2.0, 3.0])
    event = np.array([True, True, False, False])
    # Both events against the censored one of the same time and against the last: 4 pairs; not against each other
    found = concordance(time, event, np.array([5.0, 1.0, 2.0, 1.0]))
    assert found.mean == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_c_index_is_lifelines() -> None:
    from lifelines.utils import concordance_index

    rng = np.random.default_rng(0)
    time, event = rng.integers(1, 20, 150).astype(float), rng.random(150) < 0.6
    risk = rng.integers(0, 8, 150).astype(float)
    assert concordance(time, event, risk).mean == pytest.approx(concordance_index(time, -risk, event), abs=2e-2)
    distinct = rng.permutation(150).astype(float)
    ours = concordance(distinct, event, risk).mean
    assert ours == pytest.approx(concordance_index(distinct, -risk, event), abs=1e-6)


def test_interval_of_the_c_index_covers_and_knows_patients() -> None:
    cohort = made_up(120, 1)
    found = concordance(cohort.time, cohort.event, cohort.values[:, 0])
    assert 0.5 < found.low < found.mean < found.high < 1
    assert found.num_patients == 120
    twice = [np.concatenate([a, a]) for a in (cohort.time, cohort.event, cohort.values[:, 0])]
    paired = concordance(*twice, [*cohort.ids, *cohort.ids])
    assert paired.high - paired.low > 0.9 * (found.high - found.low)  # copies of patients are no new patients
    assert math.isnan(concordance(cohort.time, np.zeros(120, dtype=bool), cohort.values[:, 0]).mean)


def test_cross_validation_tells_noise_from_signal() -> None:
    """40 features of noise fit 60 patients well, and tell nothing about others."""
    from medseg.survival.analysis import analyse

    noise = analyse(made_up(60, 40, effect=0.0), num_folds=4, penalty=0.1)
    assert noise.apparent.mean > 0.68
    assert noise.cross_validated.mean < 0.62
    signal = analyse(made_up(150, 3), num_folds=4)
    assert signal.cross_validated.mean > 0.7
    assert signal.logrank_p < 0.001
    assert signal.effects[0].low > 1
    assert len(signal.curves) == 2


def test_penalty_is_chosen_where_features_are_many() -> None:
    from medseg.survival import cox

    assert cox.chosen_penalty(made_up(150, 3)) == 0
    noise = cox.chosen_penalty(made_up(50, 12, effect=0.0), num_folds=3)
    signal = cox.chosen_penalty(made_up(50, 12, effect=2.0), num_folds=3)
    assert 0 < signal < noise


def test_no_patient_is_in_two_folds() -> None:
    from medseg.survival import cox

    base = made_up(60, 1)
    patients = [f"p{i // 2}" for i in range(60)]
    cohort = cohort_of(base.time, base.event, base.values, patients)
    folds = cox.folds_of(cohort, 5, 0)
    assert sorted(int(i) for fold in folds for i in fold) == list(range(60))
    owners = [{patients[i] for i in fold} for fold in folds]
    assert not any(a & b for n, a in enumerate(owners) for b in owners[n + 1 :])


def test_partial_likelihood_is_lifelines() -> None:
    from medseg.survival import cox

    cohort = made_up(80, 2)
    model = cox.fit(cohort)
    found = cox.log_likelihood(cohort, model.risk(cohort.values), np.arange(80))
    assert found == pytest.approx(float(model.fitter.log_likelihood_), rel=1e-9)


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_the_fast_ridge_is_lifelines_ridge(penalty: float) -> None:
    from medseg.survival import cox

    cohort = made_up(70, 4)
    rows = np.arange(10, 70)
    ours, theirs = cox.ridge_risk(cohort, rows, penalty), cox.fit(cohort, rows, penalty=penalty).risk(cohort.values)
    np.testing.assert_allclose(ours - ours.mean(), theirs - theirs.mean(), atol=0.02 * np.ptp(theirs))


def test_derivative_of_the_likelihood_with_ties() -> None:
    from medseg.survival.cox import _likelihood

    rng = np.random.default_rng(0)
    time, event, risk = rng.integers(1, 6, 20).astype(float), rng.random(20) < 0.6, rng.normal(size=20)
    _, slope = _likelihood(time, event, risk)
    for i in range(20):
        step = np.eye(20)[i] * 1e-5
        change = _likelihood(time, event, risk + step)[0] - _likelihood(time, event, risk - step)[0]
        assert slope[i] == pytest.approx(change / 2e-5, abs=1e-6)


def test_risk_groups_are_equal_in_size() -> None:
    from medseg.survival.cox import quantile_groups

    assert np.bincount(quantile_groups(np.arange(9.0), 3)).tolist() == [3, 3, 3]
    assert quantile_groups([1.0, 5.0], 2).tolist() == [0, 1]


def table(path: Path, text: str) -> Path:
    path.write_text(re.sub(r" +", "", text.strip().replace("\n        ", "\n")) + "\n")
    return path


def test_features_and_outcomes_are_joined_by_case(tmp_path: Path) -> None:
    features = table(
        tmp_path / "features.csv",
        """case,patient,label,voxels,missing,shape_volume,glcm_contrast,edge_points
        a,p1,tumour,10,,5,0.5,3
        a,p1,liver,90,,50,0.7,3
        b,p2,tumour,20,,7,0.1,3
        c,p3,tumour,0,empty,,,
        d,p4,tumour,30,,9,0.2,3""",
    )
    outcomes = table(
        tmp_path / "outcomes.csv",
        """case,months,died,centre
        a,3,yes,Basel
        b,5,no,Bern
        c,2,1,Bern
        d,,0,Bern
        z,1,1,Bern""",
    )
    found = read_cohort([features, outcomes], time="months", event="died", label="tumour")
    assert found.ids == ("a", "b")
    assert found.patients == ("p1", "p2")
    assert found.features == ("shape_volume", "glcm_contrast")  # no words, nothing that describes, nothing constant
    assert found.event.tolist() == [True, False]
    assert any("2 of 4 rows" in note for note in found.notes)
    only = read_cohort([features, outcomes], time="months", event="died", label="tumour", features=["shape_*"])
    assert only.features == ("shape_volume",)
    with pytest.raises(MedsegError, match="--label") as several:
        read_cohort([features, outcomes], time="months", event="died")
    assert several.value.code is Code.DUPLICATE_ID


def test_a_blank_cell_does_not_hide_what_another_table_says(tmp_path: Path) -> None:
    """`medseg measure` writes a column patient also where nothing tells whose a case is."""
    from medseg.survival import cox

    cases = [f"{p}{side}" for p in range(20) for side in "lr"]
    features = table(
        tmp_path / "f.csv", "\n".join(["case,patient,x,y", *(f"{c},,{n},{n}" for n, c in enumerate(cases))])
    )
    outcomes = table(
        tmp_path / "o.csv",
        "\n".join(["case,patient,t,e,y", *(f"{c},p{c[:-1]},{n + 1},1,9" for n, c in enumerate(cases))]),
    )
    found = read_cohort([features, outcomes], time="t", event="e")
    assert found.patients == tuple(f"p{c[:-1]}" for c in cases)
    assert found.features == ("x", "y") and found.values[3].tolist() == [3, 3]  # and a filled one stands
    assert not found.notes
    for fold in cox.folds_of(found, 5, 0):
        assert len(fold) == 2 * len({found.patients[i] for i in fold})  # both sides of a patient in one


def test_rows_without_a_partner_are_counted(tmp_path: Path) -> None:
    features = table(tmp_path / "f.csv", "case,x\na,1\nb,2\nc,3\n,4\n,5")
    outcomes = table(tmp_path / "o.csv", "case,t,e\na,1,1\nc,2,1\nz,3,1\n,9,1")
    found = read_cohort([features, outcomes], time="t", event="e")
    assert found.ids == ("a", "c")
    assert found.notes == (
        "3 of 5 rows of f.csv have no case in o.csv and are left out",
        "2 of 4 rows of o.csv have no case in f.csv and are left out",
    )


def test_tables_of_one_file_name_are_told_apart(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first = table(tmp_path / "a" / "p.csv", "patient,x\np1,1\np1,2\np2,3")
    second = table(tmp_path / "b" / "p.csv", "patient,t,e\np1,1,1\np1,2,1\np2,3,1")
    with pytest.raises(MedsegError, match="several rows are of one patient") as refused:
        read_cohort([first, second], time="t", event="e")
    assert refused.value.code is Code.DUPLICATE_ID and "b/p.csv" in str(refused.value)
    table(second, "patient,t,e\np1,1,1\np2,3,1")
    assert read_cohort([first, second], time="t", event="e").patients == ("p1", "p1", "p2")
    with pytest.raises(MedsegError, match="'x'") as missing:
        read_cohort([first, second], time="t", event="e", key="x")
    assert missing.value.code is Code.MISSING and "b/p.csv" in str(missing.value)


def test_what_stands_beside_an_outcome_is_no_feature_unless_named(tmp_path: Path) -> None:
    features = table(tmp_path / "f.csv", "case,x\na,1\nb,2\nc,5")
    outcomes = table(
        tmp_path / "o.csv", "case,t,e,progression_months,age,centre\na,1,1,1,50,B\nb,2,1,2,61,B\nc,3,1,3,70,C"
    )
    found = read_cohort([features, outcomes], time="t", event="e")
    assert found.features == ("x",)
    (note,) = found.notes
    assert "progression_months, age" in note and "not taken" in note and "--features" in note
    named = read_cohort([features, outcomes], time="t", event="e", features=["x", "age"])
    assert named.features == ("x", "age") and not named.notes
    alone = read_cohort([outcomes], time="t", event="e")
    assert alone.features == ("progression_months", "age")


@pytest.mark.parametrize(
    ("text", "options", "code", "said"),
    [
        ("case,t,e,x\na,1,1,1", {"time": "tt"}, Code.MISSING, "tt"),
        ("case,t,e,x\na,1,1,1", {"features": ["volumes"]}, Code.MISSING, "volumes"),
        ("case,t,e,x\na,-1,1,1", {}, Code.CONFIG, "from 0 on"),
        ("case,t,e,x\na,soon,1,1", {}, Code.CONFIG, "soon"),
        ("case,t,e,x\na,1,2,1", {}, Code.CONFIG, "1 or 0"),
        ("case,t,e,x\na,1,1,inf", {"features": ["x"]}, Code.CONFIG, "finite"),
        ("case,t,e,x\na,1,1,1\na,2,1,2", {}, Code.DUPLICATE_ID, "keep one row"),
        ("case,t,e,x\na,1,1,1\nb,2,1,1", {}, Code.NO_CASES, "varies"),
        ("case,t,e,x\na,,1,1", {}, Code.NO_CASES, "no row"),
        ("case,t,e,x", {}, Code.NO_CASES, "no rows"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, options: dict[str, object], code: Code, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text + "\n")
    with pytest.raises(MedsegError, match=re.escape(said)) as refused:
        read_cohort([path], **({"time": "t", "event": "e"} | options))  # type: ignore[arg-type]
    assert refused.value.code is code


def test_too_few_events_and_features_that_are_sums(tmp_path: Path) -> None:
    from medseg.survival.analysis import analyse

    few = made_up(20, 1)
    few.event[:] = False
    few.event[:3] = True
    with pytest.raises(MedsegError, match="too few events"):
        analyse(few)
    base = made_up(80, 1)
    twice = cohort_of(base.time, base.event, np.repeat(base.values, 2, axis=1))
    with pytest.raises(MedsegError, match="--penalty"):
        analyse(twice, penalty=0.0)
    ridge = analyse(twice, penalty=0.1)
    assert ridge.effects[0].hazard_ratio == pytest.approx(ridge.effects[1].hazard_ratio)


def test_without_lifelines_the_verb_says_what_to_install(
    rossi: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lifelines", None)
    with pytest.raises(SystemExit) as left:
        main(["survival", str(rossi), "--time", "week", "--event", "arrest"])
    assert left.value.code == 2
    assert "medseg[survival]" in capsys.readouterr().err


def test_the_picture_has_the_numbers_at_risk() -> None:
    from medseg.survival.analysis import analyse
    from medseg.survival.figures import at_risk, effects_figure, kaplan_meier_figure

    found = analyse(made_up(90, 2), num_folds=3, num_groups=3)
    figure = kaplan_meier_figure(found, "months")
    curves, table = figure.axes
    assert curves.get_xlabel() == "months"
    assert len(curves.get_legend().get_texts()) == 3
    written = [text.get_text() for text in table.texts]
    for curve in found.curves:
        assert curve.at_risk[0] == 30 and str(at_risk(curve, 0.0)) in written and curve.name in written
        at = float(np.median(found.cohort.time))
        inside = found.groups == [c.name for c in found.curves].index(curve.name)
        assert at_risk(curve, at) == int((found.cohort.time[inside] >= at).sum())
    assert len(effects_figure(found).axes[0].get_yticks()) == 2
