"""What is shipped: the wheel holds the package, its configurations and the licence, and works away from here."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import medseg

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    environment = {**os.environ, "MEDSEG_REVISION": COMMIT}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


def checked_out() -> str:
    if not (REPOSITORY / ".git").exists():
        return ""
    return subprocess.check_output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], text=True).strip()


def test_a_checkout_knows_better_than_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that was exported for another build names no other commit in a wheel made of this checkout."""
    spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]

    def written(version: str = "standard") -> str | None:
        hook = module.RevisionHook(str(tmp_path), {}, None, None, "", "wheel")
        build_data: dict[str, dict[str, str]] = {"force_include": {}}
        hook.initialize(version, build_data)
        found = [Path(path).read_text() for path in build_data["force_include"]]
        hook.finalize(version, build_data, "")
        return found[0].strip() if found else None

    monkeypatch.delenv("MEDSEG_REVISION", raising=False)
    assert written() is None
    monkeypatch.setenv("MEDSEG_REVISION", COMMIT)
    assert written() == COMMIT and written("editable") is None
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "a"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert written() == head != COMMIT


def test_wheel_holds_all_that_is_needed_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        assert archive.read("medseg/revision.txt").decode() == f"{checked_out() or COMMIT}\n"
    configs = {f"medseg/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "configs").rglob("*.yaml")}
    modules = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "medseg").rglob("*.py")}
    assert configs
    notebooks = {f"medseg/notebooks/{p.name}" for p in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert notebooks and held >= configs | modules | notebooks
    info = f"medseg-{medseg.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in held
    assert {name.split("/")[0] for name in held} == {"medseg", info}


def test_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere and run in an empty folder, `medseg train` finds its configurations."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys, pathlib, medseg\n"
        f"assert pathlib.Path(medseg.__file__).is_relative_to({str(site)!r}), medseg.__file__\n"
        "from medseg.cli import main\n"
        "main(['train', '--cfg', 'job', 'data.root=nowhere'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "root: nowhere" in result.stdout


def test_licence_is_the_apache_licence_whole() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert text.rstrip().endswith("limitations under the License.")


def test_torch_and_torchvision_end_together() -> None:
    """Each torchvision pins one torch: a range that reaches further would drag torch out of its own."""
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]

    def minors(package: str, major: int) -> list[int]:
        (requirement,) = [d for d in dependencies if re.match(rf"{package}[<>=]", d)]
        return [int(n) for n in re.findall(rf"[<>]=?{major}\.(\d+)", requirement)]

    torch, torchvision = minors("torch", 2), minors("torchvision", 0)
    assert len(torch) == len(torchvision) == 2
    assert torchvision == [n + 15 for n in torch]  # 2.10 <-> 0.25
