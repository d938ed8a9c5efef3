"""The rules of the house that a machine can check."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "medseg"
MAX_LINES = 400
HEAVY = ("torch", "monai", "hydra", "omegaconf", "nibabel", "pydicom", "scipy", "numpy", "matplotlib", "tensorboard")

LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of `folder`/pyproject.toml over the package that lies beside it."""
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True, timeout=120)


def test_imports_go_down() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("errors.py", "import medseg.data", "imports only go down the floors"),
        ("models/__init__.py", "import medseg.losses", "imports only go down the floors"),
        ("data/__init__.py", "import omegaconf", "only medseg.config knows Hydra"),
        ("data/__init__.py", "import monai", "only medseg.models.monai knows MONAI"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "medseg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / "medseg" / module).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    broken = [text for text in result.stdout.splitlines() if " BROKEN" in text]
    assert len(broken) == 1, result.stdout
    assert broken[0].startswith(contract)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """`medseg --help` must answer at once: what takes seconds to import waits for the verb."""
    program = (
        "import sys\n"
        "from medseg.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        f"print('HEAVY', *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 1, "no help came"
    assert result.stdout.splitlines()[-1].strip() == "HEAVY"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small_and_named_after_what_they_do(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert path.stem not in {"utils", "helpers", "misc", "common"}
