"""Only a `MedsegError` may come out of a reader, whatever the file: a short run of scripts/fuzz_readers.py."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from dicom_phantom import GTV, write_seg, write_series
from fuzz_damage import damaged_json, damaged_value, damaged_yaml
from fuzz_formats import FORMATS, Format, attempt
from fuzz_guided import Drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian

from medseg.bundle import checkpoint_path, write_checkpoint
from medseg.classification.images import npz_arrays
from medseg.config import compose
from medseg.data.cases import find_cases
from medseg.data.manifest import read_manifest
from medseg.documents import parse_json, parse_yaml
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.seg_frames import read_stored
from medseg.labels import Labels
from medseg.reports.curves import read_history
from medseg.training.class_weights import with_class_weights
from medseg.training.state import read_counters

WORKER = Path(__file__).parent / "fuzz_worker.py"
NUM_INPUTS = {"nifti": 40, "pictures": 40, "tables": 60, "plan": 40, "configuration": 20, "run": 25, "bundle": 20}
"""Of each format, in the suite; 12 of the others."""
LARGEST_GROWTH = 1 << 30
"""Bytes that reading small files may take."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came out of one process under limits of memory and time, by format."""
    folder = tmp_path_factory.mktemp("fuzz")
    jobs = [f"{name}:0:{NUM_INPUTS.get(name, 12)}" for name in FORMATS]
    done = subprocess.run([sys.executable, WORKER, folder, *jobs], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"the process ended at {lines[-1:]}: {done.stderr[-3000:]}"
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {outcome["format"]: outcome for outcome in found}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_and_nothing_else_happens(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["inputs"] == NUM_INPUTS.get(name, 12)
    assert not outcome["failures"], json.dumps(outcome["failures"], indent=1)
    assert outcome["peak_bytes"] < LARGEST_GROWTH


def test_a_reader_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise none of these tests could fail."""
    import fuzz_worker

    def read(folder: Path) -> None:
        fuzz_worker.outcomes["accepted"] += 1
        data = json.loads((folder / "a.json").read_bytes())
        if not isinstance(data["a"], int):
            raise KeyError("a")
        if data["a"] < 0:
            while True:
                pass

    def make(folder: Path) -> None:
        (folder / "one").mkdir(parents=True)
        (folder / "one" / "a.json").write_text('{"a": 1, "b": [2]}')

    said: list[str] = []
    monkeypatch.setitem(FORMATS, "broken", Format(make, {".json": lambda data, rng: damaged_json(data, rng)}, read))
    monkeypatch.setattr(fuzz_worker, "limit", fuzz_worker.limit_time)
    monkeypatch.setattr(fuzz_worker, "SECONDS_EACH", 0.2)
    monkeypatch.setattr(fuzz_worker, "say", said.append)
    fuzz_worker.fuzz(tmp_path, "broken", 0, 60)
    outcome = json.loads(said[-1])
    assert outcome["inputs"] == 60
    assert all(failure["number"] >= 0 for failure in outcome["failures"])
    errors = {failure["error"].partition(":")[0] for failure in outcome["failures"]}
    assert {"KeyError", "TooLongError"} <= errors


def test_an_input_that_is_refused_whole_is_found(tmp_path: Path) -> None:
    """Its damage would find nothing."""
    import fuzz_worker

    (tmp_path / "seeds" / "one").mkdir(parents=True)
    refusing = Format(lambda folder: None, {}, lambda folder: attempt(lambda: find_cases(folder)))
    (failure,) = fuzz_worker.unreadable(refusing, tmp_path / "seeds", tmp_path / "whole")
    assert failure["number"] == -1 and "E_NO_CASES" in str(failure["error"])


@pytest.mark.parametrize("form", ["json", "yaml"])
@pytest.mark.parametrize("depth", [100, 5_000, 200_000])
def test_nesting_without_end_is_an_error_like_any_other(form: str, depth: int) -> None:
    error, parse = (ValueError, parse_json) if form == "json" else (yaml.YAMLError, parse_yaml)
    if (form, depth) == ("json", 100):
        assert parse("[" * depth + "]" * depth)
        return
    with pytest.raises(error):
        parse("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *a",
        "&a [*a]",
        '"\\UFFFFFFFF"',
        "!!bool maybe",
        "!!timestamp 2020-13-41",
        "!!python/object/apply:os.system [true]",
        "a: !!int ''",
    ],
)
def test_yaml_that_bites_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


# PyYAML writes these as they are, and reads the first as the end of a line
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value=plain)
def test_what_is_written_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


cells = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.text(max_size=3))
rows = st.dictionaries(st.sampled_from(["case", "image", "image_t1", "label", "patient", "split", "site"]), cells)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(rows, max_size=3) | st.fixed_dictionaries({"cases": st.lists(rows) | cells, "labels": cells}))
def test_manifests_of_any_values(table: Any, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    try:
        read_manifest(path, tmp_path)
    except MedsegError as error:
        assert error.code in (Code.CONFIG, Code.MISSING, Code.LABEL)


@settings(max_examples=100, deadline=None)
@given(rng=st.randoms(use_true_random=False), make=st.sampled_from([damaged_json, damaged_yaml]))
def test_damage_depends_on_nothing_but_its_draws(rng: Random, make: Callable[[bytes, Random], bytes]) -> None:
    """So that a failure can be repeated by its number."""
    number = rng.randint(0, 2**30)
    data = b'{"a": [1, 2.5, "x"], "b": {"c": null}}'
    assert make(data, Random(number)) == make(data, Random(number))
    json.dumps(damaged_value(json.loads(data), rng))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", '{"labels": {"a": 1}, "file_ending": 3}'),
        ("dataset.json", '{"labels": {"a": 1}, "training": 3.5}'),
        ("dataset.json", '{"labels": [1], "training": []}'),
        ("dataset.json", '{"labels": {"a": 1}, "channel_names": {"x": "CT"}}'),
        ("dataset.json", '{"labels": {"a": 1}, "dataset": {"c": 3}}'),
        ("dataset.json", '{"labels": ' + "[" * 100_000),
        ("manifest.json", '{"cases": [{"image": {"a": 1}}], "labels": 3}'),
        ("manifest.csv", 'image,label\n"' + "x" * 200_000 + '",a\n'),
    ],
)
def test_what_fuzzing_found_in_tables(tmp_path: Path, name: str, content: str) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.nii.gz").touch()
    (tmp_path / name).write_text(content)
    with pytest.raises(MedsegError):
        find_cases(tmp_path)


def test_what_fuzzing_found_in_surveys(tmp_path: Path) -> None:
    labels = Labels.from_mapping({"background": 0, "a": 1})
    path = tmp_path / "survey.json"
    for cases in ([{"case_id": "c", "label_voxels": [1]}], [{"case_id": "c"}], [3], 3, []):
        path.write_text(json.dumps({"cases": cases}))
        with pytest.raises(MedsegError) as caught:
            with_class_weights({"class_weights": "auto"}, labels, path, {"c"})
        assert caught.value.code == Code.RUN


def test_what_fuzzing_found_in_segmentations(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", 0, [GTV]), {"tumour": GTV})
    content = path.read_bytes()
    place = content.index(ExplicitVRLittleEndian.encode() + b"\0")
    path.write_bytes(content[:place] + b"1.2.840.10008.5.1.4"[:19].ljust(20, b"\0") + content[place + 20 :])
    with pytest.raises(MedsegError):
        read_stored(path)


@pytest.mark.parametrize("counters", [{"best_score": "a"}, {"step": 1.5}, {"other": 1}, [1], 3, None])
def test_what_fuzzing_found_in_checkpoints(tmp_path: Path, counters: Any) -> None:
    metadata = {"counters": counters, "param_groups": [], "scaler": {}}
    write_checkpoint(checkpoint_path(tmp_path, "latest"), {"model.a": torch.zeros(1)}, metadata)
    with pytest.raises(MedsegError, match="E_CHECKPOINT"):
        read_counters(tmp_path)


def test_what_fuzzing_found_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="nested without end"):
        compose("train", ["model.widths=" + "[" * 100_000])
    path = tmp_path / "history.csv"
    path.write_bytes(b"step,train_loss\n1,0.5\n\x9c,0.4\n3,0.3\n")
    assert read_history(path)["train_loss"] == ([1, 3], [0.5, 0.3])


def npz_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_npz_of_strangers(tmp_path: Path) -> None:
    """Sizes that no file holds, members that are no arrays, pickles, and damage at every k-th byte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    for name, members in (
        ("absurd", {"train_images.npy": header.getvalue()}),
        ("bomb", {"train_images.npy": bytes(10**7)}),
        ("text", {"notes.txt": b"no array"}),
    ):
        with pytest.raises(MedsegError) as caught:
            npz_arrays(npz_of(tmp_path / f"{name}.npz", members))
        assert caught.value.code == (Code.LIMIT if name == "absurd" else Code.TRUNCATED)
    np.savez(tmp_path / "pickle.npz", train_images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(MedsegError, match="E_TRUNCATED"):
        npz_arrays(tmp_path / "pickle.npz")
    np.savez_compressed(tmp_path / "whole.npz", train_images=np.arange(64).reshape(4, 4, 4), train_labels=np.arange(4))
    whole = (tmp_path / "whole.npz").read_bytes()
    assert npz_arrays(tmp_path / "whole.npz")["train_images"].shape == (4, 4, 4)
    for place in range(0, len(whole), 7):
        path = tmp_path / f"{place}.npz"
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            path.write_bytes(content)
            npz_arrays.cache_clear()
            with suppress(MedsegError):
                npz_arrays(path)


def test_what_atheris_mutates_is_what_the_damage_is_drawn_from(tmp_path: Path) -> None:
    """The same bytes give the same input; other bytes others; and no bytes are enough for any choice."""
    form = FORMATS["tables"]
    form.make(tmp_path / "seeds")
    made = []
    for number, data in enumerate((b"", b"", Random(1).randbytes(64), Random(2).randbytes(64))):
        form.mutant(tmp_path / "seeds", tmp_path / str(number), Drawn(data))
        files = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.is_file())
        made.append([(path.relative_to(tmp_path / str(number)), path.read_bytes()) for path in files])
    assert made[0] == made[1] and made[2] != made[0] and made[3] != made[2]
    assert Drawn(b"\xff" * 9).randrange(10) < 10 and 0 <= Drawn(b"\xff\xff").random() < 1


@pytest.mark.slow
def test_a_short_run_of_atheris(tmp_path: Path) -> None:
    """scripts/fuzz_readers.py --engine atheris over one format: inputs are read, code is reached, nothing comes out."""
    pytest.importorskip("atheris", reason='atheris is not installed: pip install "medseg[fuzz]"')
    command = [sys.executable, str(WORKER.parent.parent / "scripts" / "fuzz_readers.py"), "--engine", "atheris"]
    done = subprocess.run(
        [*command, "--format", "tables", "--minutes", "0.2"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = ast.literal_eval(done.stdout.partition(" ")[2].strip())
    assert said["inputs"] > 50 and said["edges"] > said["first_edges"] > 0
