from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg.data.layouts import Case
from medseg.data.manifest import read_manifest
from medseg.data.splits import (
    Split,
    SplitConfig,
    make_split,
    patients_of,
    read_split,
    usable,
    write_split,
    write_splits,
)
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


def refused(code: Code, cases: list[Case], config: SplitConfig, fold: int = 0) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        make_split(cases, config, 0, fold=fold)
    assert caught.value.code == code, caught.value
    return caught.value


NUMBERED = make_cases(*(f"c{n:02d}" for n in range(20)))


def test_folds_of_blocks_are_neighbours_and_cover_every_case_once() -> None:
    seen: list[str] = []
    for fold in range(4):
        split = make_split(list(reversed(NUMBERED)), SplitConfig(num_folds=4), seed=3, fold=fold)
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
        split = make_split(PEOPLE, SplitConfig(num_folds=4), seed=1, fold=fold)
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
    assert refused(Code.CONFIG, partly, SplitConfig(by="patient")).where == "d00"


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_partly_known_patients_stay_together_in_blocks(num_folds: int) -> None:
    """Of A to J, A and B come again at the end; every third case is of somebody unknown."""
    cases = make_cases(
        *(f"c{n:02d}" for n in range(60)), patients="AAABBBCCCDDDEEEFFFGGGHHHIIIJJJKKKLLLMMMNNNOOOPPPQQQAAABBBRRR"
    )
    cases = [replace(case, patient=None) if n % 3 == 1 else case for n, case in enumerate(cases)]
    known = {case.case_id: case.patient for case in cases if case.patient}
    seen: list[str] = []
    for fold in range(num_folds):
        split = make_split(cases, SplitConfig(num_folds=num_folds), seed=1, fold=fold)
        assert not {known.get(i) for i in split.train} & {known.get(i) for i in split.val} - {None}
        assert "known patients stay together" in split.rule and "20 cases" in split.rule
        seen += split.val
    assert sorted(seen) == [case.case_id for case in cases]


def test_no_block_ends_within_a_known_patient() -> None:
    cases = [*make_cases(*(f"c{n:02d}" for n in range(9)), patients="AAAAABCDE"), *make_cases("c09")]
    for fold in range(3):  # blocks of the sorted ids alone would part A
        val = set(make_split(cases, SplitConfig(num_folds=3), seed=0, fold=fold).val)
        assert val >= {f"c0{n}" for n in range(5)} or not val & {f"c0{n}" for n in range(5)}
    error = refused(Code.LEAK, cases, SplitConfig(num_folds=3, by="block"))
    assert "by=patient" in str(error.remedy)


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
def test_a_patient_on_two_sides_is_refused_by_the_cases(cases: list[Case], config: SplitConfig) -> None:
    """A patient's name in a manifest stays there."""
    cases = [replace(case, patient=case.patient and f"Doe^{case.patient}") for case in cases]
    error = refused(Code.LEAK, cases, config)
    assert all(c.case_id in str(error.where) for c in (cases[0], cases[2]))
    assert "Doe" not in str(error) and "manifest" in str(error.remedy)


@pytest.mark.parametrize(
    ("cases", "config", "fold", "side", "remedy"),
    [
        (NUMBERED[:3], SplitConfig(), 4, "validation", "fold=4 must be less"),
        (NUMBERED[:1], SplitConfig(), 0, "training", "at least two"),
        (PEOPLE[:2], SplitConfig(by="patient"), 0, "training", "at least two"),
        (make_cases("a", "b", splits=["train", "train"]), SplitConfig(), 0, "validation", "manifest"),
        (NUMBERED[:3], SplitConfig(validation=("*",)), 0, "training", "data.split.validation must name some"),
        (NUMBERED[:3], SplitConfig(validation=()), 0, "validation", "data.split.validation must name some"),
    ],
)
def test_an_empty_side_is_refused(cases: list[Case], config: SplitConfig, fold: int, side: str, remedy: str) -> None:
    error = refused(Code.NO_CASES, cases, config, fold)
    assert side in error.message
    assert remedy in str(error.remedy)


def test_what_is_said_of_an_empty_side_reads_well() -> None:
    got = refused(Code.NO_CASES, make_cases("a", patients="P"), SplitConfig()).got
    assert str(got).startswith("1 case, 0 more for test, divided by patient (1 patient shuffled")


@pytest.mark.parametrize("fold", range(5))
def test_folds_that_there_are_no_patients_for(fold: int) -> None:
    two = make_cases("a", "b", "c", patients="PQQ")
    if fold < 2:
        assert make_split(two, SplitConfig(), 0, fold=fold).val in (("a",), ("b", "c"))
    else:
        assert f"fold={fold} must be less than" in str(refused(Code.NO_CASES, two, SplitConfig(), fold).remedy)


def test_two_cases_are_enough_for_the_first_fold() -> None:
    split = make_split(NUMBERED[:2], SplitConfig(), 0)
    assert (len(split.train), len(split.val)) == (1, 1)


@pytest.mark.parametrize(
    ("config", "fold"), [(SplitConfig(), 5), (SplitConfig(), -1), (SplitConfig(validation=("c00",)), 1)]
)
def test_folds_that_do_not_exist(config: SplitConfig, fold: int) -> None:
    error = refused(Code.CONFIG, NUMBERED, config, fold)
    assert (error.where, error.got) == ("fold", fold)
    with pytest.raises(MedsegError, match=r"data\.split\.num_folds"):
        SplitConfig(num_folds=1)


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


# stratified folds


def all_folds(cases: list[Case], config: SplitConfig, seed: int, volumes: dict[str, tuple[float, ...]]) -> list[Split]:
    return [make_split(cases, config, seed, fold=k, volumes=volumes) for k in range(config.num_folds)]


def skewed(num_cases: int, seed: int, rare: list[int]) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """Cases with a common class of log-normal volumes, one in every other case, and one in a few."""
    random = np.random.default_rng(seed)
    ids = [f"c{n:02d}" for n in range(num_cases)]
    common = np.exp(random.normal(3, 0.5, num_cases))
    half = random.permutation(num_cases) < num_cases // 2
    return ids, {i: (float(common[n]), 4.0 * half[n], 0.5 * (n in rare)) for n, i in enumerate(ids)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("patients", [True, False])
def test_a_class_of_five_cases_is_once_in_each_fold(patients: bool, seed: int) -> None:
    rare = [2, 3, 4, 31, 44] if patients else [2, 7, 20, 31, 44]  # neighbours may be one person: these stay together
    ids, volumes = skewed(50, seed, rare)
    people = "".join(chr(200 + n) for n in range(50))
    cases = make_cases(*ids, patients=people if patients else None)
    folds = all_folds(cases, SplitConfig(), seed, volumes)
    assert sorted(i for split in folds for i in split.val) == ids
    has = np.array([[sum(volumes[i][k] > 0 for i in split.val) for k in range(3)] for split in folds])
    assert (has[:, 2] == 1).all()
    if patients:
        assert {len(split.val) for split in folds} == {10}
        assert np.ptp(has[:, 1]) <= 1
        of_common = np.array([sum(volumes[i][0] for i in split.val) for split in folds])
        assert np.ptp(of_common) < 0.2 * of_common.mean()
    assert "balanced by classes and volumes" in folds[0].rule


def test_stratified_folds_are_deterministic_and_the_seed_changes_them() -> None:
    ids, volumes = skewed(50, 0, [2, 13, 20, 31, 44])
    cases = make_cases(*ids, patients="".join(chr(200 + n) for n in range(50)))
    for seed in (0, 1):
        folds = all_folds(cases, SplitConfig(), seed, volumes)
        assert folds == all_folds(cases[::-1], SplitConfig(), seed, dict(reversed(volumes.items())))
    assert folds != all_folds(cases, SplitConfig(), 0, volumes)


def test_patients_names_do_not_decide() -> None:
    """Of DICOM they are digests that differ in each process."""
    ids, volumes = skewed(20, 0, [3, 4])
    one = make_cases(*ids, patients="AABBCCDDEEFFGGHHIIJJ")
    other = make_cases(*ids, patients="QQBBZZDDEEXXGGHHKKJJ")
    assert all_folds(one, SplitConfig(), 3, volumes) == all_folds(other, SplitConfig(), 3, volumes)


def test_patients_stay_together_in_stratified_folds() -> None:
    ids, volumes = skewed(20, 1, [0, 1, 2, 16])  # of patients A, A, B, A
    cases = make_cases(*ids, patients="AABBCCDDEEFFGGHHAABB")
    folds = all_folds(cases, SplitConfig(num_folds=4), 0, volumes)
    patient = {case.case_id: case.patient for case in cases}
    for split in folds:
        assert not {patient[i] for i in split.train} & {patient[i] for i in split.val}
    assert sum(any(volumes[i][2] for i in split.val) for split in folds) == 2


def test_blocks_stay_as_large_as_they_can() -> None:
    """Every border between blocks may part two cases of one person."""
    ids, volumes = skewed(40, 0, [])
    everywhere = {i: (v[0], 1.0) for i, v in volumes.items()}
    for split in all_folds(make_cases(*ids), SplitConfig(), 0, everywhere):
        assert split.val == tuple(ids[ids.index(split.val[0]) :][:8])
    five = {i: (1.0, float(n < 8 and n % 2)) for n, i in enumerate(ids)}  # a class in the first block only
    folds = all_folds(make_cases(*ids), SplitConfig(), 0, five)
    assert sum(any(five[i][1] for i in split.val) for split in folds) >= 2
    assert all(any(five[i][1] for i in split.train) for split in folds)
    assert "blocks, balanced" in folds[0].rule
    unbalanced = make_split(make_cases(*ids), SplitConfig(stratify=False), 0, volumes=five)
    assert unbalanced == make_split(make_cases(*ids), SplitConfig(), 0)


def test_strata_of_a_manifest(tmp_path: Path) -> None:
    rows = ["case,image,label,patient,Site"]
    for n in range(20):
        for name in (f"{n}.png", f"{n}_mask.png"):
            (tmp_path / name).touch()
        rows.append(f"c{n:02d},{n}.png,{n}_mask.png,P{n},{'north' if n < 15 else 'south'}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    cases = list(read_manifest(tmp_path / "manifest.csv", tmp_path).cases)
    for split in all_folds(cases, SplitConfig(), 0, {}):
        assert sum(int(i[1:]) >= 15 for i in split.val) == 1
        assert "balanced by strata" in split.rule


def test_bad_cases_are_on_no_side() -> None:
    split = make_split(NUMBERED, SplitConfig(), 0, bad=["c03", "c17"])
    assert sorted(split.train + split.val) == [c.case_id for c in NUMBERED if c.case_id not in ("c03", "c17")]
    with pytest.raises(MedsegError, match=r"(?s)E_NO_CASES.*2 of them bad.*data.on_bad_case=error"):
        make_split(NUMBERED[:3], SplitConfig(), 0, bad=["c00", "c01"])


# a split from a file


def test_nnunets_splits_and_ours(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    theirs = [{"train": ["c02", "c01"], "val": ["c00"]}, {"train": ["c00"], "val": ["c01", "c02"]}]
    path.write_text(json.dumps(theirs))
    config = SplitConfig(file=str(path))
    split = make_split(NUMBERED, config, 0, fold=1)
    assert (split.train, split.val) == (("c00",), ("c01", "c02"))
    assert "splits_final.json" in split.rule and "fold 1 of 2" in split.rule
    assert [case.case_id for case in usable(NUMBERED, config)] == ["c00", "c01", "c02"]
    assert refused(Code.CONFIG, NUMBERED, config, 2).expected == "0 to 1"
    write_splits(tmp_path / "again.json", [make_split(NUMBERED, config, 0, fold=k) for k in range(2)])
    assert json.loads((tmp_path / "again.json").read_text()) == [
        {k: sorted(v) for k, v in row.items()} for row in theirs
    ]

    write_split(tmp_path / "split.json", split)
    ours = SplitConfig(file=str(tmp_path / "split.json"))
    again = make_split(NUMBERED, ours, 0)
    assert (again.train, again.val) == (split.train, split.val)
    refused(Code.CONFIG, NUMBERED, ours, 1)


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ([{"train": ["c00"], "val": ["x"]}], Code.MISSING, "splits.json: x"),
        ([{"train": ["c00"], "val": ["c00"]}], Code.LEAK, "two sides"),
        ([{"train": ["c00"]}], Code.CONFIG, "not a split"),
        ([], Code.CONFIG, "not a split"),
        ([{"train": ["c00"], "val": []}], Code.NO_CASES, "data.split.file"),
        ([{"train": ["t"], "val": ["c00"]}], Code.LEAK, "set aside for test"),
    ],
)
def test_files_of_splits_that_do_not_fit(tmp_path: Path, table: object, code: Code, words: str) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(table))
    cases = [*NUMBERED, *make_cases("t", splits=["test"])]
    assert words in str(refused(code, cases, SplitConfig(file=str(tmp_path / "splits.json"))))


def test_a_file_does_not_part_patients(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(json.dumps([{"train": ["c00"], "val": ["c01"]}]))
    refused(Code.LEAK, PEOPLE, SplitConfig(file=str(tmp_path / "splits.json")))
    with pytest.raises(MedsegError, match="stated twice"):
        SplitConfig(file="a.json", validation=("a",))


def test_a_class_in_fewer_cases_than_folds_does_not_cut_blocks_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cases far apart are in three folds of five with the largest blocks: smaller ones could do no better."""
    from medseg.data import blocks
    from medseg.data.stratify import Traits, deal, fewest_lacking

    ids = [f"c{i:03}" for i in range(300)]
    traits = Traits({i: (1.0, float(i in ("c010", "c130", "c250"))) for i in ids}, {"c000": "rare site"})
    assert fewest_lacking(ids, traits, 5) == 2 + 4
    assert fewest_lacking(ids, Traits(), 5) == 0
    calls = []
    monkeypatch.setattr(blocks, "deal", lambda *a: calls.append(a) or deal(*a))
    _, num_blocks = blocks.folds_of_blocks(ids, {}, traits, 5, 0)
    assert (num_blocks, len(calls)) == (5, 1)


@pytest.mark.parametrize("num_known", [30, 199])
def test_patients_whose_cases_lie_far_apart_do_not_make_one_block_of_all(num_known: int) -> None:
    """Merging blocks that share a patient would leave one of nearly all cases."""
    from medseg.data.blocks import folds_of_blocks
    from medseg.data.stratify import Traits

    ids = [f"c{i:03d}" for i in range(200)]
    order = np.random.default_rng(0).permutation(200)
    patients = {ids[k]: f"p{rank // 2}" for rank, k in enumerate(order[:num_known])}
    folds, _ = folds_of_blocks(ids, patients, Traits(), 5, 0)
    assert sorted(i for fold in folds for i in fold) == ids
    assert all(30 <= len(fold) <= 50 for fold in folds)
    for patient in set(patients.values()):
        assert sum(any(patients.get(i) == patient for i in fold) for fold in folds) == 1
