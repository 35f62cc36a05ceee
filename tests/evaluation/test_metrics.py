"""Scores against museval and against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from evaluation.metrics import bss_eval, csdr, frame_median, framewise_sdr, si_sdr, usdr

RATE = 44100


def noise(frames: int, seed: int = 0, channels: int = 2) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((channels, frames))


def pair_with_silences() -> tuple[np.ndarray, np.ndarray]:
    """5.5 s: frame 1 silent in the reference, frame 2 in the estimate, frame 3 in L + R only."""
    reference = noise(5 * RATE + RATE // 2)
    estimate = reference + 0.3 * noise(reference.shape[1], seed=1)
    reference[:, RATE : 2 * RATE] = 0
    estimate[:, 2 * RATE : 3 * RATE] = 0
    reference[1, 3 * RATE : 4 * RATE] = -reference[0, 3 * RATE : 4 * RATE]
    return reference, estimate


def museval_sdr(reference: np.ndarray, estimate: np.ndarray, window: int, hop: int) -> np.ndarray:
    from museval.metrics import bss_eval as judge

    return judge(reference.T[None], estimate.T[None], window=window, hop=hop)[0][0]


@pytest.mark.parametrize(("window", "hop"), [(RATE, RATE), (2 * RATE, RATE // 2)])
def test_framewise_sdr_equals_museval(window: int, hop: int) -> None:
    reference, estimate = pair_with_silences()
    expected = museval_sdr(reference, estimate, window, hop)
    actual = framewise_sdr(reference, estimate, window, hop)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-9, rtol=0, equal_nan=True)


def test_frames_that_are_silent_as_museval_sees_it() -> None:
    sdr = framewise_sdr(*pair_with_silences(), RATE, RATE)
    assert np.isnan(sdr).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("frames", [1000, RATE, RATE + 1, 2 * RATE - 1])
def test_signals_shorter_than_two_frames_equal_museval(frames: int) -> None:
    reference = noise(frames)
    estimate = reference + noise(frames, seed=1)
    expected = museval_sdr(reference, estimate, RATE, RATE)
    actual = framewise_sdr(reference, estimate, RATE, RATE)
    np.testing.assert_allclose(actual, expected, atol=1e-9, rtol=0)
    assert actual.shape == (1,)


def test_odd_estimates_equal_museval() -> None:
    reference = noise(2 * RATE)
    for estimate in (reference[::-1], np.roll(reference, 3, axis=1), -reference, 1e-6 * reference):
        expected = museval_sdr(reference, estimate, RATE, RATE)
        np.testing.assert_allclose(
            framewise_sdr(reference, estimate, RATE, RATE), expected, atol=1e-9, rtol=0
        )


def test_scores_of_known_errors() -> None:
    reference = noise(3 * RATE)
    np.testing.assert_allclose(framewise_sdr(reference, 0.9 * reference), 20, atol=1e-9)
    assert csdr(reference, 0.9 * reference) == pytest.approx(20, abs=1e-9)
    assert np.all(framewise_sdr(reference, reference) == np.inf)
    ones = np.ones((2, 100))
    assert usdr(ones, 0 * ones) == 0
    assert usdr(ones, 0.5 * ones) == pytest.approx(10 * math.log10(4), abs=1e-7)
    assert usdr(ones, ones) == pytest.approx(10 * math.log10(200 / 1e-7), abs=1e-6)
    assert usdr(0 * ones, 0 * ones) == 0
    assert usdr(0 * ones, ones) == pytest.approx(10 * math.log10(1e-7 / 200), abs=1e-6)


def test_csdr_is_the_median_of_the_known_frames() -> None:
    reference = np.ones((1, 5 * 10))
    gains = np.repeat([0.5, 0.9, 0.99, 0.0, 0.999], 10)
    # 6.02, 20, 40, NaN (silent estimate), 60 dB
    assert csdr(reference, reference * gains, 10) == pytest.approx(30, abs=1e-6)


def test_silence_is_nan_and_not_an_error() -> None:
    signal = noise(3 * RATE)
    silence = np.zeros_like(signal)
    assert math.isnan(csdr(silence, signal))
    assert math.isnan(csdr(signal, silence))
    assert math.isnan(frame_median(np.array([])))
    scores = bss_eval(np.stack([silence, signal]), np.stack([signal, signal]))
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(
        ("SDR", "ISR", "SIR", "SAR"), (2, 3)
    )
    assert all(np.isnan(values).all() for values in scores.values())


def test_bss_eval_is_museval_with_channels_first() -> None:
    references = np.stack([noise(2 * RATE, seed=seed) for seed in (1, 2)])
    estimates = references + 0.2 * references[::-1] + 0.01 * noise(2 * RATE, seed=3)
    scores = bss_eval(references, estimates)
    from museval import evaluate

    swapped = [array.transpose(0, 2, 1) for array in (references, estimates)]
    expected = evaluate(*swapped, win=RATE, hop=RATE)
    for name, values in zip(("SDR", "ISR", "SIR", "SAR"), expected, strict=True):
        np.testing.assert_array_equal(scores[name], values)
    # A fifth of the other source, of the same power, is interference at 10 log10(1 / 0.04) dB.
    np.testing.assert_allclose(scores["SIR"], 10 * math.log10(25), atol=0.1)


def test_sdr_does_not_depend_on_other_sources() -> None:
    references = np.stack([noise(2 * RATE, seed=seed) for seed in (1, 2)])
    estimates = references + 0.2 * references[::-1]
    sdr = bss_eval(references, estimates)["SDR"]
    for source in range(2):
        single = framewise_sdr(references[source], estimates[source])
        np.testing.assert_allclose(single, sdr[source], atol=1e-9, rtol=0)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ"):
        usdr(np.zeros((2, 10)), np.zeros((2, 11)))


def test_missing_ffmpeg_is_one_line_with_the_remedy() -> None:
    code = (
        "import numpy as np; from evaluation.metrics import bss_eval; from models.errors import "
        "run_command; run_command(lambda: bss_eval(np.ones((1, 2, 9)), np.ones((1, 2, 9))) and 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/nonexistent", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "install ffmpeg" in result.stderr


def test_si_sdr_ignores_the_scale() -> None:
    reference = noise(RATE)
    # Noise made orthogonal to the reference: a tenth of its amplitude is 20 dB below.
    error = noise(RATE, seed=1)
    error -= reference * np.sum(error * reference) / np.sum(reference**2)
    error *= 0.1 * np.linalg.norm(reference) / np.linalg.norm(error)
    for scale in (1.0, -3.0, 1e-4):
        assert si_sdr(reference, scale * (reference + error)) == pytest.approx(20, abs=1e-9)
    assert si_sdr(reference, 0.3 * reference) == math.inf
    assert si_sdr(np.array([[1.0, 1.0]]), np.array([[1.0, -1.0]])) == -math.inf
    assert math.isnan(si_sdr(reference, 0 * reference))
    assert math.isnan(si_sdr(0 * reference, reference))


def constructed() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The odd cases that docs/evaluation.md explains: reference and estimate."""
    reference = noise(3 * RATE)
    mono = np.repeat(reference[:1], 2, axis=0)
    delayed = np.roll(reference, 5, axis=1)
    return {
        "perfect": (reference, reference.copy()),
        "swapped channels": (reference, reference[::-1].copy()),
        "delayed": (reference, delayed),
        "half": (reference, 0.5 * reference),
        "equal channels": (mono, mono + noise(3 * RATE, seed=1)),
        "opposite channels": (reference, np.stack([reference[0], -reference[0]])),
    }


@pytest.mark.parametrize("case", list(constructed()))
def test_constructed_signals_equal_museval(case: str) -> None:
    reference, estimate = constructed()[case]
    if case == "opposite channels":
        # Its channels cancel: museval takes it for silent throughout and refuses.
        with pytest.raises(ValueError, match="non-silent"):
            museval_sdr(reference, estimate, RATE, RATE)
        assert np.isnan(framewise_sdr(reference, estimate, RATE, RATE)).all()
        return
    expected = museval_sdr(reference, estimate, RATE, RATE)
    actual = framewise_sdr(reference, estimate, RATE, RATE)
    if case == "perfect":
        # The projections leave rounding, 1e-13 of the signal: museval prints 250 dB or more.
        assert np.all(expected > 240)
        assert np.all(actual == np.inf)
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-9, rtol=0)


def test_museval_survives_a_singular_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """museval names an exception by a name that numpy has dropped."""

    def refuse(*arguments: object) -> None:
        raise np.linalg.LinAlgError("Singular matrix")

    reference = noise(RATE // 4)[None]
    estimate = reference + 0.1 * noise(RATE // 4, seed=1)[None]
    expected = bss_eval(reference, estimate)
    monkeypatch.setattr(np.linalg, "solve", refuse)
    least_squares = bss_eval(reference, estimate)
    for name in ("SDR", "ISR", "SAR"):
        np.testing.assert_allclose(least_squares[name], expected[name], atol=1e-3)
