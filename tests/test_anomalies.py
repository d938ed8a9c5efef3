"""Cases that are unlike the rest are named with what is unlike; sets that are merely varied are not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from medseg.data.anomalies import find_anomalies
from medseg.data.facts import Anomaly, CaseInfo, ChannelStats
from medseg.labels import Labels

LABELS = Labels(("background", "liver", "tumour"), ((0,), (1,), (2,)))


def usual(num_cases: int = 12) -> list[CaseInfo]:
    """Cases as they are: nothing is exactly the same."""
    rng = np.random.default_rng(0)
    cases = []
    for number in range(num_cases):
        middle = 100 + 5 * rng.normal()
        stats = ChannelStats(0, 300, middle, 40.0, middle - 80, middle, middle + 90, 1000)
        size = int(1000 * np.exp(0.3 * rng.normal()))
        shape = (100 + number, 120, 60 - number % 3)
        cases.append(
            CaseInfo(f"case{number:02}", shape, (1.0, 1.0, 2.5), "RAS", "MR", (90_000, size, 300), (stats,), shape)
        )
    return cases


def found(cases: list[CaseInfo]) -> dict[str, str]:
    return {a.case_id: "; ".join(a.reasons) for a in find_anomalies(cases, LABELS, ("T1",))}


def changed(**changes: object) -> dict[str, str]:
    cases = usual()
    cases[4] = dataclasses.replace(cases[4], **changes)  # type: ignore[arg-type]
    return found(cases)


def test_a_varied_set_has_none() -> None:
    assert find_anomalies(usual(), LABELS, ("T1",)) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_voxels": (90_000, 0, 0)}, "the label is empty"),
        ({"label_voxels": (90_000, 0, 300)}, "liver is missing, which 100% of the others have"),
        ({"label_voxels": (90_000, 50_000, 300)}, "liver has 125 ml"),
        ({"spacing_mm": (1.0, 1.0, 7.0)}, "voxels of 7 mm (head to foot), the median is 2.5"),
        ({"shape": (700, 120, 60)}, "a field of view of 700 mm (side to side)"),
        (
            {"intensity": (ChannelStats(0, 9000, 5000, 40, 4900, 5000, 5100, 1000),)},
            "intensity of its structures in T1",
        ),
    ],
)
def test_one_case_that_is_unlike_the_rest(changes: dict[str, object], said: str) -> None:
    ((case_id, reasons),) = changed(**changes).items()
    assert case_id == "case04" and said in reasons


def test_another_orientation_is_none() -> None:
    cases = usual()
    turned = cases[4]
    cases[4] = dataclasses.replace(
        turned, orientation="SRA", shape=(turned.shape[2], *turned.shape[:2]), spacing_mm=(2.5, 1.0, 1.0)
    )
    assert found(cases) == {}


def test_a_group_has_one_row() -> None:
    """Another scanner: a quarter of the cases has other intensities."""
    cases = usual(20)
    for number in range(5):
        stats = ChannelStats(0, 9000, 5000, 40, 4900, 5000, 5100, 1000)
        cases[number] = dataclasses.replace(cases[number], intensity=(stats,))
    (group,) = find_anomalies(cases, LABELS, ("T1",))
    assert (
        group.case_id == "5 cases" and "case00" in group.reasons[0] and "unusual intensities in T1" in group.reasons[0]
    )


def test_several_reasons_stand_in_one_row_and_few_cases_are_not_compared() -> None:
    said = changed(label_voxels=(90_000, 0, 0), spacing_mm=(1.0, 1.0, 9.0))
    assert "the label is empty; voxels of 9 mm" in said["case04"]
    few = usual(4)
    few[0] = dataclasses.replace(few[0], label_voxels=(90_000, 50_000, 0))
    assert found(few) == {}
    few[0] = dataclasses.replace(few[0], label_voxels=(90_000, 0, 0))
    assert find_anomalies(few, LABELS, ("T1",)) == (Anomaly("case00", ("the label is empty",)),)
