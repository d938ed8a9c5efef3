"""Prepared cases through the store: the same values wherever they come from, never stale, never half an entry."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_preprocess
import torch

from medseg.data import preparation
from medseg.data import store as store_module
from medseg.data import survey as survey_module
from medseg.data.cases import Case, find_cases
from medseg.data.plan import Plan
from medseg.data.preparation import Preparation, prepare_cases
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import PatchSampler
from medseg.data.store import CONTENT, KEEP_DAYS, Store, basis_of
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, write_image, write_label
from medseg.labels import Labels
from medseg.volume import Grid, Volume

LABELS = Labels(("background", "organ", "tumour"), ((0,), (1,), (2,)))
GRID = Grid((30, 26, 22), np.diag([1.0, 1.0, 1.5, 1.0]))


def plan(**changes: Any) -> Plan:
    return test_preprocess.plan(
        **{"spacing_mm": (1.2, 1.0, 1.0), "patch_size": (16, 16, 16), "batch_size": 2, **changes}
    )


def write_case(folder: Path, case_id: str, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    label = np.zeros(GRID.shape, np.uint8)
    label[5:20, 6:18, 4:15] = 1
    label[8:12, 8:14, 6:9] = 2
    image = rng.normal(100, 20, GRID.shape) + 40.0 * label
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_image(folder / "images" / f"{case_id}.nii.gz", Volume(image[None].astype(np.float32), GRID))
    write_label(folder / "labels" / f"{case_id}.nii.gz", Volume(label, GRID))
    return Case(case_id, (folder / "images" / f"{case_id}.nii.gz",), folder / "labels" / f"{case_id}.nii.gz")


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [write_case(tmp_path / "data", name, seed) for seed, name in enumerate("abc")]


def prepared(cases: list[Case], folder: Path | None, *, the_plan: Plan | None = None, **options: Any) -> Preparation:
    return prepare_cases(cases, the_plan or plan(), LABELS, num_threads=2, store=Store(folder), **options)


def assert_same(ones: list[PreparedCase], others: list[PreparedCase]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.case_id == other.case_id and one.shape == other.shape
        assert torch.equal(one.image, other.image) and torch.equal(one.label, other.label)
        assert one.image.dtype == torch.float32 and one.label.dtype == torch.uint8
        np.testing.assert_array_equal(one.grid.affine, other.grid.affine)
        for mine, yours in zip(one.locations, other.locations, strict=True):
            np.testing.assert_array_equal(mine[:], yours[:])


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases whose images are decoded, as they come."""
    read: list[str] = []
    for module in (preparation, survey_module):
        load = module.load_image

        def counted(case: Case, load: Any = load, **options: Any) -> Volume:
            read.append(case.case_id)
            return load(case, **options)

        monkeypatch.setattr(module, "load_image", counted)
    return read


def test_memory_store_and_second_run_give_the_same(cases: list[Case], tmp_path: Path, decodings: list[str]) -> None:
    without = prepared(cases, None)
    first = prepared(cases, tmp_path / "store")
    assert len(decodings) == 6 and first.num_found == 0 and first.in_memory == 3
    second = prepared(cases, tmp_path / "store")
    from_disk = prepared(cases, tmp_path / "store", in_memory=False)
    assert len(decodings) == 6, "a second run decodes nothing"
    assert second.num_found == 3 and from_disk.in_memory == 0 and not from_disk.cases[0].in_memory
    for other in (first, second, from_disk):
        assert_same(without.cases, other.cases)
    assert "3 cases found prepared" in second.lines(tmp_path)[-1]
    assert "patches of 3 are read from there" in from_disk.lines(tmp_path)[-1]


def test_batches_from_the_store_are_those_from_memory(cases: list[Case], tmp_path: Path) -> None:
    samplers = [
        PatchSampler(prepared(cases, tmp_path / "store", in_memory=where).cases, size, 4, 0.5, 0, mirror_padding=mirror)
        for size in ((16, 16, 16), (40, 8, 20))
        for mirror in (False, True)
        for where in (True, False)
    ]
    for memory, disk in zip(samplers[::2], samplers[1::2], strict=True):
        for step in range(5):
            for one, other in zip(memory.batch(step), disk.batch(step), strict=True):
                assert torch.equal(one, other)


def test_a_patch_reads_only_its_chunks(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = prepared(cases[:1], tmp_path / "store", in_memory=False).cases
    monkeypatch.setattr(type(case), "image", property(lambda self: pytest.fail("all of the image was read")))
    image, label = case.cut((-3, 4, 20), (8, 8, 8))
    assert image.shape == (1, 8, 8, 8) and label.shape == (8, 8, 8) and (image[:, :3] == 0).all()


def test_rounding_stays_below_a_thousandth_of_a_deviation(cases: list[Case]) -> None:
    from medseg.data.cases import load_image
    from medseg.data.preprocess import prepare_image

    for scheme in ("z-score", "ct", "rescale", "none"):
        the_plan = plan(normalisation=(scheme,))
        exact, _ = prepare_image(load_image(cases[0]), the_plan)
        (case,) = prepared(cases[:1], None, the_plan=the_plan).cases
        error = (case.image - exact).abs().max().item()
        assert 0 < error <= 1e-3 * min(float(exact.std()), 1.0), scheme


def test_far_outliers_and_constant_images_are_kept(tmp_path: Path) -> None:
    values = np.zeros((2, 8, 8, 8), np.float32)
    values[0, 0, 0, 0] = 5000.0  # 22 deviations of z-score; as it is more than 16 bits of its steps
    values[1] = 7.25
    codes, steps = store_module_rounded(values)
    assert codes.dtype == np.int32 and values[0, 0, 0, 0] == 5000.0 and (values[1] == 7.25).all()
    np.testing.assert_array_equal(codes * np.array(steps, np.float32).reshape(2, 1, 1, 1), values)


def test_quantities_without_a_normalisation_do_not_wrap() -> None:
    values = np.zeros((1, 8, 8, 8), np.float32)
    values[0, 0, 0, :3] = 1e7, -3e9, 12345.0
    before = values.copy()
    codes, steps = store_module_rounded(values)
    np.testing.assert_array_equal(codes * np.float32(steps[0]), values)
    assert np.abs(values - before).max() <= steps[0] / 2 <= 3e9 / 2**29


def test_files_that_were_read_are_room_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.data import memory

    for name, text in {"max": "8000000", "current": "7900000", "stat": "anon 100\ninactive_file 7000000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() == 7_100_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 8_000_000


def store_module_rounded(values: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    from medseg.data.stored_array import rounded

    return rounded(values)


@pytest.mark.parametrize(
    "change, is_miss",
    [
        ({"spacing_mm": (1.3, 1.0, 1.0)}, True),
        ({"orientation": "RAS"}, True),
        ({"normalisation": ("rescale",)}, True),
        ({"crop": True}, True),
        ({"mask_normalisation": True}, True),
        ({"patch_size": (1, 16, 16), "strides": ((1, 1, 1), (1, 2, 2))}, True),  # blocks are flat then
        ({"patch_size": (24, 16, 16)}, False),
        ({"batch_size": 7, "widths": (4, 8), "reasons": {"a": "b"}, "memory_gb": 2.0}, False),
        ({"intensity": ((0.0, 1.0, 0.5, 0.2),)}, False),  # of the training set: nothing to a z-score
    ],
)
def test_settings_that_shape_a_case_are_in_its_key(
    cases: list[Case], tmp_path: Path, change: dict[str, Any], is_miss: bool
) -> None:
    prepared(cases[:1], tmp_path / "store")
    changed = dataclasses.replace(plan(), **change)
    assert prepared(cases[:1], tmp_path / "store", the_plan=changed).num_found == (0 if is_miss else 1)


def test_ct_intensities_labels_reading_and_code_are_in_the_key(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")

    def key(the_plan: Plan, labels: Labels, reading: Reading) -> str:
        return store.key(cases[0], basis_of("prepared", preparation.settings_of(the_plan, labels), reading))

    ct = plan(normalisation=("ct",))
    keys = [
        key(ct, LABELS, Reading()),
        key(dataclasses.replace(ct, intensity=((0.0, 1.0, 0.5, 0.2),)), LABELS, Reading()),
        key(ct, Labels(("background", "all"), ((0,), (1, 2))), Reading()),
        key(ct, LABELS, Reading(resample_irregular=True)),
    ]
    monkeypatch.setattr(store_module, "code_digest", lambda: "another version")
    keys.append(key(ct, LABELS, Reading()))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("which", ["image", "label"])
def test_changed_bytes_are_a_miss_even_with_size_and_time_kept(cases: list[Case], tmp_path: Path, which: str) -> None:
    prepared(cases, tmp_path / "store")
    path = cases[1].images[0] if which == "image" else cases[1].label
    assert isinstance(path, Path)
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[9] ^= 1  # the operating system in the gzip header: the voxels are the same, the file is not
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = prepared(cases, tmp_path / "store")
    assert again.num_found == 2


def test_a_new_case_is_the_only_one_prepared(cases: list[Case], tmp_path: Path, decodings: list[str]) -> None:
    prepared(cases, tmp_path / "store")
    decodings.clear()
    added = write_case(tmp_path / "data", "d", 9)
    assert prepared([*cases, added], tmp_path / "store").num_found == 3
    assert decodings == ["d"]


@pytest.mark.parametrize("name", ["image.b2nd", "label.b2nd", "locations.bin", CONTENT])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_a_miss_with_a_note(cases: list[Case], tmp_path: Path, name: str, damage: str) -> None:
    first = prepared(cases, tmp_path / "store")
    victim = next((tmp_path / "store").glob(f"*/{name}"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    victim.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "gone":
        victim.unlink()
    again = prepared(cases, tmp_path / "store", in_memory=False)
    assert again.num_found == 2 and len(again.damaged) == 1 and "was damaged" in again.lines(None)[0]
    assert_same(first.cases, again.cases)
    assert prepared(cases, tmp_path / "store").num_found == 3


def test_disk_full(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MedsegError, match=r"E_OUTPUT.*disk is full(.|\n)*data\.store=null"):
        prepared(cases, tmp_path / "store")
    assert not list((tmp_path / "store").glob(".new-*"))


def test_names_in_the_store_tell_nothing(tmp_path: Path) -> None:
    case = write_case(tmp_path / "data", "Doe_John", 0)
    prepared([case], tmp_path / "store")
    assert not [p for p in (tmp_path / "store").rglob("*") if "Doe" in p.name]


def test_memory_rules(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 5 * 26 * 30 * 28  # float32 and uint8
    monkeypatch.setattr(preparation, "available_bytes", lambda: int(2.5 * one / preparation.MEMORY_SHARE))
    some = prepared(cases, tmp_path / "store")
    assert 0 < some.in_memory < 3
    assert_same(some.cases, prepared(cases, tmp_path / "store", in_memory=False).cases)
    with pytest.raises(MedsegError, match=r"E_LIMIT(.|\n)*data\.in_memory=auto"):
        prepared(cases, tmp_path / "store", in_memory=True)
    with pytest.raises(MedsegError, match=r"E_LIMIT(.|\n)*data\.store=FOLDER"):
        prepared(cases, None)
    with pytest.raises(MedsegError, match=r"E_CONFIG(.|\n)*data\.store=FOLDER"):
        prepared(cases, None, in_memory=False)


def test_survey_then_preparation_decode_once_and_a_second_run_nothing(
    cases: list[Case], tmp_path: Path, decodings: list[str]
) -> None:
    folder = find_cases(tmp_path / "data")
    store = Store(tmp_path / "store")
    found = survey(folder, num_threads=2, store=store)
    first = prepare_cases(folder.cases, plan(), found.labels, num_threads=2, store=store)
    assert sorted(decodings) == ["a", "b", "c"]
    again = Store(tmp_path / "store")
    assert survey(folder, num_threads=2, store=again) == found == survey(folder, num_threads=1)
    decodings.clear()
    second = prepare_cases(folder.cases, plan(), found.labels, num_threads=2, store=again)
    assert decodings == [] and second.num_found == 3
    assert_same(first.cases, second.cases)
    assert_same(first.cases, prepare_cases(folder.cases, plan(), found.labels, num_threads=1).cases)


def test_decoded_cases_beyond_the_budget_are_decoded_again(
    cases: list[Case], tmp_path: Path, decodings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "available_bytes", lambda: 4 * 100_000)
    store = Store(None)  # keeps nothing on disk, and decodes once all the same where there is room
    found = survey(find_cases(tmp_path / "data"), num_threads=1, store=store)
    prepare_cases(cases, plan(), found.labels, num_threads=1, store=store)
    assert sorted(decodings) == ["a", "b", "b", "c", "c"]


def test_unused_entries_go_after_a_while(cases: list[Case], tmp_path: Path) -> None:
    prepared(cases, tmp_path / "store")
    entries = [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    old = time.time() - (KEEP_DAYS + 1) * 86400
    for entry in entries[:2]:
        os.utime(entry, (old, old))
    left = tmp_path / "store" / ".new-0123"
    left.mkdir()
    os.utime(left, (old, old))
    stranger = tmp_path / "store" / "notes"
    stranger.mkdir()
    os.utime(stranger, (old, old))
    assert prepared(cases, tmp_path / "store").num_found == 1
    assert not left.exists() and stranger.exists()


def test_store_that_goes_while_it_is_used(cases: list[Case], tmp_path: Path) -> None:
    import shutil

    (case,) = prepared(cases[:1], tmp_path / "store", in_memory=False).cases
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(MedsegError) as caught:
        case.cut((0, 0, 0), (4, 4, 4))
    assert caught.value.code is Code.MISSING and "resume the run" in str(caught.value)


PROCESS = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_preparation as t
    from medseg.data import store
    store.code_digest = lambda: "code"
    folder = Path(sys.argv[2])
    def case(name):
        return t.Case(name, (folder / f"data/images/{name}.nii.gz",), folder / f"data/labels/{name}.nii.gz")
    cases = [case(name) for name in "abc"]
    if sys.argv[3] == "die":
        write, done = store.Store.write, []
        def once(self, key, values, files):
            if done:  # in the middle of the second entry
                (self.folder / ".new-half").mkdir()
                (self.folder / ".new-half" / "image.b2nd").write_bytes(b"half")
                import os
                os._exit(9)
            done.append(key)
            return write(self, key, values, files)
        store.Store.write = once
        t.prepare_cases(cases, t.plan(), t.LABELS, num_threads=1, store=store.Store(folder / "store"))
    print(t.prepared(cases, folder / "store").num_found)
"""


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(Path(__file__).parent), str(tmp_path), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_do_not_hurt_each_other(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "code_digest", lambda: "code")  # else an edit between the two would be a miss
    both = [start(tmp_path, "run") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not list((tmp_path / "store").glob(".new-*"))
    again = prepared(cases, tmp_path / "store")
    assert again.num_found == 3 and not again.damaged
    assert_same(again.cases, prepared(cases, None).cases)


def test_a_killed_process_leaves_whole_entries_that_the_next_one_uses(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "code_digest", lambda: "code")
    process = start(tmp_path, "die")
    process.communicate(timeout=120)
    assert process.returncode == 9
    assert prepared(cases, tmp_path / "store").num_found == 1


MEMORY = """
    import sys
    from pathlib import Path
    import numpy as np
    sys.path.insert(0, sys.argv[1])
    import test_preparation as t
    from peak import peak_bytes
    from medseg.data.store import Store
    folder = Path(sys.argv[2])
    def case(name):
        return t.Case(name, (folder / f"{name}.nii",), folder / f"{name}_seg.nii")
    the_plan = t.plan(spacing_mm=(1.0, 1.0, 1.0), normalisation=("ct",))
    run = lambda name: t.prepare_cases([case(name)], the_plan, t.LABELS, num_threads=1, store=Store(folder / "store"))
    run("small")
    before = peak_bytes()
    (ct,) = run("large").cases
    print(peak_bytes() - before)
    print(ct.image.nbytes + ct.label.nbytes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_memory_of_preparing_a_large_ct_is_bounded(tmp_path: Path) -> None:
    """512×512×200 voxels of int16 become 300 slices of 410×410: beside what is kept, less than three of float32."""
    import nibabel as nib

    shape = (512, 512, 200)
    affine = np.diag([0.8, 0.8, 1.5, 1.0])
    rng = np.random.default_rng(0)
    for name, size in (("small", (32, 32, 32)), ("large", shape)):
        noise = rng.integers(-1000, 1000, (size[0], size[1], 1), dtype=np.int16)
        label = np.zeros(size, np.uint8)
        label[10:20, 10:20, 5:15] = 1
        nib.save(nib.Nifti1Image(np.broadcast_to(noise, size), affine), tmp_path / f"{name}.nii")
        nib.save(nib.Nifti1Image(label, affine), tmp_path / f"{name}_seg.nii")
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    added, kept = (int(line) for line in done.stdout.split())
    scan = 4 * int(np.prod(shape))
    assert added < kept + 3 * scan, f"{added / 2**30:.2f} GiB"


def test_where_the_store_lies(tmp_path: Path) -> None:
    from medseg.training.beginning import open_store
    from medseg.training.experiment import DataConfig

    run = tmp_path / "runs" / "2000-01-01_unet"
    assert open_store(DataConfig(), run).folder == tmp_path / "runs" / "prepared"
    assert open_store(DataConfig(store=str(tmp_path / "disk")), run).folder == tmp_path / "disk"
    assert open_store(DataConfig(store=None), run).folder is None
    assert not (tmp_path / "runs").exists(), "nothing is made before there is something to keep"
