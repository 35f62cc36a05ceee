"""Every scan that runs on the CPU against the recurrence in float64: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import InputError
from models.dispatch import missing
from models.scan import IMPLEMENTATIONS, selective_scan

NAMES = ("x", "dt", "A", "B", "C", "D")
LENGTHS = (1, 2, 62, 63, 128, 401)
HERE = [name for name in IMPLEMENTATIONS if missing(name, torch.empty(0)) is None]


def scan_inputs(
    length: int, dtype: torch.dtype = torch.float64, strong: float = 0.0
) -> list[Tensor]:
    batch, heads, headdim, state = 2, 3, 8, 5
    dt = torch.nn.functional.softplus(torch.randn(batch, length, heads) - 2 + strong)
    inputs = [
        torch.randn(batch, length, heads, headdim),
        dt,
        -torch.empty(heads).uniform_(1, 16),
        torch.randn(batch, length, state),
        torch.randn(batch, length, state),
        torch.randn(heads),
    ]
    return [tensor.double().requires_grad_() for tensor in inputs]


def outputs_and_gradients(inputs: list[Tensor], backend: str) -> dict[str, Tensor]:
    y = selective_scan(*inputs, backend=backend)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, weights)
    return {"y": y} | {f"grad {n}": g for n, g in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize("backend", [name for name in HERE if name != "sequential"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strong", (0.0, 3.0), ids=("usual decay", "strong decay"))
def test_every_scan_equals_the_recurrence_in_float64(backend, length, strong, assert_close):
    inputs = scan_inputs(length, strong=strong)
    expected = outputs_and_gradients(inputs, "sequential")
    for name, value in outputs_and_gradients(inputs, backend).items():
        assert_close(f"{name} at length {length}", value, expected[name], 1e-9)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_agrees_with_float64(backend, length, assert_close):
    inputs = scan_inputs(length)
    expected = outputs_and_gradients(inputs, "sequential")
    single = [t.detach().float().requires_grad_() for t in inputs]
    for name, value in outputs_and_gradients(single, backend).items():
        bound = 1e-4 if name in ("grad dt", "grad A") else 1e-5
        assert_close(f"{name} at length {length}", value, expected[name], bound)


def test_recurrence_equals_the_sum_over_all_earlier_steps(assert_close):
    """y_t = sum_{s<=t} (C_t B_s) exp(A sum_{r=s+1..t} dt_r) dt_s x_s + D x_t, written out."""
    x, dt, A, B, C, D = (t.detach() for t in scan_inputs(7))
    expected = torch.zeros_like(x)
    for t in range(7):
        for s in range(t + 1):
            decay = torch.exp(A * dt[:, s + 1 : t + 1].sum(1))  # b h
            weight = (C[:, t] * B[:, s]).sum(-1)[:, None] * decay * dt[:, s]  # b h
            expected[:, t] += weight[..., None] * x[:, s]
        expected[:, t] += D[:, None] * x[:, t]
    y = selective_scan(x, dt, A, B, C, D, backend="sequential")
    assert_close("y", y, expected, 1e-14)


@pytest.mark.parametrize("backend", ("sequential", "chunked"))
def test_gradients_equal_finite_differences(backend):
    inputs = [t[:1, :5] if t.ndim > 1 else t for t in scan_inputs(5)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, backend=backend), inputs)


def test_strong_decay_makes_no_denormals(monkeypatch):
    """exp of a strong decay falls below 1e-38, where a CPU multiplies a hundred times slower."""
    import models.scan.chunked as chunked

    smallest = []
    matmul = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonzero = a[a != 0].abs()
        smallest.append(nonzero.min().item() if len(nonzero) else 1.0)
        return matmul(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    x, dt, A, B, C, D = (t.detach().float() for t in scan_inputs(128, strong=3.0))
    assert torch.exp((dt * A).sum(1)).max() < 1e-38  # the case is strong enough
    chunked.chunked_scan(x, dt, A, B, C, D)
    assert min(smallest) > 1e-37


def test_bfloat16_inputs_keep_a_float32_state(assert_close):
    inputs = [t.detach() for t in scan_inputs(401)]
    expected = selective_scan(*inputs, backend="sequential")
    half = [t.bfloat16() if t.ndim > 1 else t.float() for t in inputs]
    half[1] = inputs[1].float()
    for backend in ("sequential", "chunked"):
        y = selective_scan(*half, backend=backend)
        assert y.dtype == torch.bfloat16
        assert_close(backend, y, expected, 2e-2)


def test_unknown_backend_is_named():
    with pytest.raises(InputError, match="'fast' is unknown; choose one of auto"):
        selective_scan(*scan_inputs(2), backend="fast")
