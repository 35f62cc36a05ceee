"""Many processes, each with its share of the songs: `torchrun`, or RANK and WORLD_SIZE by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from models.ranks import Ranks, read_ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world_size`, the `local_rank`th on its machine.

    is_group: started by torchrun, which ends all processes when one fails: they wait for each
    other before they say how it went.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    is_group: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """Raises InputError for values that are no ranks."""
        ranks = read_ranks(environment) or Ranks()
        return cls(*ranks, ranks.size > 1 and "TORCHELASTIC_RUN_ID" in environment)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def take(self, items: Sequence[Item]) -> list[Item]:
        """This process's share; all see the same items in the same order."""
        return list(items[self.rank :: self.world_size])

    def device(self, name: str) -> str:
        """The GPU of this process where several share a machine, else `name`."""
        import torch

        if self.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def join(self) -> None:
        """Meet the other processes, so that `gather` can wait for them."""
        if self.is_group:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=timedelta(days=30))

    def gather(self, items: list[Item]) -> list[Item]:
        """Everybody's items, by rank; without a group, this process's own."""
        if not self.is_group:
            return items
        import torch.distributed as dist

        gathered: list[list[Item]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, items)
        dist.destroy_process_group()
        return [item for part in gathered for item in part]
