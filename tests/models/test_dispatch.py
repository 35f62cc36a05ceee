"""Which kernel runs, with what arguments, and what happens when it fails. The kernels are fakes:
the real ones need a GPU (tests/models/test_gpu.py)."""

from __future__ import annotations

import logging
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models import InputError, conv, dispatch, mamba2
from models.conv import causal_conv1d, causal_conv1d_torch, conv_backends
from models.mamba2 import Mamba2Block
from models.scan import IMPLEMENTATIONS, selective_scan, sequential_scan


def on_gpu(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """What the dispatch asks of a tensor, as if it lay on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 8, 16),
                           element_size=lambda: dtype.itemsize)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch):
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(mamba2, "_tried", set())


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(mamba2, "MAMBA_SSM_AVAILABLE", True)
    monkeypatch.setattr(mamba2, "CAUSAL_CONV1D_AVAILABLE", True)
    monkeypatch.setattr(mamba2, "TRITON_AVAILABLE", False)


def scan_inputs(batch=3, length=20):
    x = torch.randn(batch, length, 2, 4)
    dt = F.softplus(torch.randn(batch, length, 2))
    B, C = torch.randn(batch, length, 5), torch.randn(batch, length, 5)
    return x, dt, -torch.rand(2), B, C, torch.randn(2)


def test_auto_keeps_float32_precision_unless_tf32_is_allowed(installed, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert dispatch.candidates(on_gpu(), fused=False) == ["chunked"]
    assert dispatch.candidates(on_gpu(torch.bfloat16), fused=False) == ["ssd", "chunked"]
    assert dispatch.candidates(on_gpu(torch.float64), fused=False) == ["chunked"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert dispatch.candidates(on_gpu(), fused=False) == ["ssd", "chunked"]


def test_auto_takes_triton_for_whole_blocks_only(installed, monkeypatch):
    monkeypatch.setattr(mamba2, "TRITON_AVAILABLE", True)
    assert dispatch.candidates(on_gpu(), fused=True)[0] == "triton"
    assert "triton" not in dispatch.candidates(on_gpu(), fused=False)


def test_flags_are_read_at_call_time(installed, monkeypatch):
    x, weight = on_gpu(torch.bfloat16), torch.zeros(16, 4)
    assert conv_backends(x, weight) == ["causal_conv1d", "torch"]
    monkeypatch.setattr(mamba2, "MAMBA_SSM_AVAILABLE", False)
    monkeypatch.setattr(mamba2, "CAUSAL_CONV1D_AVAILABLE", False)
    assert dispatch.candidates(x, fused=True) == ["chunked"]
    assert conv_backends(x, weight) == ["torch"]


@pytest.mark.parametrize("backend", ("ssd", "selective_scan"))
def test_a_named_backend_that_cannot_run_says_why_and_what_to_install(backend):
    message = f"'{backend}' cannot run: mamba-ssm is not installed.* pip install .*-cuda.txt"
    with pytest.raises(InputError, match=message):
        selective_scan(*scan_inputs(), backend=backend)
    with pytest.raises(InputError, match=message):
        Mamba2Block(8, d_state=4, headdim=8, scan_backend=backend)(torch.randn(1, 3, 8))


def test_environment_variable_overrides_the_configuration(monkeypatch):
    monkeypatch.setenv("BSMAMBA2_SCAN", "ssd")
    with pytest.raises(InputError, match="'ssd' cannot run"):
        selective_scan(*scan_inputs(), backend="chunked")
    monkeypatch.setenv("BSMAMBA2_SCAN", "nonsense")
    with pytest.raises(InputError, match="'nonsense' is unknown; choose one of auto"):
        selective_scan(*scan_inputs())


def test_auto_says_once_what_it_took(caplog):
    caplog.set_level(logging.INFO, "models.dispatch")
    for _ in range(2):
        selective_scan(*scan_inputs())
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "auto runs chunked on cpu in torch.float32"
    ]


def failing(error: Exception):
    def kernel(*args):
        raise error

    return kernel


def test_a_failing_kernel_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", failing(RuntimeError("no kernel image")))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    inputs = scan_inputs()
    with pytest.warns(RuntimeWarning, match="ssd failed.*no kernel image") as caught:
        y = selective_scan(*inputs)
    assert len(caught) == 1
    assert torch.equal(y, selective_scan(*inputs, backend="chunked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(*inputs)  # not tried again, nothing to warn of


def test_a_failing_convolution_is_not_tried_again(monkeypatch):
    calls = []

    def kernel(*args):
        calls.append(args)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(conv, "causal_conv1d_kernel", kernel)
    monkeypatch.setattr(conv, "conv_backends", lambda x, weight: ["causal_conv1d", "torch"])
    inputs = torch.randn(2, 5, 8), torch.randn(8, 4), torch.randn(8)
    with pytest.warns(RuntimeWarning, match="causal_conv1d failed.*no kernel image") as caught:
        results = [conv.causal_conv1d(*inputs) for _ in range(3)]
    assert len(caught) == len(calls) == 1
    assert torch.equal(results[2], conv.causal_conv1d(*inputs, backend="torch"))


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("out of resources: shared memory")


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_kernel_that_fails_backward_only_is_replaced_before_it_is_needed(
    checkpointing, monkeypatch
):
    kernel = IMPLEMENTATIONS["chunked"]
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", lambda *args: FailsBackward.apply(kernel(*args)))
    monkeypatch.setattr(mamba2, "gated_norm_kernel", lambda y, z, eps: mamba2.gated_norm(y, z))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    block = Mamba2Block(8, d_state=4, headdim=8)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    with torch.no_grad():
        block(x, 1)  # forward alone it works
    with pytest.warns(RuntimeWarning, match="shared memory") as caught:
        y = checkpoint(block, x, 1, use_reentrant=False) if checkpointing else block(x, 1)
    y.sum().backward()
    assert len(caught) == 1 and list(dispatch._failed) == ["ssd"]


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_kernel_that_works_is_tried_once(checkpointing, monkeypatch):
    calls = []

    def kernel(*args):
        calls.append(args)
        return IMPLEMENTATIONS["chunked"](*args)

    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", kernel)
    monkeypatch.setattr(mamba2, "gated_norm_kernel", lambda y, z, eps: mamba2.gated_norm(y, z))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    block = Mamba2Block(8, d_state=4, headdim=8)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    for _ in range(2):
        y = checkpoint(block, x, 1, use_reentrant=False) if checkpointing else block(x, 1)
        y.sum().backward()
    # Two directions; the trial, two steps, and the steps' second forward pass.
    assert len(calls) == 2 * (3 + 2 * checkpointing)


def test_a_dead_data_worker_is_no_failing_kernel(monkeypatch):
    death = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", failing(death))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        selective_scan(*scan_inputs())
    assert not dispatch._failed


def test_mixer_takes_norm_and_scan_of_one_backend(monkeypatch):
    mixer = mamba2.Mamba2Mixer(8, d_state=4, headdim=8, scan_backend="ssd")
    monkeypatch.setenv("BSMAMBA2_SCAN", "chunked")
    u = torch.randn(2, 5, 8)
    y = mixer(u)  # mamba-ssm is not asked for
    mixer.scan_backend = "chunked"
    assert torch.equal(y, mixer(u))


def test_training_goes_on_after_a_failing_kernel(monkeypatch, assert_close):
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", failing(RuntimeError("bad build")))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    block = Mamba2Block(8, d_state=4, headdim=8)
    x = torch.randn(2, 5, 8)
    with pytest.warns(RuntimeWarning, match="bad build"):
        y = block(x)
    y.sum().backward()
    block.scan_backend = "chunked"
    assert_close("output", y, block(x), 1e-7)


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling 2 GiB"),
    ),
)
def test_out_of_memory_is_raised_with_what_to_lower(monkeypatch, error):
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", failing(error))
    monkeypatch.setattr(dispatch, "candidates", lambda t, fused: ["ssd", "chunked"])
    with pytest.raises(torch.OutOfMemoryError) as caught:
        selective_scan(*scan_inputs())
    for word in ("training.batch_size", "model.gradient_checkpointing", "2 GiB"):
        assert word in str(caught.value)
    assert not dispatch._failed


def test_a_named_backend_that_fails_is_not_replaced(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", failing(RuntimeError("bad build")))
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    with pytest.raises(RuntimeError, match="bad build"):
        selective_scan(*scan_inputs(), backend="ssd")


def fake_module(monkeypatch, name: str, **attributes) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def test_convolution_kernel_gets_aligned_strides_and_no_second_silu(monkeypatch):
    def kernel(x, weight, bias, activation):
        assert activation == "silu"
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        return causal_conv1d_torch(x.transpose(1, 2), weight, bias).transpose(1, 2)

    fake_module(monkeypatch, "causal_conv1d", causal_conv1d_fn=kernel)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    for width in (16, 24, 19):  # rows of 16 channels in a wider tensor; 19 is not aligned
        x = torch.randn(2, 7, width)[..., :16]
        expected = causal_conv1d_torch(x, weight, bias)
        assert torch.equal(causal_conv1d(x, weight, bias, "causal_conv1d"), expected)


@pytest.mark.parametrize(("length", "chunk"), ((62, 64), (5, 16), (801, 128)))
def test_ssd_gets_a_chunk_by_length_and_batches_within_the_grid(length, chunk, monkeypatch):
    calls = []

    def kernel(x, dt, A, B, C, chunk_size, D):
        calls.append((len(x), chunk_size))
        return sequential_scan(x, dt, A, B[:, :, 0], C[:, :, 0], D)

    name = "mamba_ssm.ops.triton.ssd_combined"
    fake_module(monkeypatch, name, mamba_chunk_scan_combined=kernel)
    monkeypatch.setattr("models.scan.mamba_ssm.GRID_LIMIT", 14)
    inputs = scan_inputs(batch=15, length=length)
    y = IMPLEMENTATIONS["ssd"](*inputs)
    assert torch.allclose(y, sequential_scan(*inputs), atol=1e-6)
    assert {c for _, c in calls} == {chunk}
    assert all(rows * -(-length // chunk) <= 14 for rows, _ in calls)


def test_ssd_takes_the_gated_norm_of_the_package_too(monkeypatch, assert_close):
    calls = []

    def norm(x, weight, bias, z, eps, norm_before_gate):
        assert bias is None and not norm_before_gate and (weight == 1).all()
        calls.append(x.shape)
        return F.rms_norm(x * F.silu(z), weight.shape, weight, eps)

    monkeypatch.setitem(IMPLEMENTATIONS, "ssd", sequential_scan)
    monkeypatch.setattr(dispatch, "missing", lambda name, tensor: None)
    fake_module(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=norm)
    monkeypatch.setattr("models.scan.mamba_ssm.INDEX_LIMIT", 2 * 5 * 48)  # width of the projection
    block = Mamba2Block(8, d_state=4, headdim=8, expand=2, scan_backend="ssd")
    x = torch.randn(3, 5, 8)
    y = block(x)
    assert calls == [(2, 5, 16), (1, 5, 16)] * 2
    block.scan_backend = "sequential"
    assert_close("output", y, block(x), 1e-6)


def test_selective_scan_kernel_repeats_heads_for_their_channels(monkeypatch):
    def kernel(u, delta, A, B, C, D):  # b d l, b d l, d n, b n l, b n l, d: Mamba-1, in words
        state, ys = torch.zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            state = torch.exp(delta[:, :, t, None] * A) * state
            state = state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
            ys.append((state * C[:, None, :, t]).sum(-1))
        return torch.stack(ys, -1) + D[:, None] * u

    name = "mamba_ssm.ops.selective_scan_interface"
    fake_module(monkeypatch, name, selective_scan_fn=kernel)
    inputs = scan_inputs()
    y = IMPLEMENTATIONS["selective_scan"](*inputs)
    assert torch.allclose(y, sequential_scan(*inputs), atol=1e-5)


def test_importing_models_imports_nothing_optional():
    import subprocess

    code = (
        "import sys, models, models.mamba2\n"
        "heavy = 'mamba_ssm causal_conv1d triton musdb museval librosa matplotlib torchaudio'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
