"""The GPU's kernels against the recurrence: outputs and gradients, float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch

from models import BSMamba2, BSMamba2Config
from models.conv import causal_conv1d, conv_backends
from models.dispatch import missing
from models.graphs import GraphedNetwork
from models.mamba2 import Mamba2Block
from models.scan import selective_scan

pytestmark = pytest.mark.gpu
NAMES = ("x", "dt", "A", "B", "C", "D")
LENGTHS = (1, 3, 61, 62, 63, 127, 801)


def needs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = missing(backend, torch.empty(0, device="cuda", dtype=dtype))
    if reason is not None:
        pytest.skip(reason)


def outputs(backend, dtype, length, rows=3):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    inputs = [
        normal(rows, length, 4, 64).to(dtype),
        torch.nn.functional.softplus(normal(rows, length, 4) - 3),
        -normal(4).abs() - 1,
        normal(rows, length, 128).to(dtype),
        normal(rows, length, 128).to(dtype),
        normal(4),
    ]
    if backend == "sequential":
        inputs = [t.double() for t in inputs]
    leaves = [t.requires_grad_() for t in inputs]
    y = selective_scan(*leaves, backend=backend)
    gradients = torch.autograd.grad(y, leaves, normal(*y.shape).to(y.dtype))
    return {"y": y} | {f"grad {n}": g for n, g in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("chunked", "selective_scan", "ssd"))
def test_scan_equals_the_recurrence(backend, dtype, length, assert_close):
    needs(backend, dtype)
    expected = outputs("sequential", dtype, length)
    for name, value in outputs(backend, dtype, length).items():
        bound = 2e-2
        if dtype == torch.float32 and backend != "ssd":  # ssd multiplies in TF32
            bound = 1e-4 if name in ("grad dt", "grad A") else 1e-5
        if length == 1 and name == "grad A":
            continue  # no step decays: the gradient is zero but for rounding
        assert_close(f"{name} at length {length}", value, expected[name], bound)


@pytest.mark.parametrize("axis", (1, 2))
@pytest.mark.parametrize("backend", ("triton", "chunked", "selective_scan", "ssd"))
def test_block_equals_the_recurrence(backend, axis, assert_close):
    needs(backend)
    torch.manual_seed(0)
    reference = Mamba2Block(64, d_state=64, headdim=64, scan_backend="sequential").cuda().double()
    block = Mamba2Block(64, d_state=64, headdim=64, scan_backend=backend).cuda()
    block.load_state_dict(reference.state_dict())
    x = torch.randn(2, 131, 62, 64, device="cuda", requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, expected = block(x, axis), reference(wide, axis)
    weights = torch.randn_like(y)
    single = torch.autograd.grad(y, [x, *block.parameters()], weights)
    double = torch.autograd.grad(expected, [wide, *reference.parameters()], weights.double())
    loose = backend == "ssd"
    assert_close("output", y, expected, 5e-3 if loose else 1e-5)
    names = ["input", *dict(block.named_parameters())]
    for name, value, wanted in zip(names, single, double, strict=True):
        sums = name.endswith(("dt_bias", "A_log"))
        assert_close(f"grad {name}", value, wanted, 2e-2 if loose else 1e-4 if sums else 1e-5)


@pytest.mark.parametrize("axis", (1, 2))
def test_bfloat16_errors_are_no_larger_than_mamba_ssms(axis):
    """Outputs and all gradients against float64: at most 1.2 times the error of the SSD kernels."""
    needs("ssd", torch.bfloat16)
    torch.manual_seed(0)
    reference = Mamba2Block(256, scan_backend="sequential").cuda().double()
    x = torch.randn(1, 131, 62, 256, device="cuda").bfloat16()
    wide = x.double().requires_grad_()
    y = reference(wide, axis)
    weights = torch.randn_like(y).bfloat16()
    expected = [y, *torch.autograd.grad(y, [wide, *reference.parameters()], weights.double())]
    errors = {}
    for backend in ("triton", "ssd"):
        block = Mamba2Block(256, scan_backend=backend).cuda()
        block.load_state_dict(reference.state_dict())
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = block(leaf, axis)
        values = [y, *torch.autograd.grad(y, [leaf, *block.parameters()], weights)]
        errors[backend] = [
            ((v.double() - e).norm() / e.norm()).item()
            for v, e in zip(values, expected, strict=True)
        ]
    names = ["output", "grad input", *(f"grad {n}" for n, _ in reference.named_parameters())]
    rows = dict(zip(names, zip(*errors.values(), strict=True), strict=True))
    worse = {n: f"{a:.1e} against {b:.1e}" for n, (a, b) in rows.items() if a > 1.2 * b}
    assert not worse, f"{len(worse)} of {len(rows)}: {worse}"


@pytest.mark.parametrize("length", (1, 3, 62, 801))
def test_convolution_kernel_equals_torch(length, assert_close):
    x, weight = torch.randn(2, length, 64, device="cuda"), torch.randn(64, 4, device="cuda")
    bias = torch.randn(64, device="cuda")
    if "causal_conv1d" not in conv_backends(x, weight):
        pytest.skip("causal-conv1d is not installed")
    values = {}
    for backend in ("torch", "causal_conv1d"):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = causal_conv1d(*leaves, backend)
        values[backend] = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for name, mine, wanted in zip(("y", "x", "weight", "bias"), *values.values(), strict=True):
        assert_close(name, mine, wanted, 1e-5)


def test_many_sequences_pass_the_grid_limits(assert_close):
    """65,535 is CUDA's limit on two axes of a grid; batch 82 of 8 s reaches it on the band axis."""
    block = Mamba2Block(16, d_state=16, headdim=16).cuda()
    x = torch.randn(1, 70_000, 3, 16, device="cuda")
    for backend in ("triton", "ssd", "selective_scan"):
        if missing(backend, x) is None:
            block.scan_backend = backend
            part = block(x[:, -5:], axis=2)
            assert_close(backend, block(x, axis=2)[:, -5:], part, 5e-3)


def test_network_in_bfloat16_stays_close_to_float32(assert_close):
    torch.manual_seed(0)
    model = BSMamba2(BSMamba2Config(dim=64, depth=2, d_state=64)).cuda().eval()
    waveform = 0.1 * torch.randn(1, 2, 44100, device="cuda")
    with torch.no_grad():
        expected = model(waveform)
        with torch.autocast("cuda", torch.bfloat16):
            assert_close("bfloat16", model(waveform), expected, 3e-2)


def test_graph_replays_the_network_and_sees_new_weights(assert_close):
    torch.manual_seed(0)
    model = BSMamba2(BSMamba2Config(dim=32, depth=1, d_state=32, headdim=32)).cuda().eval()
    graphed = GraphedNetwork(model)
    for _ in range(2):
        for length in (44100, 22050):
            waveform = torch.randn(2, 2, length, device="cuda")
            with torch.inference_mode():
                assert_close(f"{length} samples", graphed(waveform), model(waveform), 1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    with torch.no_grad():  # recorded in inference mode, replayed outside
        assert_close("no_grad", graphed(waveform), model(waveform), 1e-6)
    assert graphed(waveform).requires_grad  # gradients need the model itself
