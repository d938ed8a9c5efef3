"""What SECURITY.md promises of the source itself, and that each of its promises has its test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "medseg").rglob("*.py"))
}
RUNNING = {
    "subprocess",
    "multiprocessing",
    "shelve",
    "marshal",
    "dill",
    "cloudpickle",
    "joblib",
    "runpy",
    "code",
    "pty",
}
"""Modules that run programs, or code that was read from somewhere."""
CONNECTING = {
    *(
        "socket",
        "ssl",
        "http",
        "urllib",
        "urllib3",
        "requests",
        "httpx",
        "ftplib",
        "smtplib",
        "asyncio",
        "socketserver",
    ),
    *("huggingface_hub", "wandb", "mlflow", "gdown", "sentry_sdk"),
}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}
CALLS |= {"pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp", "torch.hub.load"}
CALLS |= {"os.execv", "os.execvp", "os.spawnv", "os.spawnl", "os.fork", "os.startfile"}
SAFE_BY = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
"""Calls that are safe with one argument only."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def offences(tree: ast.AST) -> list[str]:
    """What runs code or programs in a module."""
    found = sorted(RUNNING & set(imported(tree)))
    for name, call in called(tree):
        if name in CALLS:
            found.append(name)
        if name in SAFE_BY:
            argument, value = SAFE_BY[name]
            given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            found += [] if given.get(argument) is value else [name]
    return found


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    """All of medseg, parsed."""
    assert len(SOURCES) > 100
    return {name: ast.parse(text) for name, text in SOURCES.items()}


def test_the_source_runs_no_code_that_it_reads(trees: dict[str, ast.AST]) -> None:
    assert {name: offences(tree) for name, tree in trees.items() if offences(tree)} == {}


def test_the_source_opens_no_connection(trees: dict[str, ast.AST]) -> None:
    found = {name: CONNECTING & set(imported(tree)) for name, tree in trees.items()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    ["import subprocess", "def f():\n    from subprocess import run", "eval(text)", "import os\nos.system(text)",
     "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.load(text)"],
)  # fmt: skip
def test_what_would_be_found(source: str) -> None:
    assert offences(ast.parse(source))
    assert offences(ast.parse("torch.load(path, weights_only=True)\nmodel.eval()\nre.compile(text)")) == []


def test_every_promise_points_to_a_test_that_exists() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) > 20
    for path, test in named:
        assert f"def {test}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path} has no {test}"
    rows = [line for line in text[text.index("## What is promised") :].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "|---"))]
    assert len(promises) >= 18
    assert all("`tests/" in row for row in promises), "a promise without a test"
    for link in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (REPOSITORY / link).is_file(), link
