"""Groups of cases dealt onto folds so that each fold gets a like share of everything that tells cases apart.

What belongs together (a patient's cases, neighbouring ids) is one group and stays one. Groups are dealt rarest trait
first, then pairs of them change places for as long as that makes the folds more alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medseg.data.facts import CaseInfo

PRESENCE_WEIGHT = 10.0
"""A fold without a class cannot measure it, a fold with small structures only can: presence goes before volume."""
MAX_SWEEPS = 20
"""Rounds over all groups in which pairs change places; a handful suffice."""
MIN_GAIN = 1e-9
"""Smaller gains are rounding, and would let pairs change places for ever."""


@dataclass(frozen=True)
class Traits:
    """What tells cases apart, by case id.

    Args:
        volumes: volume of each foreground class in any one unit; all of one length. A case that is left out has none.
        strata: site, scanner or whatever a manifest's column says; cases may be left out.
    """

    volumes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    strata: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.volumes) or bool(self.strata)


def class_volumes(infos: Iterable[CaseInfo]) -> dict[str, tuple[float, ...]]:
    """Case id → volume of each class but the background in mm³ (pixels for pictures)."""
    return {
        info.case_id: tuple(voxels * math.prod(info.spacing_mm) for voxels in info.label_voxels[1:]) for info in infos
    }


@dataclass(frozen=True, eq=False)
class _Shares:
    """How much of everything each group holds.

    Args:
        values: shape (groups, columns): the group's share of the column's total; columns are cases, presence of each
            class, each stratum, volume of each class.
        kinds: slice of the columns that count presence (classes and strata).
        weights: of the columns.
    """

    values: NDArray[np.float64]
    kinds: slice
    weights: NDArray[np.float64]


def deal(
    groups: Sequence[Sequence[str]], traits: Traits, num_folds: int, seed: int
) -> tuple[list[tuple[str, ...]], int]:
    """Deal groups of cases onto folds.

    The numbers of groups in two folds differ by one at most. With fewer groups than folds the last folds are empty.

    Args:
        groups: ids of the cases of each group; no id twice.
        traits: what each fold should have a like share of.
        num_folds: folds.
        seed: which of the equally good ways is taken.
    Returns:
        The ids of each fold, sorted; and how often a fold lacks a class or stratum, over all folds.
    Source:
        Sechidis et al., On the stratification of multi-label data, ECML 2011: rarest label first. Here whole groups
        are dealt in turn, and an exchange of pairs afterwards stands for their choice of the neediest fold.
    """
    random = np.random.default_rng(seed)
    shares = _shares(groups, traits)
    present = shares.values[:, shares.kinds] > 0
    holders = np.where(present, present.sum(axis=0), len(groups) + 1)
    rarity = holders.min(axis=1, initial=len(groups) + 1)
    order = np.lexsort((random.permutation(len(groups)), rarity))
    fold_of = np.empty(len(groups), dtype=np.int64)
    fold_of[order] = np.arange(len(groups)) % num_folds
    _exchange(fold_of, shares, order, num_folds)
    totals = _totals(shares.values, fold_of, num_folds)[:, shares.kinds]
    folds = [
        tuple(sorted(i for group, of in zip(groups, fold_of, strict=True) if of == fold for i in group))
        for fold in range(num_folds)
    ]
    return folds, int((totals == 0).sum())


def fewest_lacking(ids: Sequence[str], traits: Traits, num_folds: int) -> int:
    """How often a fold lacks a class or stratum at least, over all folds: three cases are in three folds at most."""
    present = (np.array([traits.volumes[i] for i in ids if i in traits.volumes], dtype=np.float64) > 0).sum(axis=0)
    strata = Counter(traits.strata[i] for i in ids if i in traits.strata)
    holders = [*np.atleast_1d(present).tolist(), *strata.values()]
    return sum(num_folds - count for count in holders if 0 < count < num_folds)


def _shares(groups: Sequence[Sequence[str]], traits: Traits) -> _Shares:
    num_classes = max((len(v) for v in traits.volumes.values()), default=0)
    none = (0.0,) * num_classes
    strata = sorted(set(traits.strata.values()))
    rows = []
    for group in groups:
        volumes = np.array([traits.volumes.get(i, none) for i in group], dtype=np.float64).reshape(
            len(group), num_classes
        )
        of_strata = [sum(traits.strata.get(i) == name for i in group) for name in strata]
        rows.append([len(group), *(volumes > 0).sum(axis=0), *of_strata, *volumes.sum(axis=0)])
    values = np.array(rows, dtype=np.float64).reshape(len(groups), 1 + 2 * num_classes + len(strata))
    totals = values.sum(axis=0)
    kept = totals > 0  # a class that no case has says nothing
    kinds = slice(1, 1 + int(kept[1 : 1 + num_classes + len(strata)].sum()))
    weights = np.full(values.shape[1], PRESENCE_WEIGHT)
    weights[1 + num_classes + len(strata) :] = 1.0
    return _Shares(values[:, kept] / totals[kept], kinds, weights[kept])


def _totals(values: NDArray[np.float64], fold_of: NDArray[np.int64], num_folds: int) -> NDArray[np.float64]:
    totals = np.zeros((num_folds, values.shape[1]))
    np.add.at(totals, fold_of, values)
    return totals


def _exchange(fold_of: NDArray[np.int64], shares: _Shares, order: NDArray[np.int64], num_folds: int) -> None:
    """Let pairs of groups change places, in place, while the folds' shares come closer to 1 / num_folds.

    The measure is the weighted sum of squares of all shares; d moved from fold h to fold f changes it by
    2 d (F_f - F_h) + 2 d² in each column.
    """
    values, weights = shares.values, shares.weights
    totals = _totals(values, fold_of, num_folds)
    for _ in range(MAX_SWEEPS):
        found = False
        for group in order:
            home = fold_of[group]
            others = np.flatnonzero(fold_of != home)
            if not len(others):
                return
            moved = values[others] - values[group]
            change = (moved * (totals[home] - totals[fold_of[others]]) + moved**2) @ weights
            best = int(change.argmin())
            if change[best] < -MIN_GAIN:
                other = others[best]
                totals[home] += moved[best]
                totals[fold_of[other]] -= moved[best]
                fold_of[group], fold_of[other] = fold_of[other], home
                found = True
        if not found:
            return
