from __future__ import annotations

import builtins

import numpy as np
import pytest

from models.errors import InputError
from training.data.activity import ActivityIndex
from training.data.augment import Augmentation, Change, stretch
from training.data.mixing import RandomMixes
from training.data.sources import STEMS

RATE = 44_100
SEGMENT = 4410


def mixes(tracks: list, index: ActivityIndex, **settings: float) -> RandomMixes:
    augmentation = Augmentation(**settings)
    return RandomMixes(
        tracks, index, STEMS, seed=7, silent_prob=0.0, gain=(1.0, 1.0), augmentation=augmentation
    )


def test_swap_and_polarity_change_the_plain_window(tracks, index) -> None:
    plain = mixes(tracks, index)
    swapped = mixes(tracks, index, channel_swap_prob=1.0)
    inverted = mixes(tracks, index, polarity_prob=1.0)
    for i in range(5):
        target = plain[i]["target"].numpy()
        np.testing.assert_array_equal(swapped[i]["target"].numpy(), target[:, ::-1])
        np.testing.assert_array_equal(inverted[i]["target"].numpy(), -target)
        for dataset in (swapped, inverted):
            example = dataset[i]
            total = sum(example["target"].numpy(), start=np.zeros((2, SEGMENT), np.float32))
            np.testing.assert_array_equal(example["mixture"].numpy(), total)


def test_probability_is_of_each_stem(tracks, index) -> None:
    plain, some = mixes(tracks, index), mixes(tracks, index, polarity_prob=0.3)
    products = [(plain[i]["target"] * some[i]["target"]).sum(dim=(1, 2)) for i in range(100)]
    signs = np.sign(np.stack(products))  # example stem
    assert 0.2 < np.mean(signs < 0) < 0.4
    assert np.abs(np.corrcoef(signs.T) - np.eye(4)).max() < 0.4


def test_one_setting_moves_no_other(tracks, index) -> None:
    some = mixes(tracks, index, polarity_prob=0.5)
    both = mixes(tracks, index, polarity_prob=0.5, channel_swap_prob=1.0)
    for i in range(10):
        swapped_back = both[i]["target"].numpy()[:, ::-1]
        np.testing.assert_array_equal(swapped_back, some[i]["target"].numpy())


def test_several_stems_of_one_kind_are_windows_of_it(tracks, index) -> None:
    plain, layered = mixes(tracks, index), mixes(tracks, index, same_stem_prob=1.0)
    windows = np.stack([tracks[t].read("bass", s, SEGMENT) for t, s in index.windows["bass"]])
    flat = windows.reshape(len(windows), -1).T
    for i in range(5):
        target = layered[i]["target"][2].numpy()
        shares = np.linalg.lstsq(flat, target.ravel(), rcond=None)[0]
        assert shares.sum() == pytest.approx(3, abs=1e-3)  # three windows, each once or more
        rest = target - plain[i]["target"][2].numpy()
        shares = np.linalg.lstsq(flat, rest.ravel(), rcond=None)[0]
        assert shares.sum() == pytest.approx(2, abs=1e-3)  # the plain recipe's is one of them


def test_shift_stays_within_the_track() -> None:
    assert Change(shift=-500).place(400, 1000, 5000) == (0, 1000)
    assert Change(shift=700).place(4000, 1000, 5000) == (4000, 1000)
    assert Change(shift=-30).place(400, 1000, 5000) == (370, 1000)
    assert Change(tempo=1.5).place(4000, 1000, 5000) == (3500, 1500)
    assert Change(tempo=1.5).place(0, 1000, 1200) == (0, 1200)  # as far as the track goes


def test_shifted_windows_are_the_songs_own(tracks, index, places) -> None:
    shifted = mixes(tracks, index, time_shift_prob=1.0, time_shift_seconds=0.05)
    starts = []
    for i in range(20):
        ((_, start),) = places("vocals", shifted[i]["target"][0].numpy())
        starts.append(start)
    grid = set(index.windows["vocals"][:, 1].tolist())
    assert len(set(starts) - grid) > 10


def test_draws_are_within_their_ranges() -> None:
    settings = Augmentation(
        time_shift_prob=1,
        time_shift_seconds=0.5,
        pitch_prob=0.5,
        tempo_prob=1,
        tempo_min=0.8,
        speed_prob=0.3,
        speed_min=0.7,
    )
    rng = np.random.default_rng(0)
    changes = [settings.draw(rng, 1000) for _ in range(400)]
    assert -500 <= min(c.shift for c in changes) < -450 < 450 < max(c.shift for c in changes) <= 500
    tempos = [c.tempo for c in changes]
    assert 0.8 <= min(tempos) < 0.82 < 1.08 < max(tempos) <= 1.1
    assert 150 < sum(c.semitones != 0 for c in changes) < 250
    assert max(abs(c.semitones) for c in changes) <= 2
    speeds = [c.speed for c in changes if c.speed != 1]
    assert 90 < len(speeds) < 150
    assert 0.7 <= min(speeds) < 0.73 < 1.07 < max(speeds) <= 1.1


def test_augmentation_that_begins_later(tracks, index) -> None:
    plain, changed = mixes(tracks, index), mixes(tracks, index, polarity_prob=1.0)
    later = mixes(tracks, index, polarity_prob=1.0, augment_after=100)

    def are_changed(numbers: range) -> list[bool]:
        found = [changed[i]["target"].equal(later[i]["target"]) for i in numbers]
        assert found == [not plain[i]["target"].equal(later[i]["target"]) for i in numbers]
        return found

    assert not any(are_changed(range(100)))
    assert all(are_changed(range(200, 220)))
    early, late = np.mean(are_changed(range(100, 150))), np.mean(are_changed(range(150, 200)))
    assert 0.05 < early < 0.45 < 0.55 < late < 0.95


def peak_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio[0] * np.hanning(audio.shape[-1])))
    return float(np.argmax(spectrum)) * RATE / audio.shape[-1]


def test_speed_moves_pitch_and_tempo_together() -> None:
    tone = np.tile(np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE), (2, 1)).astype(np.float32)
    for speed in (0.9, 1.1):
        change = Change(speed=speed)
        start, frames = change.place(100, RATE, 2 * RATE)
        assert (start, frames) == (100, round(speed * RATE))
        moved = change.apply(tone[:, start : start + frames], RATE, RATE)
        assert moved.shape == (2, RATE) and moved.dtype == np.float32
        assert peak_hz(moved) == pytest.approx(440 * speed, abs=1)
        assert np.abs(moved[:, 2000:-2000]).max() == pytest.approx(1, abs=0.01)


def test_speed_and_tempo_together_fill_the_segment() -> None:
    pytest.importorskip("python_stretch")
    change = Change(speed=1.1, tempo=0.9)
    _, frames = change.place(0, SEGMENT, 10 * SEGMENT)
    noise = np.random.default_rng(0).standard_normal((2, frames)).astype(np.float32)
    moved = change.apply(noise, SEGMENT, RATE)
    assert moved.shape == (2, SEGMENT) and np.abs(moved[:, -100:]).max() > 0.1


def test_pitch_moves_and_tempo_does_not_move_it() -> None:
    pytest.importorskip("python_stretch")
    time = np.arange(RATE) / RATE
    tone = np.tile(np.sin(2 * np.pi * 440 * time), (2, 1)).astype(np.float32)
    higher = stretch(tone, RATE, 12.0, RATE)
    slower = stretch(tone[:, : RATE * 9 // 10], RATE, 0.0, RATE)
    assert higher.shape == slower.shape == (2, RATE)
    assert peak_hz(higher) == pytest.approx(880, abs=3)
    assert peak_hz(slower) == pytest.approx(440, abs=3)


def test_pitch_and_tempo_follow_from_seed_and_number(tracks, index) -> None:
    pytest.importorskip("python_stretch")
    settings = {"pitch_prob": 0.5, "tempo_prob": 0.5}
    first, again = mixes(tracks, index, **settings), mixes(tracks, index, **settings)
    plain = mixes(tracks, index)
    again[0]
    changed = 0
    for i in (3, 1):
        example = first[i]
        assert example["target"].shape == (4, 2, SEGMENT)
        np.testing.assert_array_equal(example["target"].numpy(), again[i]["target"].numpy())
        changed += int((example["target"] != plain[i]["target"]).any())
    assert changed == 2


def test_missing_library_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **options: object) -> object:
        if name == "python_stretch":
            raise ImportError(name)
        return real(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    Augmentation(polarity_prob=1.0)
    with pytest.raises(InputError, match=r"data\.pitch_prob .* pip install python-stretch"):
        Augmentation(pitch_prob=0.1)
