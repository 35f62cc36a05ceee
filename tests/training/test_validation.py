"""Validation against the formula, the target's round trip, pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models import BSMamba2, BSMamba2Config
from models.errors import InputError
from training.loss import SeparationLoss
from training.pictures import BINS_SHOWN, LOWEST_HZ, spectrogram_triptych
from training.validation import Validation, round_trip, separate_segment, validate

TIME = 10 * 441


@pytest.fixture
def model() -> BSMamba2:
    return BSMamba2(
        BSMamba2Config(
            dim=8, depth=1, d_state=8, headdim=16, num_stems=2, stem_names=("drums", "vocals")
        )
    )


def test_means_over_items_of_every_stem(model: BSMamba2) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(5, 2, 2, TIME, generator=generator)
    # Stem 0 is estimated with an error of a tenth, stem 1 as silence.
    scale = torch.tensor([0.9, 0.0])[:, None, None]
    batches = [
        {"mixture": part[:, 0] + part[:, 1], "target": part} for part in targets.split([2, 2, 1])
    ]
    estimates = iter([part * scale for part in targets.split([2, 2, 1])])

    def network(mixture: Tensor) -> Tensor:
        assert not model.training
        return next(estimates)

    loss = SeparationLoss()
    result = validate(network, model, loss, batches)
    assert model.training
    assert result.usdr == pytest.approx({"drums": 20.0, "vocals": 0.0}, abs=1e-3)
    assert result.mean_usdr == pytest.approx(10.0, abs=1e-3)
    expected = float(loss(targets * scale, targets)[0])
    assert result.loss == pytest.approx(expected, rel=1e-4)
    # 0.9 of one of two equal stems.
    assert result.level == pytest.approx(10 * np.log10(0.81 / 2), abs=0.1)
    assert not result.is_silent


def test_a_data_set_that_is_gone_is_an_error(model: BSMamba2) -> None:
    with pytest.raises(InputError, match="no validation segment can be read any more"):
        validate(model, model, SeparationLoss(), [])


def test_silence_is_told_from_a_slow_start() -> None:
    assert Validation(1.0, {"vocals": 0.01}, level=-60.0).is_silent
    assert not Validation(1.0, {"vocals": 0.01}, level=-3.0).is_silent
    assert not Validation(1.0, {"vocals": 2.0}, level=-25.0).is_silent


def test_an_example_shows_what_the_network_makes_of_a_segment(model: BSMamba2) -> None:
    segment = {"mixture": torch.randn(2, TIME), "target": torch.randn(2, 2, TIME)}

    def network(mixture: Tensor) -> Tensor:
        return torch.stack([mixture, 2 * mixture], dim=1)

    waves = separate_segment(network, model, segment)
    assert torch.equal(waves["truth"], segment["target"])
    assert torch.equal(waves["mixture"][1], segment["mixture"])
    assert torch.equal(waves["estimate"][1], 2 * segment["mixture"])


@pytest.mark.parametrize("time", [TIME, TIME + 100])
def test_round_trip_is_the_models_own_stft(model: BSMamba2, time: int) -> None:
    target = torch.randn(2, 2, 2, time, generator=torch.Generator().manual_seed(1))
    result = round_trip(model, target)
    window = torch.hann_window(2048)
    flat = target.reshape(8, time)
    spectrum = torch.stft(flat, 2048, 441, window=window, return_complex=True)
    expected = torch.istft(spectrum, 2048, 441, window=window, length=time)
    torch.testing.assert_close(result, expected.reshape(target.shape))


def test_triptych_shows_a_tone_where_it_is() -> None:
    sample_rate = 44100
    seconds = np.arange(2 * sample_rate) / sample_rate
    hertz = 47 * sample_rate / 2048  # the centre of a bin
    tone = np.stack([np.sin(2 * np.pi * hertz * seconds)] * 2)
    figure = spectrogram_triptych(0.5 * tone, 0 * tone, torch.from_numpy(tone), sample_rate)
    panels = figure.axes[:3]
    assert [panel.get_title() for panel in panels] == ["mixture", "estimate", "truth"]
    levels = [np.asarray(panel.images[0].get_array()) for panel in panels]
    row = round(np.log(hertz / LOWEST_HZ) / np.log(22050 / LOWEST_HZ) * (BINS_SHOWN - 1))
    middle = levels[2].shape[1] // 2
    assert abs(int(levels[2][:, middle].argmax()) - row) <= 2
    # Full scale is a sine of amplitude 1.
    assert levels[2].max() == pytest.approx(0.0, abs=0.01)
    assert levels[0].max() - levels[2].max() == pytest.approx(20 * np.log10(0.5), abs=0.01)
    assert {panel.images[0].get_clim() for panel in panels} == {panels[0].images[0].get_clim()}
