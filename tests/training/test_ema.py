"""The weight average against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import EMA


def make_model(value: float) -> nn.Linear:
    model = nn.Linear(2, 1).double()
    set_weights(model, value)
    return model


def set_weights(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_follows_the_weights_from_a_copy_without_bias_correction() -> None:
    model = make_model(1.0)
    ema = EMA(model, decay=0.9)
    expected = 1.0
    for number, value in enumerate((2.0, 5.0, -3.0), start=1):
        set_weights(model, value)
        ema.update(model, number)
        expected = 0.9 * expected + 0.1 * value
    for average in ema.state_dict().values():
        torch.testing.assert_close(average, torch.full_like(average, expected))


def test_a_share_of_the_steps_forgets_the_start() -> None:
    model = make_model(1.0)
    ema = EMA(model, decay=0.5, share=0.1)
    expected = 1.0
    for number, value in enumerate((2.0, 5.0), start=1):
        set_weights(model, value)
        ema.update(model, number)
        decay = number / (10 + number)
        expected = decay * expected + (1 - decay) * value
    ema.update(model, 1000)  # no less than the decay
    torch.testing.assert_close(
        ema.state_dict()["bias"], torch.full_like(model.bias, (expected + 5.0) / 2)
    )


def test_applied_swaps_in_and_back_even_on_an_error() -> None:
    model = make_model(1.0)
    ema = EMA(model, decay=0.5)
    set_weights(model, 3.0)
    ema.update(model, 1)
    with pytest.raises(RuntimeError, match="stop"), ema.applied(model):
        assert torch.equal(model.weight, torch.full_like(model.weight, 2.0))
        raise RuntimeError("stop")
    assert torch.equal(model.weight, torch.full_like(model.weight, 3.0))
    assert torch.equal(ema.state_dict()["weight"], torch.full_like(model.weight, 2.0))


def test_average_is_no_view_of_the_weights() -> None:
    model = make_model(1.0)
    ema = EMA(model, decay=0.9)
    set_weights(model, 7.0)
    assert torch.equal(ema.state_dict()["bias"], torch.ones_like(model.bias))


def test_state_goes_on_in_another_instance() -> None:
    model = make_model(1.0)
    ema = EMA(model, decay=0.9)
    set_weights(model, 2.0)
    ema.update(model, 1)
    other = EMA(make_model(0.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    ema.update(model, 1)
    other.update(model, 1)
    for name, average in ema.state_dict().items():
        assert torch.equal(average, other.state_dict()[name])


def test_the_whole_share_is_the_mean() -> None:
    model = make_model(0.0)
    ema = EMA(model, decay=0.999, share=1.0)
    for number, value in enumerate((2.0, 5.0, -4.0), start=1):
        set_weights(model, value)
        ema.update(model, number)
    bias = ema.state_dict()["bias"]
    torch.testing.assert_close(bias, torch.full_like(bias, (0.0 + 2.0 + 5.0 - 4.0) / 4))
