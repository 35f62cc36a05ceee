"""The BSMamba2 network: `BSMamba2`, its configuration and its checkpoints."""

from typing import TYPE_CHECKING, Any

from models.bsmamba2 import BSMamba2, BSMamba2Config
from models.errors import InputError

if TYPE_CHECKING:
    from models.checkpoint import load_checkpoint

__all__ = ["BSMamba2", "BSMamba2Config", "InputError", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """`load_checkpoint` on demand: `python -m models.checkpoint` must not find itself imported."""
    if name == "load_checkpoint":
        from models.checkpoint import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
