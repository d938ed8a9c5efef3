"""The whole of `medseg survival`: model, C-indices, risk groups, and the files that hold them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg import __version__
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import make_folder, whole_file
from medseg.statistics import LEVEL, Interval
from medseg.survival import cox
from medseg.survival.concordance import concordance
from medseg.survival.data import Cohort

GROUP_NAMES = {2: ("low risk", "high risk"), 3: ("low risk", "middle risk", "high risk")}
NORMAL = 1.959964
"""Quantile of the normal distribution behind 95 % intervals."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What the model says of one feature.

    Args:
        feature: its name.
        coefficient: log hazard ratio per unit.
        std: standard deviation of the feature.
        hazard_ratio: for one standard deviation more.
        low: lower end of its 95 % interval.
        high: upper end.
        p: of Wald's test.
        proportional_p: of the test that the effect does not change over time; a small one means that it does.
    """

    feature: str
    coefficient: float
    std: float
    hazard_ratio: float
    low: float
    high: float
    p: float
    proportional_p: float


@dataclass(frozen=True)
class Curve:
    """Kaplan–Meier estimate of one risk group.

    Args:
        name: of the group.
        times: at which the estimate changes or somebody is censored, from 0 on.
        survival: share without the event after each of them.
        low: lower end of the 95 % interval (Greenwood, log-log).
        high: upper end.
        at_risk: number still observed just before each of them.
        events: number of events at each of them.
        censored: number censored at each of them.
    """

    name: str
    times: FloatArray
    survival: FloatArray
    low: FloatArray
    high: FloatArray
    at_risk: NDArray[np.int64]
    events: NDArray[np.int64]
    censored: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found.

    Args:
        cohort: in whom.
        effects: one for each feature, of the model that was fitted to all.
        penalty: of that model.
        apparent: C-index of that model in those that it was fitted to: too good.
        cross_validated: C-index of the risks by models that had not seen the patient.
        risk: by the model that was fitted to all.
        unseen_risk: cross-validated.
        groups: of each row, by the cross-validated risk.
        curves: of each group.
        logrank_p: of the test that the groups have one survival.
        fold_penalties: of the models of cross-validation.
    """

    cohort: Cohort
    effects: tuple[Effect, ...]
    penalty: float
    apparent: Interval
    cross_validated: Interval
    risk: FloatArray
    unseen_risk: FloatArray
    groups: NDArray[np.int64]
    curves: tuple[Curve, ...]
    logrank_p: float
    fold_penalties: tuple[float, ...]


def analyse(
    cohort: Cohort, *, penalty: float | None = None, num_folds: int = 5, num_groups: int = 2, seed: int = 0
) -> Analysis:
    """Fit, cross-validate and part into groups.

    Args:
        cohort: as `read_cohort` reads it.
        penalty: ridge; None chooses it (`cox.chosen_penalty`), 0 is none.
        num_folds: of the cross-validation; no more than there are patients with an event.
        num_groups: of risk: 2 or 3.
        seed: of folds and intervals.
    Raises:
        MedsegError: E_CONFIG where there are too few events or patients, or no model can be fitted.
    """
    with_event = len({p for p, e in zip(cohort.patients, cohort.event, strict=True) if e})
    if with_event < cox.MIN_EVENTS + 1:
        raise MedsegError(
            Code.CONFIG, "there are too few events", expected=f"at least {cox.MIN_EVENTS + 1} patients with one",
            got=with_event, remedy="survival cannot be modelled on these data",
        )  # fmt: skip
    num_folds = min(num_folds, with_event)
    chosen = cox.chosen_penalty(cohort, seed=seed) if penalty is None else penalty
    model = cox.fit(cohort, penalty=chosen)
    risk = model.risk(cohort.values)
    unseen, penalties = cox.cross_validated_risk(cohort, penalty=penalty, num_folds=num_folds, seed=seed)
    groups = cox.quantile_groups(unseen, num_groups)
    return Analysis(
        cohort,
        _effects(cohort, model),
        chosen,
        concordance(cohort.time, cohort.event, risk, cohort.patients, seed=seed),
        concordance(cohort.time, cohort.event, unseen, cohort.patients, seed=seed),
        risk,
        unseen,
        groups,
        tuple(
            _curve(cohort, groups == g, GROUP_NAMES[num_groups][g]) for g in range(num_groups) if (groups == g).any()
        ),
        _logrank(cohort, groups),
        tuple(penalties),
    )


def _effects(cohort: Cohort, model: cox.CoxModel) -> tuple[Effect, ...]:
    proportional = cox.proportional_hazards_p(model, len(cohort.features))
    half = NORMAL * model.standard_errors
    return tuple(
        Effect(
            feature,
            float(model.coefficients[i] / model.std[i]),
            float(model.std[i]),
            float(np.exp(model.coefficients[i])),
            float(np.exp(model.coefficients[i] - half[i])),
            float(np.exp(model.coefficients[i] + half[i])),
            float(model.p[i]),
            float(proportional[i]),
        )
        for i, feature in enumerate(cohort.features)
    )


def kaplan_meier(time: FloatArray, event: NDArray[np.bool_], name: str = "all") -> Curve:
    """The Kaplan–Meier estimate, by lifelines.

    Args:
        time: shape (n,), at least one.
        event: shape (n,).
        name: of the group.
    """
    fitter = cox.lifelines().KaplanMeierFitter(alpha=1 - LEVEL).fit(time, event)
    table, interval = fitter.event_table, fitter.confidence_interval_.to_numpy()
    return Curve(
        name,
        table.index.to_numpy(dtype=np.float64),
        fitter.survival_function_.to_numpy()[:, 0],
        interval[:, 0],
        interval[:, 1],
        table["at_risk"].to_numpy(),
        table["observed"].to_numpy(),
        table["censored"].to_numpy(),
    )


def _curve(cohort: Cohort, inside: NDArray[np.bool_], name: str) -> Curve:
    return kaplan_meier(cohort.time[inside], cohort.event[inside], name)


def _logrank(cohort: Cohort, groups: NDArray[np.int64]) -> float:
    if len(np.unique(groups)) < 2:
        return math.nan
    cox.lifelines()
    from lifelines.statistics import multivariate_logrank_test

    return float(multivariate_logrank_test(cohort.time, groups, cohort.event).p_value)


def write_analysis(analysis: Analysis, folder: Path, settings: dict[str, Any]) -> list[str]:
    """Write cox.csv, risk.csv, kaplan_meier.csv, survival.json and the pictures.

    Returns:
        Names of the files.
    Raises:
        MedsegError: E_OUTPUT.
    """
    from medseg.survival.figures import save_effects, save_kaplan_meier

    make_folder(folder)
    cohort = analysis.cohort
    _write_csv(folder / "cox.csv", [asdict(effect) for effect in analysis.effects])
    names = [curve.name for curve in analysis.curves]
    present = sorted(set(analysis.groups.tolist()))
    _write_csv(
        folder / "risk.csv",
        [
            {
                "id": cohort.ids[i],
                "patient": cohort.patients[i],
                "time": cohort.time[i],
                "event": int(cohort.event[i]),
                "risk": analysis.risk[i],
                "risk_cross_validated": analysis.unseen_risk[i],
                "group": names[present.index(int(analysis.groups[i]))],
            }
            for i in range(len(cohort.ids))
        ],
    )
    _write_csv(
        folder / "kaplan_meier.csv",
        [
            {
                "group": c.name,
                "time": t,
                "survival": s,
                "low": low,
                "high": high,
                "at_risk": n,
                "events": e,
                "censored": x,
            }
            for c in analysis.curves
            for t, s, low, high, n, e, x in zip(
                c.times, c.survival, c.low, c.high, c.at_risk, c.events, c.censored, strict=True
            )
        ],
    )
    summary = {
        "medseg": __version__,
        "lifelines": cox.lifelines().__version__,
        "settings": settings,
        "rows": len(cohort.ids),
        "patients": len(set(cohort.patients)),
        "events": int(cohort.event.sum()),
        "features": len(cohort.features),
        "notes": list(cohort.notes),
        "penalty": analysis.penalty,
        "penalties_of_folds": list(analysis.fold_penalties),
        "c_index_of_training_data": asdict(analysis.apparent),
        "c_index_cross_validated": asdict(analysis.cross_validated),
        "logrank_p": None if math.isnan(analysis.logrank_p) else analysis.logrank_p,
    }
    with whole_file(folder / "survival.json", ".json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_kaplan_meier(folder / "kaplan_meier.png", analysis, str(settings.get("time", "time")))
    save_effects(folder / "hazard_ratios.png", analysis)
    return ["cox.csv", "risk.csv", "kaplan_meier.csv", "survival.json", "kaplan_meier.png", "hazard_ratios.png"]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    if not isinstance(value, (float, np.floating)):
        return value
    return "" if math.isnan(value) else f"{value:.9g}"
