"""The same seed gives the same run; and what `trainer.deterministic` switches, it switches back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from medseg.bundle import BundleInfo, checkpoint_path, read_checkpoint
from medseg.config import compose
from medseg.device import deterministic
from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.losses.choice import build_loss
from medseg.training.train import train

SETTINGS = (
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[16,16,16]",
    "data.split.num_folds=2",
    "trainer.device=cpu",
    "trainer.max_steps=4",
    "trainer.num_validations=1",
    "trainer.ema=0.9",
    "trainer.final_predictions=false",
    "trainer.overlay_cases=0",
    "trainer.report=false",
    "data.store=null",
)


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )


def test_the_same_seed_in_two_processes_gives_the_same_bits(tiny_run, tmp_path: Path) -> None:
    """Two processes at once: threads run differently in each. One is strict, which changes nothing on a CPU."""

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "medseg", "train", f"data.root='{tiny_run.data}'", *SETTINGS, *more]
        command.append(f"hydra.run.dir='{tmp_path / name}'")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    for process in [start("plain"), start("strict", "trainer.deterministic=strict")]:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    plain, strict = (read_checkpoint(checkpoint_path(tmp_path / n, "latest"))[0] for n in ("plain", "strict"))
    assert plain.keys() == strict.keys()
    assert all(torch.equal(plain[name], strict[name]) for name in plain)
    torch.manual_seed(0)
    untrained = BundleInfo.read(tmp_path / "plain").build_model().state_dict()
    assert untrained and not any(torch.equal(plain[f"model.{name}"], weights) for name, weights in untrained.items())


def test_flags_are_set_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = flags()
    with deterministic("off"):
        assert flags() == before
    with deterministic("warn"):
        assert flags() == (True, True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's choice stays
    assert flags() == before
    with pytest.raises(KeyError), deterministic("strict"):
        assert flags() == (True, False, True, False)
        raise KeyError
    assert flags() == before


def test_cublas_gets_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic("strict"):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_strict_refuses_what_has_no_deterministic_form() -> None:
    """`Tensor.put_` without accumulate is the one such operation that CPUs have."""
    values = torch.zeros(3)
    with (
        pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*deterministic=strict.*got: *put_.*deterministic=warn"),
        deterministic("strict"),
    ):
        values.put_(torch.tensor([1]), torch.tensor([2.0]))
    with pytest.warns(UserWarning, match="put_ does not have a deterministic"), deterministic("warn"):
        values.put_(torch.tensor([1]), torch.tensor([2.0]))
    assert values.tolist() == [0, 2, 0]


def test_other_errors_go_through() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), deterministic("strict"):
        raise RuntimeError("out of memory")


def test_strict_refuses_the_clock() -> None:
    with pytest.raises(MedsegError, match=r"(?s)by the clock.*trainer\.max_steps"):
        compose("train", ["data.root=x", "trainer.deterministic=strict", "trainer.max_minutes=3"])
    assert compose("train", ["data.root=x", "trainer.deterministic=warn", "trainer.max_minutes=3"])
    with pytest.raises(MedsegError, match="E_CONFIG"):
        compose("train", ["data.root=x", "trainer.deterministic=always"])


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
def test_cross_entropy_summed_up_in_order_is_the_same(
    weights: tuple[float, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that CUDA takes under strict, here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, 8, generator=generator)
    target = torch.randint(0, 3, (2, 6, 7, 8), generator=generator)
    labels = Labels.from_mapping({"background": 0, "a": 1, "b": 2})
    loss = build_loss({"name": "dice_ce", "dice_weight": 0.0, "class_weights": weights}, labels)
    expected = F.cross_entropy(logits, target, None if weights is None else torch.tensor(weights))
    asked = []
    original = F.cross_entropy

    def cross_entropy(*arguments, **options):
        asked.append(options.get("reduction", "mean"))
        return original(*arguments, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    torch.testing.assert_close(loss(logits, target), expected)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    torch.testing.assert_close(loss(logits, target), expected)
    with deterministic("strict"):
        torch.testing.assert_close(loss(logits, target), expected)
    assert asked == ["mean", "mean", "none"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("down", ["strided_convolution", "max_pool"])
def test_strict_gives_the_same_bits_on_a_gpu(tiny_run, tmp_path: Path, down: str) -> None:
    overrides = [f"data.root='{tiny_run.data}'", *SETTINGS, "trainer.device=cuda", f"model.down={down}"]
    weights = []
    for name in ("first", "second"):
        with (tmp_path / "log.txt").open("w") as log:
            experiment = compose("train", [*overrides, "trainer.deterministic=strict"])
            train(experiment, tmp_path / name, Console(file=log))
        weights.append(read_checkpoint(checkpoint_path(tmp_path / name, "latest"))[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_strict_refuses_on_a_gpu_what_the_documentation_names(tiny_run, tmp_path: Path) -> None:
    overrides = [f"data.root='{tiny_run.data}'", *SETTINGS, "trainer.device=cuda", "trainer.deterministic=strict"]
    for part in ("model.up=interpolation", "model.down=average_pool"):
        with pytest.raises(MedsegError, match="no deterministic form"), (tmp_path / "log.txt").open("w") as log:
            train(compose("train", [*overrides, part]), tmp_path / part, Console(file=log))
