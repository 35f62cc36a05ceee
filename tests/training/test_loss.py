"""The loss against a literal reimplementation, and its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.loss import SeparationLoss

WINDOWS = (4096, 2048, 1024, 512, 256)


def literal_stft(wave: np.ndarray, window_length: int) -> np.ndarray:
    """STFT of one `[time]` signal by numpy, frame by frame, `[frame, bin]`."""
    n_fft = max(window_length, 2048)
    padded = np.pad(wave, n_fft // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)
    left = (n_fft - window_length) // 2
    window = np.pad(hann, (left, n_fft - window_length - left))
    starts = range(0, len(padded) - n_fft + 1, 147)
    return np.stack([np.fft.rfft(padded[s : s + n_fft] * window) for s in starts])


def literal_terms(estimate: np.ndarray, target: np.ndarray) -> dict[str, float]:
    terms = {"time": float(np.mean(np.abs(estimate - target)))}
    rows = zip(
        estimate.reshape(-1, estimate.shape[-1]), target.reshape(-1, target.shape[-1]), strict=True
    )
    pairs = list(rows)
    for w in WINDOWS:
        moduli = [np.abs(literal_stft(e, w) - literal_stft(t, w)) for e, t in pairs]
        terms[f"stft_{w}"] = float(np.mean(moduli))
    return terms


def test_equals_literal_reimplementation() -> None:
    rng = np.random.default_rng(0)
    estimate, target = rng.standard_normal((2, 2, 1, 2, 5000))
    total, terms = SeparationLoss()(torch.from_numpy(estimate), torch.from_numpy(target))
    expected = literal_terms(estimate, target)
    # The module's windows are float32.
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected, rel=1e-6)
    wanted = 10 * expected["time"] + sum(expected[f"stft_{w}"] for w in WINDOWS)
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-6)


def test_gradient_equals_that_of_torch_stft() -> None:
    error = torch.randn(2, 1, 2, 5003, dtype=torch.float64, requires_grad=True)
    total, _ = SeparationLoss()(error, torch.zeros_like(error))
    (gradient,) = torch.autograd.grad(3 * total, error)
    plain = 10 * error.abs().mean()
    for w in WINDOWS:
        n_fft, window = max(w, 2048), torch.hann_window(w).double()
        rows = error.flatten(0, -2)
        spectrum = torch.stft(rows, n_fft, 147, w, window, return_complex=True)
        plain = plain + spectrum.abs().mean()
    (expected,) = torch.autograd.grad(3 * plain, error)
    assert float(total.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-15)


def test_large_batches_are_worked_off_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.randn(3, 1, 2, 4410, dtype=torch.float64, requires_grad=True)

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        total, _ = SeparationLoss()(error, torch.zeros_like(error))
        return total, torch.autograd.grad(total, error)[0]

    whole = loss_and_gradient()
    monkeypatch.setattr("training.loss.SLICE_ELEMENTS", 2 * 31 * 2048)
    for sliced, expected in zip(loss_and_gradient(), whole, strict=True):
        assert torch.allclose(sliced, expected, rtol=1e-12, atol=0)


def test_impulse_has_known_values() -> None:
    # |STFT| of an impulse at sample 7 * 147 is the window's value at the impulse, in every bin.
    time, position = 8000, 7 * 147
    estimate = torch.zeros(1, 1, 1, time)
    estimate[..., position] = 1.0
    total, terms = SeparationLoss(windows=(256,))(estimate, torch.zeros_like(estimate))
    frames = 1 + time // 147
    near = np.arange(-127, 128)
    hann = 0.5 + 0.5 * np.cos(2 * np.pi * near / 256)
    spectral = hann[near % 147 == 0].sum() / frames
    assert float(terms["time"]) == pytest.approx(1 / time)
    assert float(terms["stft_256"]) == pytest.approx(spectral, rel=1e-5)
    assert float(total.detach()) == pytest.approx(10 / time + spectral, rel=1e-5)


def test_stems_weigh_alike_and_equal_waves_cost_nothing() -> None:
    loss = SeparationLoss()
    target = torch.randn(2, 3, 2, 4410, generator=torch.Generator().manual_seed(1))
    estimate = target.clone().requires_grad_()
    total, _ = loss(estimate, target)
    total.backward()
    assert float(total.detach()) == 0.0
    assert estimate.grad is not None and not estimate.grad.any()
    estimate = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    each = [float(loss(estimate[:, n], target[:, n])[0]) for n in range(3)]
    assert float(loss(estimate, target)[0]) == pytest.approx(np.mean(each), rel=1e-5)


def test_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    estimate, target = torch.randn(2, 1, 1, 2, 4410, generator=generator)
    plain, _ = SeparationLoss()(estimate, target)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = SeparationLoss()(estimate, target)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_windows_move_with_the_module_but_are_not_saved() -> None:
    loss = SeparationLoss()
    assert loss.state_dict() == {}
    assert [name for name, _ in loss.named_buffers()] == [f"window_{w}" for w in WINDOWS]
