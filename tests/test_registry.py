"""Names to parts, plain values to dataclasses, and refusals that teach."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from medseg.errors import Code, MedsegError, nearest
from medseg.registry import Registry, field_descriptions, make_config


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    """How deep."""


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    """A rate,
    on two lines."""
    mode: Literal["fast", "slow"] = "fast"
    """Which."""
    sizes: tuple[int | tuple[int, ...], ...] | None = None
    """Sizes."""
    pair: tuple[int, float] = (1, 2.0)
    """Two."""
    table: Mapping[str, Any] | None = None
    """Anything."""
    inner: Inner = field(default_factory=Inner)
    """Nested."""


def test_values_are_checked_and_coerced() -> None:
    built = make_config(
        Outer, {"rate": 1, "sizes": [1, [2, 3]], "pair": [4, 5], "inner": {"depth": 3}, "table": {"a": [1]}}, where="x"
    )
    assert built == Outer(1.0, "fast", (1, (2, 3)), (4, 5.0), {"a": [1]}, Inner(3))
    assert isinstance(built.rate, float) and isinstance(built.sizes, tuple)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rat": 1}, "did you mean 'rate'"),
        ({"rate": "1"}, "remedy:   A rate, on two lines."),
        ({"rate": True}, "x.rate has the wrong type"),
        ({"pair": [1]}, "x.pair has the wrong type"),
        ({"mode": "quick"}, "fast | slow"),
        ({"inner": {"depht": 2}}, "unknown key x.inner.depht"),
        ({"inner": {"depth": True}}, "x.inner.depth has the wrong type"),
        ({"sizes": "12"}, "x.sizes"),
        ({"table": [1]}, "x.table"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(MedsegError) as caught:
        make_config(Outer, values, where="x")
    assert caught.value.code is Code.CONFIG and words in str(caught.value)


def test_descriptions() -> None:
    assert field_descriptions(Outer)["rate"] == "A rate, on two lines."
    assert field_descriptions(int) == {}


def test_a_name_twice_is_refused_and_names_are_found() -> None:
    registry: Registry[Any] = Registry("thing", "medseg.errors")
    registry.register("one", Inner)(lambda config: config.depth)  # type: ignore[type-var]
    assert registry.build({"name": "one", "depth": 7}) == 7
    assert registry.names() == ["one"]
    with pytest.raises(MedsegError, match="registered twice"):
        registry.register("one", Inner)(int)
    with pytest.raises(MedsegError, match="no thing named 'on'"):
        registry.part("on")


def test_plugins_register_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("thing", "medseg.errors")

    class Entry:
        def load(self) -> None:
            registry.register("foreign", Inner)(lambda config: "built")  # type: ignore[type-var]

    monkeypatch.setattr("medseg.registry.plugins", lambda: (Entry(),))
    assert registry.build({"name": "foreign"}) == "built"


def test_errors_say_everything_and_survive_other_processes() -> None:
    error = MedsegError(Code.GRID, "differs", where="case7", expected=(1, 2), got=(3, 4), remedy="look")
    assert str(error).splitlines()[0] == "E_GRID: differs"
    assert all(word in str(error) for word in ("case7", "(1, 2)", "(3, 4)", "look"))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.code is Code.GRID


def test_nearest() -> None:
    assert nearest("unett", ["unet", "fusionnet"]).startswith("did you mean 'unet'")
    assert nearest("zzz", ["unet", "vnet"]) == "choose one of: unet, vnet"


def test_torchvision_imports_after_preparation() -> None:
    """In a process of its own: whether an import works depends on what was imported before."""
    program = (
        "from medseg.torchvision_compat import prepare_torchvision as p; p(); p(); import torchvision.transforms.v2"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
