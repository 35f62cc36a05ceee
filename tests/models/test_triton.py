"""The Triton mixer and block against the sequential scan in float64: outputs and every gradient.

Without a GPU the kernels run in Triton's interpreter, so the sizes are small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
if not CUDA:
    # Read when a kernel is decorated: it has to be set before the first import of triton.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from models import dispatch, mamba2  # noqa: E402
from models.errors import InputError  # noqa: E402
from models.mamba2 import Mamba2Block  # noqa: E402
from models.scan import triton_block, triton_mixer  # noqa: E402
from models.scan.sequential import sequential_scan  # noqa: E402
from models.scan.triton_mixer import mixer_core  # noqa: E402
from models.scan.triton_plan import Gpu, KernelConfig, Launch, MixerParameters  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
EPS = 1e-5
NAMES = ("out", "proj", *MixerParameters._fields)


def small(chunk: int = 16, headdim_tile: int = 64) -> KernelConfig:
    return KernelConfig(chunk, headdim_tile, *[Launch(4, 1)] * 7)


def draw(
    shape: tuple[int, int, int], nheads: int, headdim: int, d_state: int, d_conv: int
) -> tuple[Tensor, MixerParameters, Tensor]:
    """Random proj, parameters at the scale of their initialisation, and an output gradient."""
    rng = torch.Generator().manual_seed(7)
    d_inner, d_xbc = nheads * headdim, nheads * headdim + 2 * d_state
    dt = torch.exp(torch.rand(2, nheads, generator=rng) * 4.6 - 6.9)
    params = MixerParameters(
        conv_weight=torch.rand(2, d_conv, d_xbc, generator=rng) - 0.5,
        conv_bias=torch.rand(2, d_xbc, generator=rng) - 0.5,
        dt_bias=dt + torch.log(-torch.expm1(-dt)),
        A_log=torch.log(1 + 15 * torch.rand(2, nheads, generator=rng)),
        D=torch.randn(2, nheads, generator=rng),
    )
    proj = torch.randn(*shape, 2, d_inner + d_xbc + nheads, generator=rng)
    return proj, params, torch.randn(*shape, 2, d_inner, generator=rng)


def one_direction(proj: Tensor, params: MixerParameters, direction: int) -> Tensor:
    """[s, l, width] -> [s, l, d_inner], step by step in the order of the formulas."""
    taps, bias, dt_bias, A_log, D = (tensor[direction] for tensor in params)
    nheads, d_xbc, length = len(D), len(bias), proj.shape[1]
    d_inner = proj.shape[-1] - d_xbc - nheads
    z, xbc, dt = proj.split([d_inner, d_xbc, nheads], dim=-1)
    padded = F.pad(xbc, (0, 0, len(taps) - 1, 0))
    xbc = F.silu(bias + sum(w * padded[:, j : j + length] for j, w in enumerate(taps)))
    x, B, C = xbc.split([d_inner, (d_xbc - d_inner) // 2, (d_xbc - d_inner) // 2], dim=-1)
    heads = x.unflatten(-1, (nheads, -1))
    y = sequential_scan(heads, F.softplus(dt + dt_bias), -torch.exp(A_log), B, C, D).flatten(2)
    v = y * F.silu(z)
    return v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + EPS)


def reference(proj: Tensor, params: MixerParameters, axis: str) -> Tensor:
    proj = proj.transpose(1, 2) if axis == "time" else proj
    outer, inner, _ = proj.shape[:3]
    sequences = proj.flatten(0, 1)  # s l 2 w
    forward = one_direction(sequences[:, :, 0], params, 0)
    backward = one_direction(sequences[:, :, 1].flip(1), params, 1).flip(1)
    out = torch.stack([forward, backward], dim=2).unflatten(0, (outer, inner))
    return out.transpose(1, 2) if axis == "time" else out


def results(function, proj: Tensor, params: MixerParameters, dout: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (proj, *params)]
    out = function(leaves[0], MixerParameters(*leaves[1:]))
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


def assert_close(
    case: tuple[Tensor, MixerParameters, Tensor],
    axis: str,
    config: KernelConfig | None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    proj, params, dout = case[0].to(dtype), case[1], case[2].to(dtype)
    doubles = MixerParameters(*(tensor.double() for tensor in params))
    expected = results(lambda p, w: reference(p, w, axis), proj.double(), doubles, dout.double())
    actual = results(
        lambda p, w: mixer_core(p, w, axis, eps=EPS, config=config),
        proj.to(DEVICE),
        MixerParameters(*(tensor.to(DEVICE) for tensor in params)),
        dout.to(DEVICE),
    )
    for name, want in expected.items():
        got = actual[name].cpu().double()
        # At length 1 or under a very strong decay A has no influence: its gradient is 0 but for the
        # rounding of sums that cancel, measured against the size of the output.
        scale = want.norm() + 1e-3 * expected["out"].norm()
        ratio = ((got - want).norm() / scale).item()
        limit = tolerance * (10 if name in ("dt_bias", "A_log") else 1)
        assert ratio < limit, f"{name}: relative error {ratio:.1e} is not below {limit:.0e}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("axis", ["time", "band"])
@pytest.mark.parametrize("length", [1, 3, 16, 17])
def test_lengths(axis: str, length: int) -> None:
    shape = (1, length, 2) if axis == "time" else (1, 2, length)
    assert_close(draw(shape, 2, 16, 16, 4), axis, small())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("nheads", "headdim", "d_state", "d_conv"), [(3, 20, 24, 3), (1, 40, 72, 2)]
)
def test_sizes_that_need_padding(nheads: int, headdim: int, d_state: int, d_conv: int) -> None:
    assert_close(draw((1, 37, 1), nheads, headdim, d_state, d_conv), "time", small())


@pytest.mark.usefixtures("poison")
def test_head_split_into_tiles() -> None:
    assert_close(draw((1, 1, 33), 2, 40, 16, 4), "band", small(headdim_tile=16))


def test_default_configuration_covers_a_sequence_in_one_chunk() -> None:
    assert KernelConfig.choose(torch.bfloat16, 62, 128, Gpu()).chunk == 64
    assert KernelConfig.choose(torch.bfloat16, 801, 128, Gpu()).chunk == 64
    assert KernelConfig.choose(torch.bfloat16, 801, 256, Gpu()).chunk == 32
    assert_close(draw((2, 3, 5), 2, 16, 16, 4), "band", config=None)


def test_float32_takes_the_tensor_cores_where_its_tiles_fit() -> None:
    h100, rtx, t4 = Gpu(232_448, True), Gpu(101_376, True), Gpu(65_536, False)
    configs = [KernelConfig.choose(torch.float32, 801, 128, gpu) for gpu in (h100, rtx, t4)]
    assert [config.chunk for config in configs] == [64, 32, 32]
    assert KernelConfig.choose(torch.float32, 801, 256, rtx).chunk == 16  # 32 needs 112 KiB
    assert [config.state_key.num_warps for config in configs] == [4, 4, 8]


@pytest.mark.parametrize(
    ("shared_bytes", "stages"), [(232_448, 4), (166_912, 3), (101_376, 2), (65_536, 1)]
)
def test_output_projection_fits_small_gpus(shared_bytes: int, stages: int) -> None:
    # H100, A100, RTX 30 and 40 (147,456 bytes with four stages did not fit), T4.
    assert triton_mixer.output_launch(shared_bytes, 256).num_stages == stages


def test_half_precision() -> None:
    # Triton's interpreter multiplies bfloat16 as integers, so float16 stands for both here.
    assert_close(draw((1, 40, 1), 2, 16, 16, 4), "time", small(), torch.float16, tolerance=3e-3)


def test_strong_decay_stays_finite() -> None:
    proj, params, dout = draw((1, 20, 1), 2, 16, 16, 4)
    proj[..., -2:] += 200.0
    assert_close((proj, params, dout), "time", small(), tolerance=1e-4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("axis", ["time", "band"])
def test_every_run_gives_the_same_gradients(axis: str) -> None:
    proj, params, dout = draw((1, 17, 3) if axis == "time" else (1, 3, 17), 2, 16, 16, 4)
    proj, dout = proj.to(DEVICE), dout.to(DEVICE)
    params = MixerParameters(*(tensor.to(DEVICE) for tensor in params))

    def run() -> dict[str, Tensor]:
        return results(lambda p, w: mixer_core(p, w, axis, config=small()), proj, params, dout)

    first, again = run(), run()
    for name in NAMES:
        assert torch.equal(first[name], again[name]), name


def blocks(d_conv: int = 4) -> tuple[Mamba2Block, Mamba2Block]:
    """One block on Triton and its copy in float64, whose norms' weights are not 1."""
    torch.manual_seed(3)
    sizes = {"d_state": 16, "d_conv": d_conv, "expand": 2, "headdim": 16}
    block = Mamba2Block(24, **sizes, scan_backend="triton")
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    reference = Mamba2Block(24, **sizes, scan_backend="sequential").double()
    reference.load_state_dict(block.state_dict())
    return block.to(DEVICE), reference


def assert_block_close(
    x: Tensor, axis: int, d_conv: int = 4, half: bool = False, loose: float = 1.0
) -> None:
    block, reference = blocks(d_conv)
    block.keeps_work = axis == 2  # as the network's last block
    single, double = x.to(DEVICE).requires_grad_(), x.double().requires_grad_()
    with torch.autocast(DEVICE.type, torch.float16, enabled=half):
        y = block(single, axis)
    expected = reference(double, axis)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(y, [single, *block.parameters()], weights.to(DEVICE))
    want = torch.autograd.grad(expected, [double, *reference.parameters()], weights.double())
    names = ["output", "x", *dict(block.named_parameters())]
    for name, actual, wanted in zip(names, (y, *got), (expected, *want), strict=True):
        scale = wanted.norm() + 1e-3 * expected.norm()
        ratio = ((actual.cpu().double() - wanted).norm() / scale).item()
        limit = loose * (1e-4 if name.endswith(("dt_bias", "A_log")) else 1e-5)
        assert ratio < limit, f"{name}: relative error {ratio:.1e} is not below {limit:.0e}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("axis", "shape"), [(1, (1, 35, 3, 24)), (2, (2, 3, 19, 24))])
def test_block(axis: int, shape: tuple[int, ...]) -> None:
    assert_block_close(torch.randn(shape, generator=torch.Generator().manual_seed(5)), axis)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("axis", [1, 2])
def test_block_in_half_precision(axis: int) -> None:
    x = torch.randn(2, 19, 18, 24, generator=torch.Generator().manual_seed(8))
    assert_block_close(x, axis, half=True, loose=500)


@pytest.mark.parametrize("axis", [1, 2])
def test_block_with_silent_frames(axis: int) -> None:
    x = torch.randn(1, 18, 5, 24, generator=torch.Generator().manual_seed(6))
    x[:, 3:6] = 0
    x[:, :, 2] = 0
    assert_block_close(x, axis)


@pytest.mark.parametrize("axis", [1, 2])
def test_block_that_takes_a_batch_part_by_part(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_block, "WHOLE_TOKENS", 30)
    monkeypatch.setattr(triton_block, "PART_TOKENS", 30)  # two clips at once, then one
    x = torch.randn(3, 5, 3, 24, generator=torch.Generator().manual_seed(9))
    assert_block_close(x, axis)


@pytest.mark.usefixtures("poison")
def test_convolution_across_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mixer, "CONV_PIECE", 3)  # as far as the taps reach back
    monkeypatch.setattr(triton_mixer, "CONV_PARTS", 4)  # fewer programs than pieces
    assert_close(draw((2, 11, 2), 2, 16, 16, 4), "time", small())


def test_block_of_one_sequence_with_short_convolution() -> None:
    x = torch.randn(2, 21, 24, generator=torch.Generator().manual_seed(7))
    assert_block_close(x, 1, d_conv=2)


def test_block_without_gradients_is_the_same() -> None:
    block, _ = blocks()
    x = torch.randn(1, 4, 7, 24, device=DEVICE)
    with torch.no_grad():
        quiet = block(x, 2)
    assert torch.equal(quiet, block(x, 2).detach())


@pytest.mark.parametrize("keeps_work", [False, True])
def test_gradients_can_be_taken_twice(keeps_work: bool) -> None:
    block, _ = blocks()
    block.keeps_work = keeps_work
    x = torch.randn(1, 4, 7, 24, device=DEVICE, requires_grad=True)
    y = block(x, 1)
    assert len(y.grad_fn.works) == keeps_work  # type: ignore[union-attr]
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
    assert not y.grad_fn.works  # type: ignore[union-attr]
    assert torch.equal(first, torch.autograd.grad(y.square().sum(), x)[0])


def test_unsupported_input_is_refused() -> None:
    proj, params, _ = draw((1, 2, 3), 2, 16, 16, 4)
    with pytest.raises(TypeError, match="float64"):
        mixer_core(proj.double(), params, "time")
    with pytest.raises(ValueError, match="axis"):
        mixer_core(proj, params, "frequency")
    with pytest.raises(ValueError, match="contiguous"):
        mixer_core(proj.transpose(1, 2), params, "time")
    with pytest.raises(ValueError, match="width"):
        mixer_core(proj[..., :-1].contiguous(), params, "time")
    with pytest.raises(ValueError, match="d_conv"):
        mixer_core(proj, params._replace(conv_weight=torch.zeros(2, 5, 64)), "time")


@pytest.mark.parametrize("shape", [(3, 5, 24), (3, 2, 5, 24)])
def test_an_axis_without_kernels_is_refused_by_name(shape: tuple[int, ...]) -> None:
    block, _ = blocks()
    with pytest.raises(InputError, match="cannot run"):
        block(torch.randn(shape, device=DEVICE), 0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_block_runs_the_kernels_as_they_are() -> None:
    block, _ = blocks()
    x = torch.randn(1, 4, 7, 24, device=DEVICE, requires_grad=True)
    wanted = block(x, 1)
    compiled = torch.compile(block, backend="aot_eager")(x, 1)
    assert torch.equal(wanted, compiled)
    wanted_dx = torch.autograd.grad(wanted.square().sum(), x)[0]
    assert torch.equal(wanted_dx, torch.autograd.grad(compiled.square().sum(), x)[0])


@pytest.mark.parametrize("axis", [1, 2])
def test_auto_tries_the_backward_pass_apart_from_the_graph(
    axis: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(dispatch, "candidates", lambda x, fused: ["triton", "chunked"])
    monkeypatch.setattr(mamba2, "_tried", set())
    block, _ = blocks()
    x = torch.randn(2, 4, 7, 24, device=DEVICE, requires_grad=True)
    wanted = torch.autograd.grad(block(x, axis).square().sum(), [x, *block.parameters()])
    block.scan_backend, block.keeps_work = "auto", True
    with torch.no_grad():
        block(x, axis)
    assert not mamba2._tried
    y = checkpoint(block, x, axis, use_reentrant=False)
    y.square().sum().backward()
    assert [key[0] for key in mamba2._tried] == ["triton"]
    for leaf, gradient in zip([x, *block.parameters()], wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert not [w for w in recwarn if "failed" in str(w.message)]
