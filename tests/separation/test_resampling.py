"""Resampling a stream is resampling the whole; channels are mixed down as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import soxr

from models.errors import InputError
from separation.resampling import match_channels, resample_blocks, resampled_frames


def resample(audio: np.ndarray, rate: int, new_rate: int, block: int = 1000) -> np.ndarray:
    frames = audio.shape[1]
    blocks = (audio[:, start : start + block] for start in range(0, frames, block))
    length = resampled_frames(frames, rate, new_rate)
    return np.concatenate(list(resample_blocks(blocks, rate, new_rate, lambda: length)), axis=1)


@pytest.mark.parametrize("rates", [(48000, 44100), (22050, 44100), (44100, 96000), (8000, 44100)])
@pytest.mark.parametrize("frames", [1, 5, 1000, 30011])
def test_blocks_give_what_the_whole_gives(rates: tuple[int, int], frames: int) -> None:
    audio = np.random.default_rng(0).standard_normal((2, frames)).astype(np.float32)
    expected = soxr.resample(audio.T, *rates, quality="VHQ").T
    result = resample(audio, *rates)
    assert result.shape[1] == max(1, round(frames * rates[1] / rates[0]))
    shared = min(result.shape[1], expected.shape[1])
    np.testing.assert_array_equal(result[:, :shared], expected[:, :shared])
    assert np.abs(result[:, shared:]).max(initial=0) == 0


@pytest.mark.parametrize("rate", [22050, 48000, 96000])
def test_there_and_back_keeps_a_tone_in_place(rate: int) -> None:
    time = np.arange(rate) / rate
    tone = np.stack([np.sin(6000 * time), np.cos(6000 * time)]).astype(np.float32)
    model = resample(tone, rate, 44100)
    back = resample(model, 44100, rate)
    assert (model.shape, back.shape) == ((2, 44100), (2, rate))
    middle = slice(2000, -2000)
    expected = np.sin(6000 * np.arange(44100) / 44100)
    assert np.abs(model[0, middle] - expected[middle]).max() < 1e-4
    assert np.abs(back[:, middle] - tone[:, middle]).max() < 1e-4


def test_downmix_keeps_sides_apart_and_full_scale() -> None:
    matrix, channels = match_channels(6, 2, downmix=True)
    assert channels == 2
    assert matrix is not None
    left, right, centre, lfe, back_left, back_right = matrix.T
    assert left[1] == right[0] == back_left[1] == back_right[0] == 0
    assert centre[0] == centre[1] > 0
    assert not lfe.any()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("channels", "left", "right"), [(4, 2, 3), (5, 3, 4), (6, 4, 5), (8, 4, 5)]
)
def test_surround_stays_on_its_side(channels: int, left: int, right: int) -> None:
    matrix, _ = match_channels(channels, 2, downmix=True)
    assert matrix is not None
    assert matrix[0, left] > 0 == matrix[1, left] and matrix[1, right] > 0 == matrix[0, right]


@pytest.mark.parametrize(("channels", "wanted", "expected"), [(7, 2, 1), (2, 1, 1), (3, 2, 2)])
def test_downmix_of_odd_layouts(channels: int, wanted: int, expected: int) -> None:
    matrix, result = match_channels(channels, wanted, downmix=True)
    assert matrix is not None
    assert (result, matrix.shape) == (expected, (expected, channels))
    np.testing.assert_allclose(matrix @ np.ones(channels), np.ones(expected), rtol=1e-6)


def test_channels_that_fit_are_left_alone() -> None:
    assert match_channels(1, 2, downmix=True) == (None, 1)
    assert match_channels(2, 2, downmix=False) == (None, 2)
    with pytest.raises(InputError, match="6 channels: the model takes 1 or 2; --downmix"):
        match_channels(6, 2, downmix=False)
