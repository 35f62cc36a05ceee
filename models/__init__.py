"""The BSMamba2 network: `BSMamba2`, its configuration and its checkpoints."""

from models.bsmamba2 import BSMamba2, BSMamba2Config
from models.checkpoint import load_checkpoint
from models.errors import InputError

__all__ = ["BSMamba2", "BSMamba2Config", "InputError", "load_checkpoint"]
