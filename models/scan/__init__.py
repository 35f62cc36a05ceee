"""The selective scan of Mamba-2: one function, several implementations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from models.dispatch import run_scan
from models.scan.chunked import chunked_scan
from models.scan.mamba_ssm import selective_scan_kernel, ssd_kernel
from models.scan.sequential import sequential_scan

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

IMPLEMENTATIONS: dict[str, Scan] = {
    "selective_scan": selective_scan_kernel,
    "ssd": ssd_kernel,
    "chunked": chunked_scan,
    "sequential": sequential_scan,
}


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, backend: str = "auto"
) -> Tensor:
    """Selective state space scan with a scalar decay a head (Mamba-2, arXiv 2405.21060).

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t,  y_t = C_t state_t + D x_t,  state_0 = 0

    Args:
        x: input `[b, l, h, p]`.
        dt: step sizes after softplus `[b, l, h]`.
        A: negative decay rates `[h]`.
        B, C: input and output maps, shared by the heads `[b, l, n]`.
        D: skip weights `[h]`.
        backend: a name of `models.dispatch.SCAN_BACKENDS`; BSMAMBA2_SCAN overrides it.

    Returns:
        y `[b, l, h, p]` in the type of x.

    Raises:
        InputError: the backend is unknown or cannot run here.
    """
    return run_scan(backend, x, lambda name: IMPLEMENTATIONS[name](x, dt, A, B, C, D))
