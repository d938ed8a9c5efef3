from __future__ import annotations

from pathlib import Path

import pytest

from medseg.data.layouts import Case
from medseg.data.splits import Split, SplitConfig, make_split, patients_of, read_split, write_split
from medseg.errors import Code, MedsegError


def make_cases(*ids: str, patients: str | None = None, splits: list[str | None] | None = None) -> list[Case]:
    return [
        Case(
            name,
            (Path(f"{name}.nii"),),
            None,
            patient=patients[k] if patients else None,
            split=splits[k] if splits else None,
        )
        for k, name in enumerate(ids)
    ]


def refused(code: Code, cases: list[Case], config: SplitConfig) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        make_split(cases, config, 0)
    assert caught.value.code == code, caught.value
    return caught.value


NUMBERED = make_cases(*(f"c{n:02d}" for n in range(20)))


def test_folds_of_blocks_are_neighbours_and_cover_every_case_once() -> None:
    seen: list[str] = []
    for fold in range(4):
        split = make_split(list(reversed(NUMBERED)), SplitConfig(fold=fold, num_folds=4), seed=3)
        numbers = [int(i[1:]) for i in split.val]
        assert numbers == list(range(numbers[0], numbers[0] + 5))
        assert sorted(split.train + split.val) == [c.case_id for c in NUMBERED]
        assert split.test == ()
        seen += split.val
    assert sorted(seen) == [c.case_id for c in NUMBERED]
    assert "block" in split.rule
    assert "one person" in split.rule


def test_the_seed_decides_and_nothing_else() -> None:
    by_seed = [make_split(NUMBERED, SplitConfig(), seed) for seed in range(6)]
    assert by_seed[2] == make_split(NUMBERED[::-1], SplitConfig(), 2)
    assert len({split.val for split in by_seed}) > 1


PEOPLE = make_cases(*(f"c{n:02d}" for n in range(20)), patients="AABBCCDDEEFFGGHHAABB")


def test_patients_stay_together() -> None:
    patient = {c.case_id: c.patient for c in PEOPLE}
    seen: list[str] = []
    for fold in range(4):
        split = make_split(PEOPLE, SplitConfig(fold=fold, num_folds=4), seed=1)
        assert not {patient[i] for i in split.train} & {patient[i] for i in split.val}
        assert len({patient[i] for i in split.val}) == 2
        seen += split.val
    assert sorted(seen) == [c.case_id for c in PEOPLE]
    assert "by patient (8 patients" in split.rule
    assert len({make_split(PEOPLE, SplitConfig(), seed).val for seed in range(6)}) > 1


def test_patients_from_bids_names() -> None:
    bids = make_cases("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1", "sub-03")
    assert patients_of(bids) == {
        "sub-01_ses-1": "sub-01",
        "sub-01_ses-2": "sub-01",
        "sub-02_ses-1": "sub-02",
        "sub-03": "sub-03",
    }
    assert set(patients_of(make_cases("sub-01_ses-1", "sub-02_ses-1", patients="PP")).values()) == {"P"}
    assert patients_of([*bids, *make_cases("other")]) == {}
    assert "by patient" in make_split(bids, SplitConfig(num_folds=3), 0).rule


def test_blocks_that_would_cut_a_patient_are_a_leak() -> None:
    error = refused(Code.LEAK, PEOPLE, SplitConfig(by="block", num_folds=7))
    assert "by=patient" in str(error.remedy)
    partly = [*PEOPLE, *make_cases("d00")]
    refused(Code.LEAK, partly, SplitConfig(num_folds=7))
    assert refused(Code.CONFIG, partly, SplitConfig(by="patient")).where == "d00"


def test_the_manifest_decides() -> None:
    cases = make_cases("a", "b", "c", "d", splits=["val", "train", "test", "train"])
    split = make_split(cases, SplitConfig(validation=("b",)), 0)
    assert (split.train, split.val, split.test) == (("b", "d"), ("a",), ("c",))
    assert "manifest" in split.rule


def test_a_manifest_that_marks_test_cases_only() -> None:
    cases = make_cases("a", "b", "c", "d", splits=[None, None, "test", None])
    split = make_split(cases, SplitConfig(num_folds=3), 0)
    assert split.test == ("c",)
    assert sorted(split.train + split.val) == ["a", "b", "d"]
    assert len(split.val) == 1
    assert "test cases by the manifest" in split.rule


def test_a_split_column_with_gaps_is_refused() -> None:
    cases = make_cases("a", "b", "c", splits=["train", None, "val"])
    assert refused(Code.CONFIG, cases, SplitConfig()).where == "b"


def test_explicit_ids_and_patterns() -> None:
    cases = make_cases("s1_a", "s1_b", "s2_a", "x[1]", "x1")
    assert make_split(cases, SplitConfig(validation=("s1_*", "x[1]")), 0).val == ("s1_a", "s1_b", "x[1]")
    error = refused(Code.CONFIG, cases, SplitConfig(validation=("s1a",)))
    assert "'s1_a'" in str(error.remedy)


@pytest.mark.parametrize(
    ("cases", "config"),
    [
        (make_cases("a", "b", "c", patients="PQP", splits=["train", "train", "val"]), SplitConfig()),
        (make_cases("a", "b", "c", patients="PQP", splits=["test", "train", "val"]), SplitConfig()),
        (make_cases("a", "b", "c", patients="PQP"), SplitConfig(validation=("a",))),
        (make_cases("sub-1_a", "sub-2_a", "sub-1_b"), SplitConfig(validation=("sub-1_a",))),
    ],
    ids=["manifest", "test", "explicit", "bids"],
)
def test_a_patient_on_two_sides_is_refused_by_name(cases: list[Case], config: SplitConfig) -> None:
    error = refused(Code.LEAK, cases, config)
    assert error.where in ("P", "sub-1")
    assert all(c.case_id in str(error.got) for c in (cases[0], cases[2]))


@pytest.mark.parametrize(
    ("cases", "config", "side", "remedy"),
    [
        (NUMBERED[:3], SplitConfig(fold=4), "validation", "data.split.fold=4 must be less"),
        (NUMBERED[:1], SplitConfig(), "training", "at least two"),
        (PEOPLE[:2], SplitConfig(by="patient"), "training", "at least two"),
        (make_cases("a", "b", splits=["train", "train"]), SplitConfig(), "validation", "manifest"),
        (NUMBERED[:3], SplitConfig(validation=("*",)), "training", "data.split.validation must name some"),
        (NUMBERED[:3], SplitConfig(validation=()), "validation", "data.split.validation must name some"),
    ],
)
def test_an_empty_side_is_refused(cases: list[Case], config: SplitConfig, side: str, remedy: str) -> None:
    error = refused(Code.NO_CASES, cases, config)
    assert side in error.message
    assert remedy in str(error.remedy)


def test_what_is_said_of_an_empty_side_reads_well() -> None:
    got = refused(Code.NO_CASES, make_cases("a", patients="P"), SplitConfig()).got
    assert str(got).startswith("1 case, 0 more for test, divided by patient (1 patient shuffled")


@pytest.mark.parametrize("fold", range(5))
def test_folds_that_there_are_no_patients_for(fold: int) -> None:
    two = make_cases("a", "b", "c", patients="PQQ")
    if fold < 2:
        assert make_split(two, SplitConfig(fold=fold), 0).val in (("a",), ("b", "c"))
    else:
        assert f"fold={fold} must be less than" in str(refused(Code.NO_CASES, two, SplitConfig(fold=fold)).remedy)


def test_two_cases_are_enough_for_the_first_fold() -> None:
    split = make_split(NUMBERED[:2], SplitConfig(), 0)
    assert (len(split.train), len(split.val)) == (1, 1)


@pytest.mark.parametrize(("fold", "num_folds"), [(5, 5), (-1, 5), (0, 1)])
def test_folds_that_do_not_exist(fold: int, num_folds: int) -> None:
    with pytest.raises(MedsegError, match="no such fold"):
        SplitConfig(fold=fold, num_folds=num_folds)


def test_a_split_is_read_back(tmp_path: Path) -> None:
    split = Split(("ä", "b"), ("c",), (), "by hand")
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", Code.CONFIG),
        ("[]", Code.CONFIG),
        ('{"train": ["a"], "val": "b", "test": [], "rule": ""}', Code.CONFIG),
        ('{"train": ["a"], "val": ["a"], "test": [], "rule": ""}', Code.LEAK),
    ],
)
def test_files_that_are_no_split(tmp_path: Path, text: str, code: Code) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(MedsegError) as caught:
        read_split(tmp_path / "split.json")
    assert caught.value.code == code
    with pytest.raises(MedsegError, match="E_MISSING"):
        read_split(tmp_path / "absent.json")
