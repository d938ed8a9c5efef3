"""Cox's proportional hazards model, by lifelines: fitting, how much to penalise, cross-validated risk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.survival.data import Cohort

EVENTS_PER_FEATURE = 10
"""With fewer, coefficients without a penalty are unstable (Peduzzi et al., Journal of Clinical Epidemiology 1995)."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge penalties that are tried: of the mean log partial likelihood, on standardised features."""
MIN_EVENTS = 3
"""Fewer events than this tell nothing."""

FloatArray = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CoxModel:
    """A fitted model.

    Args:
        coefficients: log hazard ratio for one standard deviation of each feature, shape (features,).
        standard_errors: of the coefficients; with a penalty they are those of the penalised likelihood.
        p: of Wald's tests of the coefficients.
        mean: of the features in the data that it was fitted to.
        std: standard deviation of them (population), 1 where there is none.
        penalty: ridge.
        fitter: lifelines' own.
        frame: the table that it was fitted to.
    """

    coefficients: FloatArray
    standard_errors: FloatArray
    p: FloatArray
    mean: FloatArray
    std: FloatArray
    penalty: float
    fitter: Any
    frame: Any

    def risk(self, values: FloatArray) -> FloatArray:
        """Log hazard relative to somebody with the mean features, shape (n,)."""
        risk: FloatArray = ((values - self.mean) / self.std) @ self.coefficients
        return risk


def lifelines() -> Any:
    """The library.

    Raises:
        MedsegError: E_CONFIG if it is not installed.
    """
    try:
        import lifelines as library
    except ImportError as error:
        raise MedsegError(
            Code.CONFIG,
            "lifelines is not installed",
            where="medseg survival",
            got=error,
            remedy="python -m pip install 'medseg[survival]'",
        ) from error
    return library


def fit(cohort: Cohort, rows: Rows | None = None, *, penalty: float = 0.0) -> CoxModel:
    """Fit to a cohort or some rows of it; ties by Efron's method.

    Raises:
        MedsegError: E_CONFIG if there are too few events, or no maximum is found.
    """
    import pandas as pd

    library = lifelines()
    rows = np.arange(len(cohort.ids)) if rows is None else rows
    time, event, values = cohort.time[rows], cohort.event[rows], cohort.values[rows]
    if event.sum() < MIN_EVENTS:
        raise MedsegError(
            Code.CONFIG, "there are too few events for a model", expected=f"at least {MIN_EVENTS}",
            got=int(event.sum()), remedy="add patients, or take fewer folds: --folds",
        )  # fmt: skip
    mean, std = values.mean(axis=0), values.std(axis=0)
    varies = std > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    std = np.where(varies, std, 1.0)
    used = np.flatnonzero(varies)
    frame = pd.DataFrame(((values - mean) / std)[:, used], columns=[str(i) for i in used])
    frame["time"], frame["event"] = time, event
    fitter = library.CoxPHFitter(penalizer=penalty)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitter.fit(frame, "time", "event")
    except (library.exceptions.ConvergenceError, np.linalg.LinAlgError, ValueError) as error:
        raise MedsegError(
            Code.CONFIG,
            "the Cox model has no maximum",
            expected="features that are not sums of each other, and that do not part events from survivors completely",
            got=str(error).splitlines()[0],
            remedy="take fewer --features, or --penalty 0.1",
        ) from error
    coefficients, errors, p = np.zeros((3, len(mean)))
    coefficients[used] = fitter.params_.to_numpy()
    errors[used] = fitter.standard_errors_.to_numpy()
    p[:] = np.nan
    p[used] = fitter.summary["p"].to_numpy()
    return CoxModel(coefficients, errors, p, mean, std, penalty, fitter, frame)


def folds_of(cohort: Cohort, num_folds: int, seed: int, rows: Rows | None = None) -> list[Rows]:
    """Rows of each of a number of folds: a patient's rows stay together, patients with an event are spread evenly."""
    rows = np.arange(len(cohort.ids)) if rows is None else rows
    patients = np.asarray(cohort.patients)[rows]
    rng = np.random.default_rng(seed)
    names = np.unique(patients)
    rng.shuffle(names)
    with_event = {str(p) for p in np.unique(patients[cohort.event[rows]])}
    ordered = sorted(names, key=lambda name: str(name) not in with_event)
    fold_of = {str(name): number % num_folds for number, name in enumerate(ordered)}
    number = np.asarray([fold_of[str(p)] for p in patients])
    return [rows[number == fold] for fold in range(num_folds) if (number == fold).any()]


def chosen_penalty(cohort: Cohort, rows: Rows | None = None, *, num_folds: int = 5, seed: int = 0) -> float:
    """How much to penalise: nothing with `EVENTS_PER_FEATURE`, else what cross-validation likes best.

    Source:
        Verweij and van Houwelingen, Cross-validation in survival analysis, Statistics in Medicine 1993: the log partial
        likelihood of all less that of those fitted to, summed over the folds.
    """
    rows = np.arange(len(cohort.ids)) if rows is None else rows
    if cohort.event[rows].sum() >= EVENTS_PER_FEATURE * len(cohort.features):
        return 0.0
    scores = {}
    for penalty in PENALTIES:
        total = 0.0
        for fold in folds_of(cohort, num_folds, seed, rows):
            training = np.setdiff1d(rows, fold)
            risk = ridge_risk(cohort, training, penalty)
            total += log_likelihood(cohort, risk, rows) - log_likelihood(cohort, risk, training)
        scores[penalty] = total
    return max(PENALTIES, key=lambda penalty: scores[penalty])


def ridge_risk(cohort: Cohort, rows: Rows, penalty: float) -> FloatArray:
    """The log hazard of all rows by a penalised model of some of them, up to a constant.

    It is what `fit` gives but for ties (Breslow's method), without intervals and tests, and many times faster: choosing
    a penalty takes hundreds of models.

    Args:
        cohort: all rows.
        rows: those that are fitted to.
        penalty: positive.
    """
    from scipy.optimize import minimize

    mean, std = cohort.values[rows].mean(axis=0), cohort.values[rows].std(axis=0)
    values = (cohort.values - mean) / np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-300), std, np.inf)

    def loss(coefficients: FloatArray) -> tuple[float, FloatArray]:
        value, slope = _likelihood(cohort.time[rows], cohort.event[rows], values[rows] @ coefficients)
        penalised = -value / len(rows) + penalty / 2 * float(coefficients @ coefficients)
        return penalised, -values[rows].T @ slope / len(rows) + penalty * coefficients

    found = minimize(loss, np.zeros(values.shape[1]), jac=True, method="L-BFGS-B")
    risk: FloatArray = values @ found.x
    return risk


def log_likelihood(cohort: Cohort, risk: FloatArray, rows: Rows) -> float:
    """Cox's log partial likelihood of risks, ties by Breslow's method.

    Args:
        cohort: whose times.
        risk: log hazard of all rows of the cohort.
        rows: those that count.
    """
    return _likelihood(cohort.time[rows], cohort.event[rows], risk[rows])[0]


def _likelihood(time: FloatArray, event: NDArray[np.bool_], risk: FloatArray) -> tuple[float, FloatArray]:
    """The log partial likelihood, and its derivative by the risk of each row."""
    order = np.argsort(-time, kind="stable")
    time, event, risk = time[order], event[order], risk[order]
    last = np.searchsorted(-time, -time, side="right") - 1  # all of the same time are at risk together
    at_risk = np.logaddexp.accumulate(risk)[last]
    first = np.searchsorted(-time, -time, side="left")
    # Each row is at risk at every event of its own time or before: those stand from `first` on
    shares = np.where(event, np.exp(-at_risk + risk.max()), 0.0)
    of_later = np.cumsum(shares[::-1])[::-1][first] * np.exp(risk - risk.max())
    slope = np.empty_like(risk)
    slope[order] = event - of_later
    return float((risk - at_risk)[event].sum()), slope


def cross_validated_risk(
    cohort: Cohort, *, penalty: float | None, num_folds: int, seed: int
) -> tuple[FloatArray, list[float]]:
    """The risk of each row by a model that has not seen its patient.

    Args:
        cohort: all rows.
        penalty: ridge; None chooses it anew for each fold, without the fold.
        num_folds: number of folds.
        seed: of their drawing.
    Returns:
        Log hazards relative to the mean of each training part, shape (n,), and the penalties of the folds.
    Raises:
        MedsegError: as `fit`.
    """
    risk = np.full(len(cohort.ids), np.nan)
    penalties = []
    everything = np.arange(len(cohort.ids))
    for fold in folds_of(cohort, num_folds, seed):
        training = np.setdiff1d(everything, fold)
        chosen = chosen_penalty(cohort, training, seed=seed) if penalty is None else penalty
        risk[fold] = fit(cohort, training, penalty=chosen).risk(cohort.values[fold])
        penalties.append(chosen)
    return risk, penalties


def proportional_hazards_p(model: CoxModel, num_features: int) -> FloatArray:
    """p of the test that a feature's effect does not change over time, NaN where it was not fitted.

    Source:
        Grambsch and Therneau, Proportional hazards tests and diagnostics based on weighted residuals, Biometrika 1994,
        over the ranks of the times.
    """
    from lifelines.statistics import proportional_hazard_test

    p = np.full(num_features, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = proportional_hazard_test(model.fitter, model.frame, time_transform="rank").summary
    for name, value in zip(summary.index, summary["p"], strict=True):
        p[int(name)] = float(value)
    return p


def quantile_groups(risk: Sequence[float] | FloatArray, num_groups: int) -> NDArray[np.int64]:
    """0 for the lowest risks, …, num_groups - 1 for the highest; groups are as equal in size as ties let them be."""
    values = np.asarray(risk, dtype=np.float64)
    edges = np.quantile(values, np.arange(1, num_groups) / num_groups)
    return np.searchsorted(edges, values, side="left")
