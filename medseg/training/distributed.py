"""One training in several processes: PyTorch's DistributedDataParallel, started by torchrun or by `trainer.devices`.

**The same training.** The batch of the plan is that of all processes; each takes its share of the samples, which are
those that one process would draw. Losses and gradients are those of the whole batch, so the number of processes changes
how fast a run is, and it may go on with another number than it began with.

**Who does what.** Every process goes the whole way. The main one (rank 0) alone asks, plans, prepares, writes and
talks; the others read what it wrote, from a file system that all share. What depends on clocks and signals is agreed at
every step, so that all stop, save and validate at the same one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore, TCPStore
from torch.nn.parallel import DistributedDataParallel

from medseg.device import choose_device
from medseg.errors import Code, MedsegError, of_machine

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long the others wait while the main process reads and prepares the cases. One that dies is noticed at once."""
LOST = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What the errors of PyTorch say where another process is gone."""
NEEDLESS = ".*Grad strides do not match bucket view strides.*"
"""A warning of DistributedDataParallel: filters of size 1 have no order of memory that could be wrong."""
MEETING_FILE = "MEDSEG_MEETING_FILE"
"""In the environment of processes that medseg.training.launching has started: the file where they meet."""
_RUN_KEY = "medseg/run"
"""In the store of torchrun, which outlives its processes: the folder of the run."""


def is_launched() -> bool:
    """Whether this is one of several processes that torchrun, or `trainer.devices`, has started."""
    meets = MEETING_FILE in os.environ or all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT"))
    return meets and all(name in os.environ for name in ("RANK", "WORLD_SIZE"))


def num_processes(devices: int) -> int:
    """How many train together: as torchrun says, else `trainer.devices`."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else devices


def is_follower() -> bool:
    """Whether another process is the main one."""
    return is_launched() and int(os.environ["RANK"]) > 0


@dataclass(eq=False)
class World:
    """The processes of a training.

    Args:
        rank: which one this is; 0 is the main one.
        size: how many there are.
        local_rank: which one on this machine.
        local_size: how many on this machine.

    Attributes:
        group: those that compute together, once `compute_on` was called; None where there is one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = field(default=None, init=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: of several GPUs each takes its own, by its number on the machine.

        Args:
            name: `trainer.device`; one that is numbered (cuda:0) is shared by all processes of the machine.
        Raises:
            MedsegError: E_CONFIG if the device does not exist, or there are more processes than GPUs.
        """
        device = choose_device(name)
        if self.size == 1:
            return device
        if device.type == "cuda" and ":" not in name:
            num_gpus = torch.cuda.device_count()
            if num_gpus < self.local_size:
                raise MedsegError(
                    Code.CONFIG,
                    "there are more processes than GPUs on this machine",
                    where=f"trainer.device={name}",
                    expected=f"at most {num_gpus} processes",
                    got=self.local_size,
                    remedy=f"trainer.devices={num_gpus}; or trainer.device=cuda:0, which they share, to try it out",
                )
            device = torch.device("cuda", self.local_rank)
        return device

    def compute_on(self, device: torch.device) -> None:
        """Get ready to compute together, each process on its device."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local_size))
        # NCCL refuses to share a GPU
        has_own = device.type == "cuda" and device.index == self.local_rank
        self.group = dist.new_group(backend="nccl" if self._all(has_own) else "gloo")

    def _all(self, is_so: bool) -> bool:
        return not any(self.highest(not is_so))

    def share_batch(self, batch_size: int, parts: int) -> list[tuple[slice, float]]:
        """How this process divides its samples of a batch into parts that are computed one after the other.

        Args:
            batch_size: of all processes.
            parts: how many (`trainer.accumulate`).
        Returns:
            Each part of the own samples, and the share of the whole batch that all processes compute with it.
        Raises:
            MedsegError: E_CONFIG if there are not enough samples.
        """
        if batch_size < self.size * parts:
            raise MedsegError(
                Code.CONFIG,
                "the batch has fewer samples than there are processes and parts to compute it in",
                where="data.plan.batch_size",
                expected=f"at least {self.size * parts}: {self.size} process(es), trainer.accumulate={parts}",
                got=batch_size,
                remedy=f"set data.plan.batch_size={self.size * parts}: it is the batch of all processes together",
            )
        of_part = [sum((i // self.size) % parts == part for i in range(batch_size)) for part in range(parts)]
        return [(slice(part, None, parts), count / batch_size) for part, count in enumerate(of_part)]

    def network(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as training calls it: its gradients become those of all processes on the way back."""
        if self.group is None:
            return model
        warnings.filterwarnings("ignore", NEEDLESS)
        devices = [device] if device.type == "cuda" else None
        module = type(model).__module__
        has_unused = not module.startswith("medseg.models.") or module == "medseg.models.monai"  # so it may be
        return DistributedDataParallel(
            model, device_ids=devices, process_group=self.group, find_unused_parameters=has_unused
        )

    def with_whole_batches(self, model: M, device: torch.device) -> tuple[M, list[str]]:
        """The model with batch normalisations that see the samples of all processes, and what is to be said of it."""
        if self.group is None or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            return model, []
        if device.type != "cuda":
            line = "note       on CPUs the batch normalisation sees the samples of one process only"
            return model, [line]
        converted: M = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)  # type: ignore[no-untyped-call]
        return converted, []

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes; nothing waits for a GPU."""
        if self.group is None:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value / self.size

    def highest(self, *values: float) -> tuple[float, ...]:
        """The highest of each value over all processes."""
        if self.size == 1:
            return values
        table = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        return tuple(table.tolist())

    def of_main(self, *values: float) -> tuple[float, ...]:
        """Values as the main process has them."""
        if self.size == 1:
            return values
        table = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(table, src=0)
        return tuple(table.tolist())

    def gather(self, value: Any) -> list[Any]:
        """What JSON can hold, of all processes by rank; each of them gets all."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)  # no pickles
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def told(self, value: Any) -> Any:
        """What the main process says, as JSON can hold it; the others' is not looked at."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier()

    def main_first(self, work: Callable[[], T]) -> T:
        """Do what the main process leaves something of on the disk, which saves the others most of it."""
        if self.is_main:
            result = work()
        self.barrier()
        return result if self.is_main else work()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that were started with this one, while the block runs.

    Raises:
        MedsegError: E_PROCESS where one of them has ended meanwhile.
    """
    if not is_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield World()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(os.environ.get(name, 0 if name == "LOCAL_RANK" else 1)) for name in names))
    try:
        # What is agreed goes over the CPU, and nothing waits for a GPU; the group that computes comes with the device
        if (meeting := os.environ.get(MEETING_FILE)) is not None:
            store = FileStore(meeting, world.size)
            dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
        yield world
        world.barrier()
        dist.destroy_process_group()
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        if of_machine(error) is None and (isinstance(error, dist.DistError) or any(s in str(error) for s in LOST)):
            raise MedsegError(
                Code.PROCESS,
                "another process of this training has ended",
                where=f"process {world.rank} of {world.size}",
                got=" ".join(str(error).split())[:200],
                remedy="what ended it stands above or in its own output; go on by: medseg train resume=RUN",
            ) from error
        raise


def without_sync(network: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """For all parts of a batch but the last: their gradients are added up here before they are exchanged."""
    if is_last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def divide(costs: Sequence[float], num: int, first: Sequence[int] = ()) -> list[list[int]]:
    """Divide work evenly, each piece to the one that has least so far; the same on all processes.

    Args:
        costs: of each piece.
        num: among how many.
        first: pieces that the first one gets.
    Returns:
        For each the indices of its pieces, in order.
    """
    shares: list[list[int]] = [list(first), *([] for _ in range(num - 1))]
    loads = [sum(costs[i] for i in share) for share in shares]
    for index in sorted(set(range(len(costs))) - set(first), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    return [sorted(share) for share in shares]


def begun_before() -> Path | None:
    """The run that processes of torchrun began before one of them died and it restarted them all; None: there is none.

    torchrun keeps it in memory (`--max-restarts`), so nothing is left behind on the disk.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or (store := _agent_store()) is None:
        return None
    return Path(store.get(_RUN_KEY).decode()) if store.check([_RUN_KEY]) else None


def is_requeued() -> bool:
    """Whether SLURM has begun this job again, after the end of its time or of its machine."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def remember(run: Path) -> None:
    """Tell `begun_before` of the next processes which run this is."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and (store := _agent_store()) is not None:
        store.set(_RUN_KEY, str(run.absolute()))


def _agent_store() -> TCPStore | None:
    """The store that torchrun itself keeps; None where the main process keeps one, which dies with it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False)


def refuse_sweep(arguments: Sequence[str]) -> None:
    """Refuse a sweep under torchrun, whose processes would each begin runs of their own.

    Raises:
        MedsegError: E_CONFIG.
    """
    if is_launched() and {"-m", "--multirun"}.intersection(arguments):
        raise MedsegError(
            Code.CONFIG,
            "torchrun starts the processes of one run, and a sweep is many",
            where="-m",
            remedy="leave torchrun out: medseg train -m trainer.devices=N starts the processes of each run",
        )
