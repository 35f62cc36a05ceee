"""The mixer and the bidirectional block against the authors' numbers and against each other."""

from __future__ import annotations

import pytest
import torch

from models import InputError
from models.conv import causal_conv1d
from models.mamba2 import Mamba2Block, Mamba2Mixer, gated_norm


@pytest.mark.parametrize("backend", ("sequential", "chunked"))
@pytest.mark.parametrize("case", (0, 1, 2))
def test_mixer_agrees_with_the_authors(case, backend, golden, assert_close):
    values = golden("mixers_a.npz")
    shape = {k: v for k, v in values[f"{case}/config"].items() if k not in ("length", "batch")}
    mixer = Mamba2Mixer(**shape, scan_backend=backend)
    prefix = f"{case}/sd/"
    mixer.load_state_dict({k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)})
    u = values[f"{case}/input"].requires_grad_()
    y = mixer(u)
    assert_close("output", y, values[f"{case}/output"], 1e-5)
    y.backward(values[f"{case}/grad_output"])
    assert_close("grad input", u.grad, values[f"{case}/grad_input"], 1e-5)
    for name, parameter in mixer.named_parameters():
        bound = 1e-4 if name in ("dt_bias", "A_log") else 1e-5
        assert_close(f"grad {name}", parameter.grad, values[f"{case}/grad/{name}"], bound)


def plain_block(block: Mamba2Block, x: torch.Tensor) -> torch.Tensor:
    """The block's definition, without folded weights: F, G, concatenation, merge."""
    forward, backward = block.forward_blocks[0], block.backward_blocks[0]
    F = x + forward.mixer(forward.norm(x))
    flipped = x.flip(1)
    G = (flipped + backward.mixer(backward.norm(flipped))).flip(1)
    return x + block.linear(torch.cat([F, G], dim=-1).transpose(1, 2)).transpose(1, 2)


def perturbed_block(backend: str = "chunked") -> Mamba2Block:
    block = Mamba2Block(12, d_state=8, expand=4, headdim=16, scan_backend=backend).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("length", (1, 2, 62, 63, 130))
def test_folded_block_equals_its_definition(length, assert_close):
    block = perturbed_block()
    x = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())
    wanted = [x, *parameters.values()]
    expected, actual = plain_block(block, x), block(x)
    weights = torch.randn_like(expected)
    assert_close("output", actual, expected, 1e-9)
    names = ["input", *parameters]
    gradients = zip(
        names,
        torch.autograd.grad(actual, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    )
    for name, mine, theirs in gradients:
        # One step has no neighbours: A has no influence and both gradients are rounding.
        bound = 1e-9 if length > 1 or "A_log" not in name else float("inf")
        assert_close(f"grad {name}", mine, theirs, bound)


def test_block_runs_along_any_axis(assert_close):
    block = perturbed_block()
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    along_time = torch.stack([block(x[:, :, k]) for k in range(7)], dim=2)
    along_bands = torch.stack([block(x[:, t]) for t in range(5)], dim=1)
    assert_close("time axis", block(x, axis=1), along_time, 1e-12)
    assert_close("band axis", block(x, axis=2), along_bands, 1e-12)


@pytest.mark.parametrize("scale", (1e-3, 1.0, 400.0))
def test_gated_norm_in_half_precision_has_float32_inside(scale, assert_close):
    y, z, dn = (torch.randn(4, 64, generator=torch.manual_seed(n)) for n in range(3))
    halves = [(scale * x).half().requires_grad_() for x in (y, z)]
    wide = [x.detach().float().requires_grad_() for x in halves]
    narrow, wanted = gated_norm(*halves), gated_norm(*wide)
    assert_close("output", narrow.float(), wanted, 1e-3)
    narrow.backward(dn.half())
    wanted.backward(dn.half().float())
    for name, mine, theirs in zip("yz", halves, wide, strict=True):
        assert_close(f"grad {name}", mine.grad.float(), theirs.grad, 2e-3)


def test_block_looks_both_ways_and_mixer_back_only():
    block, mixer = perturbed_block(), Mamba2Mixer(12, d_state=8, headdim=16).double()
    x = torch.randn(1, 20, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 10] += 1
    difference = (block(changed) - block(x)).abs().amax(-1)[0]
    assert (difference > 0).all()
    difference = (mixer(changed) - mixer(x)).abs().amax(-1)[0]
    assert (difference[:10] == 0).all() and (difference[10:] > 0).all()


def test_convolution_is_causal_has_its_current_tap_last_and_applies_silu_once(assert_close):
    x, weight, bias = torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(8)
    expected = torch.zeros(2, 9, 8)
    for t in range(9):
        for j in range(4):
            if t - 3 + j >= 0:
                expected[:, t] += weight[:, j] * x[:, t - 3 + j]
    expected = torch.nn.functional.silu(expected + bias)
    assert_close("conv", causal_conv1d(x, weight, bias), expected, 1e-6)


def test_initial_values_follow_the_scheme():
    mixer = Mamba2Mixer(256)
    block = Mamba2Block(256)
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert (dt > 0.00099).all() and (dt < 0.101).all()
    assert (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 16).all()
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    for weight, bound in (
        (mixer.in_proj.weight, 1 / 16),
        (mixer.out_proj.weight, 1 / 32),
        (mixer.conv1d.weight, 0.5),
        (mixer.conv1d.bias, 0.5),
        (block.linear.weight, 1 / 16),  # torch counts d of ConvTranspose1d, not 2d
        (block.linear.bias, 1 / 16),
    ):
        assert 0.97 * bound < weight.abs().max() <= bound


def test_headdim_that_does_not_fit_is_named():
    with pytest.raises(InputError, match="headdim 64 does not divide expand \\* dim = 40"):
        Mamba2Mixer(10)
