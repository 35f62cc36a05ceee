"""Which implementation runs: availability, precision, and what happens when a kernel fails."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from models.errors import InputError, is_of_dead_worker, is_out_of_memory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ENVIRONMENT_VARIABLE = "BSMAMBA2_SCAN"
# The fastest first.
SCAN_BACKENDS = ("auto", "triton", "ssd", "chunked", "selective_scan", "sequential")
_IN_PYTORCH = ("chunked", "sequential", "torch")  # scans, and a convolution
OUT_OF_MEMORY_HINT = (
    "out of memory: lower training.batch_size (and raise training.accumulation to match), or set"
    " model.gradient_checkpointing=true"
)

_failed: dict[str, str] = {}  # kernel -> why it failed in this process
_announced: set[tuple[str, str, torch.dtype]] = set()


def package_built(package: str, extension: str) -> bool:
    """Whether `package` and its compiled `extension` are installed; imports neither."""
    return find_spec(package) is not None and find_spec(extension) is not None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type matrix products of `tensor` run in, autocast counted in."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def requested_backend(configured: str) -> str:
    """The configured scan backend, or the one that BSMAMBA2_SCAN names.

    Raises:
        InputError: the name is unknown.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) or configured
    if name not in SCAN_BACKENDS:
        raise InputError(
            f"scan backend {name!r} is unknown; choose one of {', '.join(SCAN_BACKENDS)}"
        )
    return name


def missing(backend: str, tensor: Tensor) -> str | None:
    """Why `backend` cannot run on `tensor`, with the remedy; None where it can."""
    from models import mamba2  # read at call time: its flags may be changed by a user

    if backend in _IN_PYTORCH:
        return None
    if backend == "triton":
        return _missing_triton(tensor)
    if not mamba2.MAMBA_SSM_AVAILABLE:
        return (
            "mamba-ssm is not installed with its compiled part, or is switched off"
            " (models.mamba2.MAMBA_SSM_AVAILABLE); pip install --no-build-isolation"
            " -r requirements-cuda.txt, see MAMBA_SSM_INTEGRATION.md"
        )
    if tensor.device.type != "cuda":
        return f"mamba-ssm runs on CUDA devices, not on {tensor.device.type}"
    if tensor.dtype == torch.float64:
        return "mamba-ssm has no float64 kernels; use chunked or sequential"
    return None


def _missing_triton(tensor: Tensor) -> str | None:
    from models import mamba2

    if not mamba2.TRITON_AVAILABLE:
        return (
            "Triton is not installed, or switched off (models.mamba2.TRITON_AVAILABLE);"
            " it comes with the CUDA builds of torch"
        )
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on CUDA devices, not on {tensor.device.type}"
    if tensor.dtype == torch.float64:
        return "the Triton kernels have no float64 form; use chunked or sequential"
    return None


def candidates(tensor: Tensor, fused: bool) -> list[str]:
    """Scan backends for `auto` in order of preference, without those that cannot run here.

    In float32 only those that keep 1e-5 are offered, unless TF32 is allowed. selective_scan keeps
    it too, and takes three times as long as chunked. `fused` says that the caller can run a whole
    block, which is what `triton` is.
    """
    if tensor.device.type != "cuda":
        return ["chunked"]
    exact = compute_dtype(tensor) == torch.float32 and (
        torch.get_float32_matmul_precision() == "highest"
    )
    order = [*(["triton"] if fused else []), *([] if exact else ["ssd"])]
    return [*(name for name in order if missing(name, tensor) is None), "chunked"]


def run_scan(
    backend: str,
    tensor: Tensor,
    run: Callable[[str], Result],
    fused: bool = False,
    trial: Callable[[str], None] | None = None,
) -> Result:
    """Call `run` with the name of the scan implementation to use for `tensor`.

    Args:
        backend: as configured.
        tensor: what the scan is of.
        run: takes the name of an implementation.
        fused: whether `run` takes "triton", the form of a whole bidirectional block.
        trial: as for `first_that_runs`.

    Raises:
        InputError: a backend asked for by name is unknown or cannot run, with the remedy.
    """
    name = requested_backend(backend)
    if name == "auto":
        return first_that_runs(candidates(tensor, fused), tensor, run, trial)
    reason = missing(name, tensor)
    if name == "triton" and not fused:
        reason = "it runs blocks with d_conv 2 to 4 along time or bands, no scan alone; use chunked"
    if reason is not None:
        raise InputError(f"scan backend {name!r} cannot run: {reason}")
    with memory_hint():
        return _call(run, name)


def _call(run: Callable[[str], Result], name: str) -> Result:
    """run(name), which torch.compile follows into PyTorch's operations, not into kernels."""
    if name in _IN_PYTORCH or not torch.compiler.is_compiling():
        return run(name)
    from models.untraced import untraced

    return untraced(run, name)


def first_that_runs(
    names: Sequence[str],
    tensor: Tensor,
    run: Callable[[str], Result],
    trial: Callable[[str], None] | None = None,
) -> Result:
    """The result of the first implementation whose kernels work; the last is not guarded.

    trial: takes a name too, called before `run`: raises what only a backward pass would, where none
        could fall back any more.
    """
    with memory_hint():
        for name in names[:-1]:
            if name in _failed:
                continue
            try:
                if trial is not None:
                    trial(name)
                result = _call(run, name)
            except kernel_errors() as error:
                if is_of_dead_worker(error) or is_out_of_memory(error):
                    raise
                _failed[name] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{name} failed and is not tried again in this process, the next "
                    f"implementation takes over ({_failed[name]})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                _announce(name, tensor, "the first of " + ", ".join(names))
                return result
        _announce(names[-1], tensor, "nothing faster fits device, precision and packages")
        return run(names[-1])


class memory_hint:
    """Adds to an out-of-memory error what to do about it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            raise torch.OutOfMemoryError(with_memory_hint(error)) from error


def with_memory_hint(error: Exception) -> str:
    """What an out-of-memory error says, and once what to do about it."""
    text = str(error)
    return text if OUT_OF_MEMORY_HINT in text else f"{OUT_OF_MEMORY_HINT} ({text})"


def _announce(name: str, tensor: Tensor, why: str) -> None:
    key = (name, tensor.device.type, compute_dtype(tensor))
    if key not in _announced:
        _announced.add(key)
        logger.info("auto runs %s on %s in %s: %s", name, key[1], key[2], why)


def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises where a GPU, a driver or a build does not suit it."""
    errors: tuple[type[Exception], ...] = (RuntimeError, ImportError, OSError)
    if "triton" in sys.modules:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        errors = (*errors, CompilationError, OutOfResources)
    return errors
