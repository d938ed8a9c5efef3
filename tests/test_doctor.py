"""What `medseg doctor` finds on this machine, and what it says of machines that lack something."""

from __future__ import annotations

import getpass
import io
import json
import platform
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fuzz_formats import SMALL, write_cases
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEGLosslessSV1, RLELossless
from rich.console import Console

import medseg
from medseg.bundle import write_manifest
from medseg.bundle.manifest import Manifest
from medseg.cli import main
from medseg.config import compose
from medseg.diagnosis import Check, Diagnosis, Status, diagnose, hardware, places, software
from medseg.diagnosis.check import in_short
from medseg.environment import driver, environment, revision
from medseg.training.train import train

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    return diagnose(tmp_path_factory.mktemp("doctor") / "runs")


def raising(error: Exception) -> Callable[..., object]:
    def call(*arguments: object, **options: object) -> object:
        raise error

    return call


def test_everything_is_looked_at_and_nothing_fails_here(diagnosis: Diagnosis) -> None:
    names = [check.name for check in diagnosis.checks]
    for name in ("medseg", "packages", "torch and torchvision", "DICOM decoders", "cores", "main memory"):
        assert name in names
    for name in ("torch.compile", "disk of runs", "write access to runs", "temporary files", "/dev/shm"):
        assert name in names
    assert any(name.startswith("fp32 on ") for name in names) and any(name.startswith("bf16 on ") for name in names)
    assert [check for check in diagnosis.checks if check.status is Status.FAIL] == []
    assert all(check.remedy for check in diagnosis.checks if check.status is not Status.OK)


def test_a_bug_report_names_no_machine_user_or_folder(diagnosis: Diagnosis, tmp_path: Path) -> None:
    said = diagnosis.to_json()
    for secret in (socket.gethostname(), str(Path.home()), str(tmp_path.parent), sys.prefix):
        assert secret not in said
    if getpass.getuser() != "root":
        assert getpass.getuser() not in said


def test_the_manifest_of_a_run_holds_the_same_table(diagnosis: Diagnosis, tmp_path: Path) -> None:
    write_manifest(tmp_path)
    made = json.loads((tmp_path / "manifest.json").read_text())["made"]
    assert made["environment"] == {**diagnosis.environment, "threads": str(torch.get_num_threads())}
    assert made["environment"]["torch"].startswith(torch.__version__.split("+")[0])


def test_json_and_exit_status(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("disk", Status.OK, "room"), Check("fp32", Status.WARN, "slow", "wait")]
    for worst, code in ((Status.WARN, 0), (Status.FAIL, 1)):
        checks = (*found, Check("torch", worst, "so [bold]so[/]", "mend it"))
        monkeypatch.setattr("medseg.diagnosis.diagnose", lambda runs, device, checks=checks: Diagnosis({}, checks))
        for arguments in (["doctor"], ["doctor", "--json"]):
            try:
                main(arguments)
                status = 0
            except SystemExit as ended:
                status = int(str(ended.code or 0))
            assert status == code
            said = capsys.readouterr().out
            assert "so [bold]so[/]" in said and "mend it" in said
        content = json.loads(said)
        assert content["status"] == worst and content["format"] == 1
        assert content["checks"][0] == {"name": "disk", "status": "ok", "found": "room", "remedy": None}


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]])
def test_a_torch_that_cannot_be_imported(arguments: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medseg.diagnosis", None)  # importing it raises ImportError
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "medseg.diagnosis" in said and "install medseg again" in said
    assert "--json" not in arguments or json.loads(said)["checks"][0]["status"] == "fail"


def test_a_device_that_is_asked_for_and_absent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,), chosen = hardware.devices("cuda:77")
    assert check.status is Status.FAIL and check.remedy and chosen == CPU


def test_environment_is_true(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = environment()
    assert found["medseg"] == medseg.__version__ and found["python"] == platform.python_version()
    assert all(isinstance(text, str) and text for text in found.values())
    assert found.get("cuda") == torch.version.cuda
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr("medseg.environment.DRIVER", tmp_path / "version")
    assert driver() == "535.104.05"
    monkeypatch.setattr("medseg.environment.DRIVER", tmp_path / "nothing")
    assert driver() is None


def test_revision_of_a_checkout_its_worktrees_and_packed_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    package, git = tmp_path / "source" / "medseg", tmp_path / "source" / ".git"
    git.mkdir(parents=True)
    monkeypatch.setattr(medseg, "__file__", str(package / "__init__.py"))
    (git / "HEAD").write_text(f"{commit}\n")
    assert revision() == commit
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert revision() == commit
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("f" * 40 + "\n")
    assert revision() == "f" * 40
    tree = git / "worktrees" / "tree"
    tree.mkdir(parents=True)
    (tree / "HEAD").write_text("ref: refs/heads/main\n")
    (tree / "commondir").write_text("../..\n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".git").write_text(f"gitdir: {tree}\n")
    monkeypatch.setattr(medseg, "__file__", str(tmp_path / "tree" / "medseg" / "__init__.py"))
    assert revision() == "f" * 40
    (tree / "HEAD").unlink()
    assert revision() is None
    assert environment()["revision"] == "unknown"
    monkeypatch.setattr(medseg, "__file__", str(tmp_path / "site" / "medseg" / "__init__.py"))
    (tmp_path / "site" / "medseg").mkdir(parents=True)
    (tmp_path / "site" / "medseg" / "revision.txt").write_text(f"{commit}\n")
    assert revision() == commit and environment()["revision"] == commit, "a package that was built of it"


def test_a_package_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "no-such-package-here>=1", 'colorama; extra == "dev"', "rich>=1"]
    monkeypatch.setattr(software, "requires", lambda name: wanted)
    check = software.packages()
    assert check.status is Status.FAIL
    assert re.search(r"numpy is [\d.]+, not >=999", check.found) and "no-such-package-here is missing" in check.found
    assert "rich" not in check.found and "colorama" not in check.found


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "requires", lambda name: ["numpy", "torch==1.0.0"])
    check = software.torch_pair()
    assert check.status is Status.FAIL and "torch==1.0.0" in (check.remedy or "")


def test_a_plugin_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        name = "mine"
        load = staticmethod(raising(ImportError("no module named x")))

    monkeypatch.setattr(software, "entry_points", lambda group: [Plugin])
    (check,) = software.plugins()
    assert check.status is Status.FAIL and check.name == "plugin mine" and "no module named x" in check.found


def test_missing_decoders_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GDCM, JPEG Lossless cannot be decoded, nor JPEG of 12 bits, which Pillow claims but cannot do either."""
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    monkeypatch.setattr(software, "get_decoder", lambda syntax: type("Decoder", (), {"available_plugins": ("pillow",)}))
    checks = software.codecs()
    missing = {check.found: check for check in checks if check.found.startswith("none for")}
    (lossless,) = (check for found, check in missing.items() if "JPEG Lossless" in found)
    assert "JPEG (12 bits)" in lossless.found and "medseg[codecs]" in (lossless.remedy or "")
    assert lossless.status is Status.WARN and "RLE" in checks[0].found
    assert get_decoder(RLELossless).is_available


def test_precisions_are_really_tried() -> None:
    assert 0 < hardware.relative_error("fp32", CPU) < 1e-5 < hardware.relative_error("bf16", CPU) < 5e-2
    assert [check.status for check in hardware.precisions(CPU)] == [Status.OK, Status.OK]


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hardware.conv3d

    def wrong(image: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        """As if a filter's last plane were left out, but in the reference."""
        return right(image, weight if weight.dtype == torch.float64 else weight[..., :2], padding=padding)[..., :10]

    monkeypatch.setattr(hardware, "conv3d", wrong)
    checks = hardware.precisions(CPU)
    assert [check.status for check in checks] == [Status.FAIL, Status.FAIL] and "wrong results" in checks[0].found
    monkeypatch.setattr(hardware, "relative_error", lambda name, device: float("nan"))
    assert {check.status for check in hardware.precisions(CPU)} == {Status.FAIL}
    monkeypatch.setattr(hardware, "relative_error", raising(RuntimeError("no kernel image is available")))
    checks = hardware.precisions(CPU)
    assert checks[0].status is Status.FAIL and "no kernel image" in checks[0].found


def test_precisions_do_not_disturb_what_is_random() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    hardware.precisions(CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_limits_of_containers(
    files: dict[str, str], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.cpu_quota() == cores


def test_threads_that_do_not_fit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(usable: int, quota: float | None, threads: int) -> tuple[Status, str]:
        monkeypatch.setattr(hardware, "usable_cores", lambda: usable)
        monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        check = hardware.cores()
        return check.status, check.remedy or ""

    assert status(64, None, 32)[0] is Status.OK
    found, remedy = status(64, 4.0, 32)
    assert found is Status.WARN and "OMP_NUM_THREADS=4" in remedy
    assert status(16, None, 1)[0] is Status.WARN
    assert status(2, None, 1)[0] is Status.OK
    assert status(1, 0.5, 1)[0] is Status.OK


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda: GIB)
    check = hardware.memory()
    assert check.status is Status.WARN and check.found.startswith("1.0 GiB free")


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "driver", lambda: "535.1")
    for cuda, expected in ((None, "built for CPUs"), ("13.0", "finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (check,), chosen = hardware.devices("auto")
        assert check.status is Status.WARN and expected in check.found and chosen == CPU
    monkeypatch.setattr(hardware, "driver", lambda: None)
    assert hardware.devices("auto")[0][0].status is Status.OK


def test_a_gpu_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA, of which only the reports are asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((70, 10)[number] * GIB, 80 * GIB))
    first, second = hardware.devices("auto")[0]
    assert first.status is Status.OK and first.found == "Some GPU (compute 9.0), 70.0 GiB free of 80.0 GiB"
    assert second.status is Status.WARN and "nvidia-smi" in (second.remedy or "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", raising(RuntimeError("CUDA error: unknown")))
    assert hardware.devices("auto")[0][0].status is Status.FAIL


def test_compiling_wants_a_compiler_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.compiling(CPU).status is Status.OK
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    check = hardware.compiling(torch.device("cuda"))
    assert check.status is Status.WARN and check.found == "no triton, no C compiler"
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    assert hardware.compiling(torch.device("cuda")).found == "triton and a C compiler (gcc)"


@pytest.mark.parametrize(("free", "status"), [(5 * 2**20, Status.FAIL), (5 * GIB, Status.WARN), (50 * GIB, Status.OK)])
def test_room_on_the_disk(free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 100 * GIB, "free": free})
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: usage)
    assert places.disk("disk", tmp_path / "not" / "there").status is status


def test_write_access_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = places.writing("runs", tmp_path / "not" / "there")
    assert check.status is Status.OK and "will be made" in check.found
    assert places.writing("runs", tmp_path).found == "files are written, flushed and renamed"
    for step, error in (("fsync", OSError(5, "Input/output error")), ("replace", OSError(30, "Read-only file system"))):
        with monkeypatch.context() as patch:
            patch.setattr(places.os if step == "fsync" else Path, step, raising(error))
            check = places.writing("runs", tmp_path)
        assert check.status is Status.FAIL and str(error.strerror) in check.found
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.tempfile, "gettempdir", raising(FileNotFoundError("No usable temporary directory")))
    check = places.temporary_files()
    assert check.status is Status.FAIL and "TMPDIR" in (check.remedy or "")


def test_shared_memory_is_no_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SHARED_MEMORY", tmp_path / "none")
    assert places.shared_memory() == Check(
        str(tmp_path / "none"), Status.OK, "not there; only trainer.devices on several GPUs (NCCL) needs it"
    )


@pytest.mark.parametrize(
    ("num_gpus", "mib", "status"), [(0, 64, "ok"), (1, 64, "ok"), (2, 64, "warn"), (2, 1024, "ok")]
)
def test_several_gpus_need_shared_memory(monkeypatch: pytest.MonkeyPatch, num_gpus: int, mib: int, status: str) -> None:
    monkeypatch.setattr(places.torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(total=mib * 2**20, free=mib * 2**20))
    check = places.shared_memory()
    assert check.status == Status[status.upper()] and "NCCL" in check.found
    assert ("--shm-size 1g" in (check.remedy or "")) == (status == "warn")


def test_errors_are_told_without_folders() -> None:
    error = OSError(f"{Path.home()}/lib/x.so: undefined symbol\nand more")
    assert in_short(error) == "OSError: x.so: undefined symbol"
    assert in_short(ValueError()) == "ValueError"
    for text, said in (
        ("/home/max.mustermann/lib/acme.so.1: cannot open", "acme.so.1: cannot open"),
        ("[Errno 13] Permission denied: '/home/max.mustermann'", "[Errno 13] Permission denied: …"),
        ("[Errno 13] Permission denied: '/home/max/Max Mustermann'", "[Errno 13] Permission denied: …"),
        ("no /home/Max Mustermann/lib/acme.so, and no ~other/x", "no acme.so, and no …"),
        (r"C:\Users\Max Mustermann\acme.dll is missing", "C:acme.dll is missing"),
        ("cannot import 'a' (/home/mustermann/acme/__init__.py)", "cannot import 'a' …"),
    ):
        assert in_short(OSError(text)) == f"OSError: {said}"


def test_the_table_of_the_manifest_is_made_before_the_loop_and_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def broken(*_: object) -> None:
        begun.append((tmp_path / "run" / "history.csv").exists())
        raise OSError("/home/max.mustermann/acme.so: gone")

    monkeypatch.setattr("medseg.diagnosis.diagnose", broken)
    write_cases(tmp_path / "data", 5)
    cheap = ["trainer.final_predictions=false", "trainer.report=false", "data.store=null"]
    settings = [setting for setting in SMALL if "report" not in setting]
    experiment = compose("train", [f"data.root='{tmp_path / 'data'}'", *settings, *cheap])
    train(experiment, tmp_path / "run", Console(file=io.StringIO()))
    (check,) = Manifest.read(tmp_path / "run").made["checks"]
    assert begun == [False]
    assert check["status"] == "warn" and check["found"] == "OSError: acme.so: gone"


def test_the_manifest_of_a_run_holds_the_table_of_a_bug_report(tiny_run) -> None:
    made, here = Manifest.read(tiny_run.run).made, diagnose(tiny_run.run.parent, "cpu").record()
    assert [check["name"] for check in made["checks"]] == [check["name"] for check in here["checks"]]
    assert all(check.keys() == {"name", "status", "found", "remedy"} for check in made["checks"])
    assert made["environment"].keys() == here["environment"].keys() >= {"medseg", "revision", "torch"}
    assert str(tiny_run.run.parent.parent) not in json.dumps(made)
