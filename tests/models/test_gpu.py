"""The GPU's kernels against the recurrence: outputs and gradients, float32 and bfloat16."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from models import BSMamba2, BSMamba2Config
from models.conv import causal_conv1d, conv_backends
from models.dispatch import missing
from models.graphs import GraphedNetwork
from models.mamba2 import Mamba2Block
from models.scan import IMPLEMENTATIONS, selective_scan
from training.config import load_config
from training.data import synthetic
from training.run_folder import RunFolder
from training.trainer import Trainer

pytestmark = pytest.mark.gpu
NAMES = ("x", "dt", "A", "B", "C", "D")
LENGTHS = (1, 3, 61, 62, 63, 127, 801)
CONFIGS = Path(__file__).parents[2] / "configs"


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
@pytest.mark.parametrize("backend", [name for name in IMPLEMENTATIONS if name != "sequential"])
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
    x = torch.randn(2, 131, 62, 64, device="cuda")
    loose = backend == "ssd"
    for name, (value, wanted) in both(block, reference, x, axis).items():
        bound = 1e-4 if name.endswith(("dt_bias", "A_log")) else 1e-5
        bound = (5e-3 if name == "output" else 2e-2) if loose else bound
        assert_close(name, value, wanted, bound)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("length", (*LENGTHS, 1601))
@pytest.mark.parametrize("axis", (1, 2))
def test_triton_block_at_any_length(axis, length, monkeypatch, assert_close):
    """Float32, every d_conv, a batch in parts, memory full of NaN before it is written."""
    needs("triton")
    monkeypatch.setattr("models.scan.triton_block.WHOLE_TOKENS", 1)
    monkeypatch.setattr("models.scan.triton_block.PART_TOKENS", 2 * 3 * length)
    torch.manual_seed(length)
    sizes = {"d_state": 128, "headdim": 64, "d_conv": 2 + length % 3}
    reference = Mamba2Block(64, **sizes, scan_backend="sequential").cuda().double()
    block = Mamba2Block(64, **sizes, scan_backend="triton").cuda()
    block.load_state_dict(reference.state_dict())
    shape = (3, length, 3, 64) if axis == 1 else (3, 3, length, 64)
    x = torch.randn(shape, device="cuda")
    for name, (value, wanted) in both(block, reference, x, axis).items():
        sums = name.endswith(("dt_bias", "A_log"))
        if length == 1 and name.endswith("A_log"):
            continue  # no step decays: the gradient is zero but for rounding
        assert_close(name, value, wanted, 1e-4 if sums else 1e-5)


def both(block, reference, x, axis):
    """Output and gradients of a block and of its copy in float64, by name."""
    leaves = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, expected = block(leaves[0], axis), reference(leaves[1], axis)
    weights = torch.randn_like(y)
    single = torch.autograd.grad(y, [leaves[0], *block.parameters()], weights)
    double = torch.autograd.grad(expected, [leaves[1], *reference.parameters()], weights.double())
    names = ["output", "grad input", *(f"grad {name}" for name, _ in block.named_parameters())]
    return dict(zip(names, zip((y, *single), (expected, *double), strict=True), strict=True))


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


@pytest.mark.parametrize("backend", ("triton", "ssd", "selective_scan"))
def test_many_sequences_pass_the_grid_limits(backend, assert_close):
    """65,535 is CUDA's limit on two axes of a grid; batch 82 of 8 s reaches it on the band axis."""
    needs(backend)
    block = Mamba2Block(16, d_state=16, headdim=16, scan_backend=backend).cuda()
    x = torch.randn(1, 70_000, 3, 16, device="cuda")
    with torch.no_grad():
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


@pytest.mark.parametrize("backend", ("chunked", "triton"))
def test_graph_under_autocast_sees_new_weights(backend, assert_close):
    config = BSMamba2Config(dim=32, depth=1, d_state=32, headdim=32, scan_backend=backend)
    model = BSMamba2(config).cuda().eval()
    graphed = GraphedNetwork(model)
    waveform = torch.randn(1, 2, 8820, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            graphed(waveform)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert_close("new weights", graphed(waveform), model(waveform), 1e-6)


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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_200_steps_of_training_follow_chunked(precision, tmp_path):
    """The demo's network on the demo's data: losses of `triton` and `chunked`, averaged over 20."""
    needs("triton")
    synthetic.main([str(tmp_path / "data"), "--tracks", "12", "--seconds", "10"])
    curves = {}
    for backend in ("chunked", "triton"):
        config = load_config(CONFIGS / "demo.yaml", [
            f"data.root={tmp_path / 'data'}", f"run.dir={tmp_path / backend}",
            f"model.scan_backend={backend}", f"training.precision={precision}",
            "training.device=cuda", "training.max_steps=200", "training.max_minutes=null",
            "training.log_every=1", "training.validate_every=1000", "run.tensorboard=false",
        ])  # fmt: skip
        folder = RunFolder(config.run.dir)
        Trainer(config, folder, None).run()
        rows = map(json.loads, (folder.root / "metrics.jsonl").read_text().splitlines())
        losses = torch.tensor([row["loss"] for row in rows])
        assert len(losses) == 200
        curves[backend] = losses.unfold(0, 20, 20).mean(dim=1)
    largest = (curves["triton"] / curves["chunked"] - 1).abs().max().item()
    first, last = curves["chunked"][0], curves["chunked"][-1]
    logging.info("%s: from %.3g to %.3g, largest difference %.1e", precision, first, last, largest)
    assert last < 0.8 * first
    assert largest < 0.03


def test_a_training_step_never_waits_for_the_gpu(tmp_path):
    synthetic.main([str(tmp_path / "data"), "--tracks", "12", "--seconds", "10"])
    config = load_config(CONFIGS / "demo.yaml", [
        f"data.root={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "training.device=cuda",
        "training.precision=bf16", "training.ema_share=0.3", "curriculum.target_gain=3",
    ])  # fmt: skip
    trainer = Trainer(config, RunFolder(config.run.dir), None)
    batches = trainer.loaders.training(0)
    for _ in range(3):  # compiles, tries backward passes
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
