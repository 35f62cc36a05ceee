"""Reading pickled files of others without running their code or building their classes.

`torch.load(weights_only=True)` refuses a file that pickles anything besides tensors and plain
containers, as Lightning's do (hyper-parameters, callbacks). Here every class and function that
is not needed for tensors becomes an inert placeholder, so that the weights can be had.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from models.errors import InputError

# What tensors are pickled as. Nothing here runs code of the file.
_TYPES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
}
_TYPES |= {
    ("torch", name): getattr(torch, name)
    for name in dir(torch)
    if isinstance(getattr(torch, name), torch.dtype)
}
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
_STORAGES = {name for name in dir(torch) if name.endswith("Storage")} - {"TypedStorage"}
# What a damaged pickle or archive makes of either reader.
_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class Placeholder:
    """Stands for an object of a class that is not built. Takes whatever a pickle does to it."""

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _TYPES:
            return _TYPES[key]
        # Made anew each time: a pickle may set attributes of all that Python allows it on.
        if key in _FUNCTIONS:
            return partial(_FUNCTIONS[key])
        if module == "torch" and name in _STORAGES:
            is_typed = name != "UntypedStorage"
            return SimpleNamespace(dtype=getattr(torch, name).dtype if is_typed else torch.uint8)
        return type(name, (Placeholder,), {"__module__": module})


def _load(file: BinaryIO, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


# What torch.load asks of a pickle module.
_INERT = SimpleNamespace(__name__="inert", Unpickler=_InertUnpickler, load=_load)


def read_pickled(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, tensors on the CPU.

    Objects of other classes than tensors and plain containers are Placeholders. Raises
    InputError, naming the file, if it is damaged or no such file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of protocols and TorchScript
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                return torch.load(
                    path, map_location="cpu", weights_only=False, pickle_module=_INERT
                )
    except _ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint, or damaged: {reason}") from error
