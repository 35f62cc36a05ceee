"""The processes of a run: one, or those that torchrun starts, joined by DistributedDataParallel.

Rank 0 writes; every rank reads its own share of the data. CPU tensors travel through Gloo and
CUDA tensors through NCCL, in one process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import InputError
from models.ranks import read_ranks

# Rank 0 may index a large data set while the others wait.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: number of this process; rank 0 writes.
        size: number of processes.
        local_rank: number of this process on its machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, which may hold this process alone."""
        return dist.is_available() and dist.is_initialized()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_distributed:
            # On a CPU tensor: NCCL's barrier would take the GPU of the rank's number.
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the others, which find what it left on the disk."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Mean of every value over the ranks, in one exchange on the values' device."""
        stacked = torch.stack([value.double() for value in values])
        if self.is_distributed:
            dist.all_reduce(stacked)
        return list((stacked / self.size).unbind())

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order, on every rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


class Agreement:
    """The largest of what the ranks propose, known one call later, so that no rank waits.

    All ranks get the same answers and thus leave their loops together. Alone, the answer is the
    proposal itself, at once.

    Args:
        world: the processes, each of which calls `propose` equally often.
    """

    def __init__(self, world: World) -> None:
        self._distributed = world.is_distributed and world.size > 1
        self._values: Tensor | None = None
        self._work: Any = None

    def propose(self, values: Sequence[float]) -> list[float]:
        """Hand in values; returns the maximum of each over the ranks' previous ones."""
        if not self._distributed:
            return list(values)
        agreed = self.close() or [0.0] * len(values)
        self._values = torch.tensor(values, dtype=torch.float64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def close(self) -> list[float] | None:
        """Wait for the exchange under way; returns its result, None where there is none."""
        if self._work is None or self._values is None:
            return None
        self._work.wait()
        self._work = None
        return self._values.tolist()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the process group that torchrun announces; a process of its own is a world of one.

    Raises:
        InputError: the environment of torchrun is incomplete.
    """
    ranks = read_ranks()
    if ranks is None:
        yield World()
        return
    world = World(*ranks)
    cuda = torch.cuda.is_available() and world.local_rank < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"rank {world.rank} cannot join the others: {reason}") from error
    try:
        yield world
    finally:
        dist.destroy_process_group()
