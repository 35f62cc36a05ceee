"""It is the paper's network: parameters, names, numbers; and it takes any length of sound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import BSMamba2, BSMamba2Config, InputError

STATE_DICT = Path(__file__).parents[1] / "reference" / "state_dict_full.json"
TINY = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16)


def test_default_network_is_the_papers():
    expected = json.loads(STATE_DICT.read_text())
    with torch.device("meta"):
        model = BSMamba2()
    assert sum(p.numel() for p in model.parameters()) == 48_098_188 == expected["parameters"]
    mine = [[k, list(v.shape), str(v.dtype)] for k, v in model.state_dict().items()]
    assert mine == expected["state_dict"]


def test_only_the_last_block_keeps_its_work():
    model = BSMamba2(replace(TINY, depth=2))
    kept = [block.keeps_work for pair in model.layers for block in pair]
    assert kept == [False, False, False, True]
    model = BSMamba2(replace(TINY, gradient_checkpointing=True))
    assert not any(block.keeps_work for pair in model.layers for block in pair)


@pytest.mark.parametrize("backend", ("sequential", "chunked"))
@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_forward_agrees_with_the_authors(backend, dtype, golden, assert_close):
    values = golden("network_a.npz")
    model = BSMamba2(BSMamba2Config(**values["config"], scan_backend=backend))
    model.load_state_dict({k[3:]: v for k, v in values.items() if k.startswith("sd/")})
    model.to(torch.float64 if dtype == torch.complex128 else torch.float32)
    with torch.no_grad():
        output = model.forward_spectrogram(values["input"].to(dtype))
    # The golden output is stored as complex64: 1e-7 is its own rounding.
    assert_close("output", output, values["output"], 1e-5 if dtype == torch.complex64 else 1e-7)


def test_quiet_and_silent_frames_are_treated_by_direction_not_level(assert_close):
    """No epsilon under the root of the band norm: a scaled input gives a scaled output."""
    model = BSMamba2(TINY).double()
    spec = torch.randn(1, 2, 1025, 6, dtype=torch.complex128)
    spec[:, :, :, 2] = 0  # a silent frame
    spec[:, 1, :, 3] = 0  # a silent channel
    expected = model.forward_spectrogram(spec)
    assert_close("quiet", model.forward_spectrogram(spec * 1e-7) * 1e7, expected, 1e-9)
    assert (expected[..., 2] == 0).all() and torch.isfinite(expected.abs()).all()


def test_mask_multiplies_as_a_complex_number():
    """A mask turns the phase: one that scales parts separately does not commute with a rotation."""
    model = BSMamba2(TINY).double()
    mask = torch.randn(1, 6, 4100, dtype=torch.float64)
    spec = torch.randn(1, 2, 1025, 6, dtype=torch.complex128)
    turned = model._apply_mask(mask, spec * 1j)
    assert torch.allclose(turned, model._apply_mask(mask, spec) * 1j)
    # Index of bin f, channel c, part p: (2 f + c) 2 + p.
    value = torch.complex(mask[0, 4, (2 * 7 + 1) * 2], mask[0, 4, (2 * 7 + 1) * 2 + 1])
    assert torch.isclose(model._apply_mask(mask, spec)[0, 1, 7, 4], value * spec[0, 1, 7, 4])


@pytest.mark.parametrize("length", (1, 440, 1024, 1025, 2048, 22_051))
def test_any_length_keeps_its_length_and_the_stft_inverts(length, assert_close):
    model = BSMamba2(replace(TINY, num_stems=2, stem_names=("vocals", "drums")))
    waveform = torch.randn(2, 2, length)
    assert model(waveform).shape == (2, 2, 2, length)
    assert torch.isfinite(model(waveform)).all()
    assert_close("round trip", model.istft(model.stft(waveform), length), waveform, 1e-5)


@pytest.mark.parametrize(("hop", "rest"), ((1024, 1023), (1024, 800), (768, 767), (441, 440)))
def test_the_end_of_a_last_hop_is_inverted_too(hop, rest, assert_close):
    model = BSMamba2(replace(TINY, hop_length=hop))
    waveform = torch.randn(1, 2, 8 * hop + rest)
    back = model.istft(model.stft(waveform), waveform.shape[-1])
    assert_close("round trip", back, waveform, 1e-4)


def test_stft_settings_are_the_papers():
    model = BSMamba2(TINY)
    spec = model.stft(torch.ones(1, 2, 352_800))
    assert spec.shape == (1, 2, 1025, 801)
    assert spec[0, 0, 0, 400].real == pytest.approx(1024)  # sum of a periodic Hann of 2048


def test_gradient_checkpointing_changes_no_gradient(assert_close):
    model = BSMamba2(TINY)
    waveform = torch.randn(1, 2, 4096)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        model.config = replace(TINY, gradient_checkpointing=enabled)
        return list(torch.autograd.grad(model(waveform).square().sum(), model.parameters()))

    for name, with_it, without in zip(
        dict(model.named_parameters()), gradients(True), gradients(False), strict=True
    ):
        assert_close(f"grad {name}", with_it, without, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"dim": 0}, "dim must be at least 1"),
        ({"headdim": 48}, "headdim 48 does not divide"),
        ({"num_stems": 2}, "stem_names must hold num_stems = 2"),
        ({"n_fft": 4096}, "band_widths sum to 1025 bins"),
        ({"hop_length": 1025}, "hop_length 1025 is more than half"),
    ),
)
def test_impossible_configurations_are_named(change, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


def test_wrong_shapes_are_named():
    model = BSMamba2(TINY)
    with pytest.raises(InputError, match=r"\[batch, 2, time\] is needed, not \[1, 1, 100\]"):
        model(torch.zeros(1, 1, 100))
    with pytest.raises(InputError, match="has no samples"):
        model(torch.zeros(1, 2, 0))
    with pytest.raises(InputError, match="1025"):
        model.forward_spectrogram(torch.zeros(1, 2, 513, 4, dtype=torch.complex64))
