"""What SECURITY.md promises of the source itself, and that each of its promises has its test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
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
ALLOWED = {
    "medseg/cli/notebook.py": {"subprocess"},  # Jupyter, by the path of our own interpreter
    "medseg/device.py": {"ctypes.CDLL"},  # the C library that is loaded already
    "medseg/training/launching.py": {"multiprocessing"},  # the processes of trainer.devices, of our own interpreter
}
"""What is used all the same, in which modules, and what of."""
REMOTE = "medseg/remote/"
"""The only part of medseg that opens connections: where --from, --to or --engine ask for it."""
BUILT_IN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = BUILT_IN | {
    *("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.execl", "os.spawnv", "os.spawnl", "os.fork"),
    *("os.posix_spawn", "os.startfile", "posix.system", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("_pickle.load", "_pickle.loads", "_pickle.Unpickler", "pandas.read_pickle", "tempfile.mktemp", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.CLoader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.UnsafeConstructor"),
    *("ctypes.CDLL", "types.FunctionType", "types.CodeType"),
}
"""Whatever runs code, by its full name: it is neither called nor handed to what might call it."""
SAFE_BY = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
"""Calls that are safe with one argument only."""
USUAL = {"np": "numpy"}
"""Names that stand for modules also where a piece of code does not show its imports."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and (name := module_called(node, {})) is not None:
            yield name.split(".")[0]


def full_name(node: ast.expr, names: Mapping[str, str]) -> str:
    """What an expression is, whatever its module calls it; "?" where only running it would tell."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id).removeprefix("builtins.")
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}".removeprefix("builtins.")
    if isinstance(node, ast.Call):
        if (module := module_called(node, names)) is not None:
            return module
        if full_name(node.func, names) == "getattr" and len(node.args) > 1:
            wanted = node.args[1]
            if isinstance(wanted, ast.Constant):
                return f"{full_name(node.args[0], names)}.{wanted.value}".removeprefix("builtins.")
    return "?"


def module_called(node: ast.Call, names: Mapping[str, str]) -> str | None:
    """The module that a call imports: `importlib.import_module("os")`, `__import__("os")`."""
    function = node.func
    called = full_name(function, names) if isinstance(function, (ast.Name, ast.Attribute)) else ""
    if called.rpartition(".")[2] in ("import_module", "__import__") and node.args:
        first = node.args[0]
        return str(first.value) if isinstance(first, ast.Constant) else None
    return None


def names_in(tree: ast.AST) -> dict[str, str]:
    """Name in a module → full name of what it was imported as, or assigned from."""
    names = dict(USUAL)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                names[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    assigned = [n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and n.value]
    for _ in range(3):  # names of names of names
        for assignment in assigned:
            targets = assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target]
            name = full_name(assignment.value, names) if assignment.value is not None else "?"
            if name in FORBIDDEN or name in SAFE_BY or name.partition(".")[0] in {"os", "pickle", "yaml", "builtins"}:
                names |= {target.id: name for target in targets if isinstance(target, ast.Name)}
    return names


def offences(tree: ast.AST) -> list[str]:
    """What runs code or programs in a module."""
    found = sorted(RUNNING & set(imported(tree)))
    names = names_in(tree)
    safe: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            whole = [f"{node.module}.{name.name}".removeprefix("builtins.") for name in node.names]
            found += [name for name in whole if name in FORBIDDEN or name in ("os.*", "pickle.*", "yaml.*")]
        if isinstance(node, ast.Call):
            name = full_name(node.func, names)
            if name in FORBIDDEN:
                found.append(name)
            if name in SAFE_BY:
                argument, value = SAFE_BY[name]
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if given.get(argument) is value:
                    safe.add(id(node.func))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load) and id(node) not in safe:
            name = full_name(node, names)
            # `compile` and the like are also names of settings: what counts is whether they are called.
            is_setting = isinstance(node, ast.Name) and node.id == name and name == "compile"
            found += [name] if (name in FORBIDDEN or name in SAFE_BY) and not is_setting else []
    return found


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    """All of medseg, parsed."""
    assert len(SOURCES) > 100
    return {name: ast.parse(text) for name, text in SOURCES.items()}


def test_the_source_runs_no_code_that_it_reads(trees: dict[str, ast.AST]) -> None:
    found = {name: set(offences(tree)) for name, tree in trees.items()}
    assert {name: what for name, what in found.items() if what} == ALLOWED, "SECURITY.md says what is allowed, and why"


def test_the_source_opens_no_connection(trees: dict[str, ast.AST]) -> None:
    found = {name: CONNECTING & set(imported(tree)) for name, tree in trees.items() if not name.startswith(REMOTE)}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    ["import subprocess", "def f():\n    from subprocess import run", "eval(text)", "import os\nos.system(text)",
     "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.load(text)",
     # under other names
     "import pickle as p\np.loads(data)", "from pickle import loads as parse\nparse(data)", "from os import *",
     "from os import system as show\nshow(text)", "import os as o\no.popen(text)", "from builtins import eval as value",
     "import builtins\nbuiltins.exec(text)", "import builtins as b\nrun = b.eval\nrun(text)", "e = eval\ne(text)",
     "import os\nf = g = os.system\ng(text)", "import os\nlist(map(os.system, texts))", "getattr(os, 'system')(text)",
     "__import__('subprocess').run(text)", "import importlib\nimportlib.import_module('pickle').loads(data)",
     "from importlib import import_module as get\nget('os').system(text)", "from torch import load\nload(path)",
     "import torch as t\nt.load(path)", "import torch as t\nt.load(path, weights_only=flag)",
     "from functools import partial\nimport torch\npartial(torch.load, weights_only=False)(path)",
     "import numpy\nnumpy.load(path)", "from numpy import load as read\nread(path, allow_pickle=True)",
     "import yaml as y\ny.load(text, Loader=y.Loader)", "from yaml import UnsafeLoader\nparse(text, UnsafeLoader)",
     "import subprocess as s\ns.run(text, shell=True)", "if (run := os.system):\n    run(text)"],
)  # fmt: skip
def test_what_would_be_found(source: str) -> None:
    assert offences(ast.parse(source)), source


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "model.eval()", "re.compile(text)", "import os\nos.replace(a, b)",
     "import torch as t\nt.load(path, weights_only=True)", "from numpy import load\nload(path, allow_pickle=False)",
     "def build(compile: bool) -> None:\n    options = Options(compile=compile)", "torch.compile(model)",
     "import yaml\nyaml.safe_load(text)", "importlib.import_module('torchvision')", "system = names['system']"],
)  # fmt: skip
def test_what_is_harmless(source: str) -> None:
    assert offences(ast.parse(source)) == []


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
