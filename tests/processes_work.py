"""What the processes of tests/test_distributed.py do: it must be importable where they start."""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medseg.data.augment import AugmentConfig, Augmenter, Mirroring
from medseg.labels import Labels
from medseg.losses.choice import build_loss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.losses.processes import together
from medseg.training.distributed import World, joined, without_sync
from medseg.training.launching import launch
from medseg.training.signals import TrainingSignals, save_signal_is_harmless

CLASSES = Labels(("background", "a", "b"), ((0,), (1,), (2,)))
IGNORING = Labels(("background", "a", "b"), ((0,), (1,), (2,)), ignore=(3,))
REGIONS = Labels(("background", "edge", "core"), ((0,), (1,), (2,)), ((1, 2), (2,)), ("whole", "core"))
LOSSES: tuple[tuple[str, dict[str, Any], Labels], ...] = (
    ("Dice over the batch", {"name": "dice_ce"}, CLASSES),
    ("Dice over samples", {"name": "dice_ce", "batch_dice": False}, CLASSES),
    ("class weights", {"name": "dice_ce", "class_weights": [0.2, 1.0, 3.0]}, CLASSES),
    ("ignored voxels", {"name": "dice_ce"}, IGNORING),
    ("regions", {"name": "dice_bce"}, REGIONS),
    ("regions over samples", {"name": "dice_bce", "batch_dice": False}, REGIONS),
)


class Small(nn.Module):
    """Two outputs as of deep supervision, and weights that nothing uses."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True), nn.ReLU())
        self.fine, self.coarse = nn.Conv2d(6, num_outputs, 1), nn.Conv2d(6, num_outputs, 2, stride=2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(x)
        return [self.fine(x), self.coarse(x)]


def batch(size: int, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in which classes are rare, absent from some samples, and unevenly ignored."""
    generator = torch.Generator().manual_seed(size)
    image = torch.randn(size, 1, 12, 14, generator=generator)
    label = (image[:, 0] > 1).long() + (image[:, 0] > 1.8).long()
    label[0] = 0
    if labels.ignore:
        label[1, :9] = 255
    return image, label


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def largest_difference(world: World, settings: dict[str, Any], labels: Labels, size: int, parts: int) -> float:
    """Between the gradients of all processes and those of one that has the whole batch, relative to the largest."""
    torch.manual_seed(0)
    model = Small(labels.num_outputs)
    loss = DeepSupervision(build_loss(settings, labels))
    image, label = batch(size, labels)
    whole = loss(model(image), label)
    whole.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    network = world.network(model, torch.device("cpu"))
    image, label = image[world.rank :: world.size], label[world.rank :: world.size]
    losses = []
    shares = world.share_batch(size, parts)
    for number, (own, share) in enumerate(shares, start=1):
        with together(world.group), without_sync(network, is_last=number == parts):
            part = loss(network(image[own]), label[own]) * share
            part.backward()
        losses.append(part.detach())
    assert (model.unused.weight.grad is None) and len(shares) == parts
    if parts == 1:
        torch.testing.assert_close(losses[0], whole.detach(), rtol=1e-5, atol=1e-6)
    return float((gradients(model) - expected).abs().max() / expected.abs().max())


def batch_norm_difference() -> float:
    """On one GPU that two processes share: gradients of a network with batch normalisation beside those of one process
    with all samples, relative to the largest; and its running variance."""
    with joined() as world:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        world.group = dist.new_group(backend="gloo")
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))
        whole, shared = nn.Sequential(*layers).to(device), copy.deepcopy(nn.Sequential(*layers)).to(device)
        image, label = (part.to(device) for part in batch(4, CLASSES))
        nn.functional.cross_entropy(whole(image), label).backward()
        shared, notes = world.with_whole_batches(shared, device)
        assert not notes
        network = world.network(shared, device)
        own = slice(world.rank, None, world.size)
        nn.functional.cross_entropy(network(image[own]), label[own]).backward()  # means, of which the mean is taken
        expected = gradients(whole)
        difference = (gradients(shared) - expected).abs().max() / expected.abs().max()
        torch.testing.assert_close(shared[1].running_var, whole[1].running_var)
        return float(difference)


def augmented(indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a batch of 4 with these indices, augmented; without noise."""
    config = AugmentConfig(noise_probability=0.0)
    augment = Augmenter(
        config, patch_size=(12, 14), spacing_mm=(1.0, 1.0), is_picture=True, mirroring=Mirroring((0, 1)), seed=3
    )
    image, label = batch(4, CLASSES)
    own = slice(indices.start, None, indices.step)
    return augment(image[own].contiguous(), label[own].to(torch.uint8), 5, indices)


def exactness() -> dict[str, Any]:
    """Everything that two processes can compare, in one start of them."""
    with joined() as world:
        world.compute_on(torch.device("cpu"))
        found: dict[str, Any] = {
            name: largest_difference(world, settings, labels, 4, 1) for name, settings, labels in LOSSES
        }
        found["uneven"] = largest_difference(world, {"name": "dice_ce"}, CLASSES, 5, 1)
        ce = {"name": "dice_ce", "dice_weight": 0.0}
        found["in parts"] = largest_difference(world, ce, CLASSES, 4, 2)
        found["in uneven parts"] = largest_difference(world, ce, CLASSES, 7, 2)
        one = float(world.rank + 1)
        found["gathered"] = world.gather({"rank": world.rank, "nan": float("nan") if world.rank else 1.5})
        found["highest"], found["of main"] = world.highest(one, -one), world.of_main(one)
        found["told"], found["mean"] = world.told(["ü", one]), float(world.mean(torch.tensor(one)))
        world.mean(torch.ones(1000))
        found["listening"] = [place for places in world.gather([*listening(os.getpid())]) for place in places]
        found["listening"] += listening(os.getppid())
        return found


def listening(process: int) -> Iterator[str]:
    """The addresses at which a process waits for connections, as /proc writes them."""
    own = set()
    for handle in Path(f"/proc/{process}/fd").glob("*"):
        try:
            own |= set(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
        except OSError:  # closed meanwhile
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in own:
                yield address.partition(":")[0]


def obedient(folder: Path) -> None:
    """Writes down who it is and what signals ask for, until one ends all."""
    with save_signal_is_harmless(), joined() as world, TrainingSignals(once=False) as signals:
        (folder / f"process{world.rank}").write_text(str(os.getpid()))
        while not world.highest(signals.received or 0)[0]:
            if signals.take_save():
                (folder / f"saved{world.rank}").touch()
            time.sleep(0.05)
        (folder / f"stopped{world.rank}").touch()
    signals.raise_received()


if __name__ == "__main__":  # what is killed must be a process of its own
    launch(obedient, 2, Path(sys.argv[1]))
