"""The numbers that torchrun, or a person, gives to the processes of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from models.errors import InputError


class Ranks(NamedTuple):
    """Process `rank` of `size`, the `local_rank`th on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """RANK, WORLD_SIZE and LOCAL_RANK (RANK where it is not set); None where there are none.

    Raises InputError if they are incomplete or cannot be.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
    except KeyError as error:
        raise InputError(
            f"RANK and WORLD_SIZE: {error} is not set; start several processes with torchrun"
        ) from error
    except ValueError as error:
        raise InputError(f"RANK, LOCAL_RANK, WORLD_SIZE: {error}") from error
    if not 0 <= rank < size:
        raise InputError(f"RANK {rank}: must be at least 0 and below WORLD_SIZE {size}")
    return Ranks(rank, size, local_rank)
