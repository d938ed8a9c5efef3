"""`medseg notebook`: Jupyter really starts on copies of the notebooks, with the run chosen, and stops when told."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import TinyRun

from medseg.cli import main

verb = importlib.import_module("medseg.cli.notebook")  # the name in the package is that of its command
TOKEN = "a-token-of-this-test"
PATIENCE_S = 180


def answer(port: int, path: str) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What Jupyter would be started with, in place of starting it."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def serve(arguments: list[str], environment: dict[str, str]) -> int:
        calls.append((list(arguments), environment))
        return 0

    monkeypatch.setattr(verb, "_serve", serve)
    monkeypatch.delenv(verb.RUNS_VARIABLE, raising=False)
    return calls


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["notebook", *map(str, arguments)])
    return ended.value.code


def test_jupyter_serves_the_notebooks_and_stops(tmp_path: Path) -> None:
    pytest.importorskip("jupyterlab")
    port, folder = free_port(), tmp_path / "mine"
    environment = {
        **os.environ, "JUPYTER_TOKEN": TOKEN, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }  # fmt: skip
    command = [sys.executable, "-m", "medseg", "notebook", "--no-browser", "--port", str(port), "-o", str(folder)]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, "--allow-root"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        path, listing, ends = "/api/contents/04_inspect_predictions.ipynb", b"", time.monotonic() + PATIENCE_S
        while not listing and time.monotonic() < ends:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            try:
                listing = answer(port, path)
            except OSError:
                time.sleep(0.3)
        served = json.loads(listing)
        assert served["type"] == "notebook" and "Inspect predictions" in str(served["content"]["cells"][0]["source"])
        names = {entry["name"] for entry in json.loads(answer(port, "/api/contents"))["content"]}
        assert names >= {path.name for path in verb.shipped_notebooks()}
        settings = json.loads(answer(port, "/lab/api/settings/@jupyterlab/apputils-extension:notification"))
        defaults = {name: field.get("default") for name, field in settings["schema"]["properties"].items()}
        assert defaults["fetchNews"] == "false" and defaults["checkForUpdates"] is False  # and nobody is asked
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 143
    until = time.monotonic() + 30
    while True:  # Jupyter itself is told to go, and goes
        try:
            answer(port, "/api")
        except OSError:
            break
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_run_is_chosen_and_opened(started, tiny_run: TinyRun, tmp_path: Path) -> None:
    assert run(tiny_run.run, "-o", tmp_path / "mine", "--port", 9123, "--no-browser") == 0
    ((arguments, environment),) = started
    assert environment[verb.RUNS_VARIABLE] == str(tiny_run.run.resolve())
    assert arguments[-1] == str(tmp_path / "mine" / verb.INSPECTION)
    assert {"--ServerApp.port=9123", "--ServerApp.open_browser=False", "--ServerApp.allow_root=False"} <= set(arguments)
    assert set(verb.SILENT) <= set(arguments)


def test_without_a_run_the_usual_places_are_looked_at(
    started, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "runs").symlink_to(tiny_run.run.parent)
    assert run() == 0
    (_, before), (arguments, after) = started
    assert verb.RUNS_VARIABLE not in before
    assert after[verb.RUNS_VARIABLE] == str(tiny_run.run.parent.resolve())
    assert not arguments[-1].endswith(".ipynb")


def test_a_copy_that_was_changed_stays(started, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", tmp_path / "mine") == 0
    copies = sorted((tmp_path / "mine").glob("*.ipynb"))
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in verb.shipped_notebooks()]
    copies[0].write_text("mine")
    copies[1].unlink()
    assert run("-o", tmp_path / "mine") == 0
    assert copies[0].read_text() == "mine" and copies[1].exists()
    assert "1 new" in capsys.readouterr().out


def test_list_says_what_they_teach(capsys: pytest.CaptureFixture[str]) -> None:
    main(["notebook", "--list"])
    said = capsys.readouterr().out
    for path in verb.shipped_notebooks():
        assert path.name in said
    assert "Is it any good" in said and "and where is it not?" in said
    assert not any(mark in said for mark in ("*", "`", "$"))
    assert "You will see" not in said  # a list, which is not shown
    assert max(map(len, said.splitlines())) <= verb.LONGEST_LINE


def test_refusals(started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere") == 2
    assert run(tmp_path) == 2  # no run in it
    (tmp_path / "file").touch()
    assert run("-o", tmp_path / "file" / "below") == 2
    said = capsys.readouterr().err
    assert "E_MISSING" in said and "E_RUN" in said and "E_OUTPUT" in said
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    assert run() == 2
    assert "pip install 'medseg[notebook]'" in capsys.readouterr().err
    assert started == []
