"""What the loop is made of: averaged weights, one cycle, class weights, compiling, feeding, freed memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import history, run, weights
from torch import nn

from medseg.bundle import checkpoint_path, read_checkpoint
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import BatchItem, PatchSampler
from medseg.diagnosis import hardware
from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.models.compiling import Forward
from medseg.training import experiment
from medseg.training.averaging import WeightAverage
from medseg.training.class_weights import LARGEST_WEIGHT, with_class_weights
from medseg.training.compiling import wants_compiling
from medseg.training.feeding import on_device
from medseg.training.optimizers import learning_rate
from medseg.training.schedules import SCHEDULES
from medseg.training.state import TRAINED_PREFIX
from medseg.volume import Grid


def test_the_average_is_that_of_the_formula() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    average = WeightAverage(model, 0.5)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(8):
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn(tensor.shape))
        model(torch.randn(4, 1, 8, 8))  # moves the running statistics
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
            else:
                expected[name] = tensor.double()
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.applied():
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name
            assert not torch.equal(tensor, live[name]) or not tensor.is_floating_point()
        raise ZeroDivisionError
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())
    first = next(iter(average.weights().values()))
    assert first.stride() == model[0].weight.stride()  # the layout of the weights


def test_a_long_average_forgets_the_initial_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    average = WeightAverage(model, 0.9999)
    nn.init.constant_(model.weight, 1.0)
    for step in range(30):
        average.update(step)
    assert average.weights()["weight"].item() == pytest.approx(1.0, abs=0.05)  # 0.9999 alone would still be at 99.7


def test_a_run_with_averaged_weights_predicts_with_them_and_goes_on_exactly(tiny_run, tmp_path: Path) -> None:
    settings = ("trainer.precision=fp32", "trainer.ema=0.9", "schedule=one_cycle", "trainer.num_validations=1")
    run(tiny_run.data, tmp_path / "straight", *settings, "trainer.max_steps=6")
    run(tiny_run.data, tmp_path / "plain", *settings[:1], "trainer.ema=null", *settings[2:], "trainer.max_steps=6")
    tensors, _ = read_checkpoint(checkpoint_path(tmp_path / "straight", "latest"))
    trained = {k.removeprefix(TRAINED_PREFIX): v for k, v in tensors.items() if k.startswith(TRAINED_PREFIX)}
    averaged, plain = weights(tmp_path / "straight"), weights(tmp_path / "plain")
    assert all(torch.equal(trained[k.removeprefix("model.")], plain[k]) for k in plain)  # training itself is the same
    assert not any(torch.equal(averaged[k], plain[k]) for k in plain)
    best = weights(tmp_path / "straight", "best")
    assert all(torch.equal(best[k], averaged[k]) for k in best)

    def stop_at_three(self, step, image, label):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, image, label)

    with pytest.MonkeyPatch.context() as patch:
        from medseg.training.loop import Loop

        original = Loop.train_step
        patch.setattr(Loop, "train_step", stop_at_three)
        patch.setattr(Loop, "is_time_to_validate", lambda self: self.counters.step == 3 and self.save())
        with pytest.raises(KeyboardInterrupt):
            run(tiny_run.data, tmp_path / "two", *settings, "trainer.max_steps=6")
    result = run(tiny_run.data, tmp_path / "two", *settings, "trainer.max_steps=6", f"resume='{tmp_path / 'two'}'")
    assert result.steps == 6
    again, _ = read_checkpoint(checkpoint_path(tmp_path / "two", "latest"))
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_one_cycle() -> None:
    schedule = SCHEDULES.build({"name": "one_cycle", "peak": 0.25, "start": 0.1, "final": 0.01})
    shares = np.linspace(0, 1, 101)
    factors, momenta = [schedule(p) for p in shares], [schedule.momentum(p) for p in shares]
    assert factors[0] == pytest.approx(0.1) and factors[25] == pytest.approx(1) and factors[-1] == pytest.approx(0.01)
    assert all(a < b for a, b in itertools.pairwise(factors[:26]))
    assert all(a > b for a, b in itertools.pairwise(factors[25:]))
    assert momenta[0] == pytest.approx(0.95) and momenta[25] == pytest.approx(0.85)
    assert momenta[-1] == pytest.approx(0.95)
    torch_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch_optimizer, max_lr=1.0, total_steps=101, pct_start=0.26, div_factor=10, final_div_factor=10
    )
    for factor, momentum in zip(factors, momenta, strict=True):
        assert torch_optimizer.param_groups[0]["lr"] == pytest.approx(factor, abs=0.03)
        assert torch_optimizer.param_groups[0]["momentum"] == pytest.approx(momentum, abs=0.004)
        torch_optimizer.step()
        theirs.step()
    assert SCHEDULES.build({"name": "one_cycle", "momentum": None}).momentum(0.5) is None
    assert SCHEDULES.build({"name": "poly"}).momentum(0.5) is None
    for wrong in ({"peak": 0.0}, {"start": 0.0}, {"final": 2.0}, {"momentum": [0.9, 0.8]}):
        with pytest.raises(MedsegError, match="E_CONFIG"):
            SCHEDULES.build({"name": "one_cycle", **wrong})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_cycle_moves_the_momentum(tiny_run, tmp_path: Path, optimizer: str) -> None:
    run(tiny_run.data, tmp_path / "run", f"optimizer={optimizer}", "schedule=one_cycle", "trainer.max_steps=10")
    _, metadata = read_checkpoint(checkpoint_path(tmp_path / "run", "latest"))
    (group,) = metadata["param_groups"]
    momentum = group["betas"][0] if optimizer == "adamw" else group["momentum"]
    assert momentum == pytest.approx(SCHEDULES.build({"name": "one_cycle"}).momentum(0.9))


def _survey(path: Path, counts: dict[str, list[int]]) -> Path:
    cases = [{"case_id": case_id, "label_voxels": voxels} for case_id, voxels in counts.items()]
    path.write_text(json.dumps({"cases": cases}))
    return path


def test_class_weights_of_rare_classes(tmp_path: Path) -> None:
    labels = Labels.from_mapping({"background": 0, "large": 1, "small": 2, "gone": 3})
    survey = _survey(tmp_path / "survey.json", {"a": [600, 300, 1, 0], "b": [200, 100, 1, 0], "v": [0, 0, 10**6, 9]})
    settings, why = with_class_weights({"name": "dice_ce", "class_weights": "auto"}, labels, survey, {"a", "b"})
    assert settings["class_weights"] == pytest.approx((1.0, 2.0, LARGEST_WEIGHT, LARGEST_WEIGHT))
    assert why is not None and "large 2" in why and "small 10" in why
    for given in (None, (1.0, 2.0, 3.0, 4.0)):
        assert with_class_weights({"class_weights": given}, labels, survey, {"a"}) == ({"class_weights": given}, None)
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*each class needs a weight.*4 numbers"):
        with_class_weights({"class_weights": (1.0, 2.0)}, labels, survey, {"a"})


def test_a_run_says_its_class_weights(tiny_run, tmp_path: Path) -> None:
    run(tiny_run.data, tmp_path / "run", "loss.class_weights=auto", "trainer.max_steps=2")
    assert "class weights of the loss: background 1, " in " ".join((tmp_path / "run.txt").read_text().split())


def _case(case_id: str, classes: tuple[int, ...]) -> PreparedCase:
    label = torch.zeros(12, 12, dtype=torch.uint8)
    for number in classes:
        label[3 * number : 3 * number + 2, 5:7] = number
    where = tuple(np.argwhere(label.numpy() == number).astype(np.int32) for number in range(4))
    return PreparedCase(case_id, torch.zeros(1, 12, 12), label, Grid((12, 12), np.eye(3)), where)


def test_a_class_of_few_cases_is_seen_as_often_as_others() -> None:
    cases = [_case("rare", (1, 2)), *(_case(str(n), (1,)) for n in range(19))]
    shares = []
    for even in (False, True):
        sampler = PatchSampler(cases, (3, 3), 10, 1.0, seed=0, even_classes=even)
        labels = torch.cat([sampler.batch(step)[1] for step in range(40)])
        shares.append((labels == 2).flatten(1).any(1).float().mean().item())
    assert shares[0] < 0.06 and shares[1] == pytest.approx(0.5, abs=0.08)


def test_who_is_compiled() -> None:
    cpu, cuda, long = torch.device("cpu"), torch.device("cuda"), {"steps": 1e6, "minutes": float("inf")}
    assert wants_compiling("on", cpu, **long) and not wants_compiling("off", cuda, **long)
    assert wants_compiling("auto", cuda, **long) and not wants_compiling("auto", cpu, **long)
    assert not wants_compiling("auto", cuda, steps=100, minutes=float("inf"))
    assert not wants_compiling("auto", cuda, steps=float("inf"), minutes=3)


def test_a_compiled_network_saves_its_own_names(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, compiled = torch.compile, []

    def quick(model):
        compiled.append(model)
        return compile_(model, backend="eager")  # traced as always; only the code generator is left out

    monkeypatch.setattr(torch, "compile", quick)
    settings = ("trainer.precision=fp32", "trainer.max_steps=3")
    run(tiny_run.data, tmp_path / "compiled", *settings, "trainer.compile=on")
    assert len(compiled) == 1
    run(tiny_run.data, tmp_path / "plain", *settings, "trainer.compile=off")
    assert len(compiled) == 1
    first, second = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def broken(image):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    model, x = nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)
    forward = Forward(model, compiled=True, must=False)
    assert torch.equal(forward(x), model(x)) and "no compiler" in caplog.text
    assert torch.equal(forward(x), model(x))
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*cannot be compiled.*trainer.compile=auto"):
        Forward(model, compiled=True, must=True)(x)


def _batches(closed: list[bool]) -> Generator[BatchItem, None, None]:
    try:
        for step in range(5):
            yield step, torch.full((1, 1, 2, 2), float(step)), torch.full((1, 2, 2), step, dtype=torch.uint8)
    finally:
        closed.append(True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_arrive_whole_and_in_order(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    closed: list[bool] = []
    batches = on_device(_batches(closed), torch.device(device))
    for expected in range(3):
        step, image, label = next(batches)
        assert step == expected and image.device.type == label.device.type == device
        assert image.eq(step).all() and label.eq(step).all()
    batches.close()
    assert closed == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept() -> None:
    code = """
import resource, torch
from medseg.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
kept = keep_freed_memory()
for _ in range(4):  # the heap grows to what is needed
    faults()
print(int(kept), first, faults())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    kept, before, after = map(int, out.split())
    if not kept:
        pytest.skip("not glibc")
    assert before > 1000 and after < 100


def test_early_stopping_says_why(tiny_run, tmp_path: Path) -> None:
    run(
        tiny_run.data,
        tmp_path / "run",
        "trainer.max_steps=40",
        "trainer.num_validations=20",
        "trainer.patience=1",
        "optimizer.lr=1e-12",
    )
    text = " ".join((tmp_path / "run.txt").read_text().split())
    best = max(float(row["val_dice_mean"]) for row in history(tmp_path / "run") if row["val_dice_mean"])
    assert f"stopping early: no validation Dice above {best:.4f} (step 2)" in text and "trainer.patience=1" in text


@pytest.mark.parametrize(
    "cores, quota, free_gib, threads",
    [(4, None, 64, 4), (64, None, 64, 8), (16, 2.5, 64, 2), (8, None, 7, 3), (8, 0.5, 1, 1)],
)
def test_as_many_cases_at_a_time_as_the_machine_bears(
    monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None, free_gib: int, threads: int
) -> None:
    monkeypatch.setattr(experiment, "usable_cores", lambda: cores)
    monkeypatch.setattr(experiment, "available_bytes", lambda: free_gib * 2**30)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert experiment.DataConfig().threads == threads
    assert experiment.DataConfig(num_threads=20).threads == 20
    with pytest.raises(MedsegError, match="num_threads"):
        experiment.DataConfig(num_threads=0)


def test_the_card_knows_the_learning_rate() -> None:
    cpu = torch.device("cpu")
    assert learning_rate({"name": "adamw"}, cpu) == 2e-3
    assert learning_rate({"name": "sgd", "lr": 0.5}, cpu) == 0.5
