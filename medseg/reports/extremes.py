"""The cases that are worth a picture: the worst, the median and the best."""

from __future__ import annotations

import math

from medseg.reports.evaluation import Evaluation

RANKED_BY = "dice"
NUM_WORST = 3
"""Worst cases among many."""
MANY = 6
"""From so many cases on there is more than one worst case."""
_WORST = ("worst", "2nd-worst", "3rd-worst")


def extremes(evaluation: Evaluation) -> dict[str, str]:
    """Role ("worst", "2nd-worst", "median", "best") → case id, by mean Dice over the classes of a case.

    Each case has one role; cases where no class is defined have none. With few cases roles are missing: a single case
    is the worst.
    """
    means = {case: mean for case, mean in evaluation.case_means(RANKED_BY).items() if not math.isnan(mean)}
    ranked = sorted(means, key=lambda case: means[case])
    if not ranked:
        return {}
    places = {role: place for place, role in enumerate(_WORST[: NUM_WORST if len(ranked) >= MANY else 1])}
    places |= {"best": len(ranked) - 1, "median": len(ranked) // 2}
    chosen: dict[int, str] = {}
    for role, place in places.items():
        chosen.setdefault(place, role)
    order = (*_WORST, "median", "best")
    return {role: ranked[place] for place, role in sorted(chosen.items(), key=lambda item: order.index(item[1]))}
