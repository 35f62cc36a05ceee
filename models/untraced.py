"""What torch.compile leaves as it is: kernels, which it would try to trace launch by launch.

A file of its own, as `torch.compiler.disable` imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable
def untraced(run: Callable[[str], Result], name: str) -> Result:
    """run(name), between two graphs."""
    return run(name)
